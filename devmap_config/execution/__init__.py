"""How a placement is executed, as values: what runs it, and what time and memory that takes."""
