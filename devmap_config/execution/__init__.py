"""The execution of a placement, as plain values: executors, and the time and memory that running takes."""
