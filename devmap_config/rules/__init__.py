"""Rules about parts of a model: patterns, the one matcher for them, and which rule wins."""
