"""The execution of a placement, as values: executors, and the time and memory that running takes."""
