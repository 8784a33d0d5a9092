"""Fuzzing of every way in with generated inputs: `make fuzz`.

Inputs that once failed are kept in `tests/corpus` and tested.
"""
