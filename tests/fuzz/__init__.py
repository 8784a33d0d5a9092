"""Throws made-up inputs at every way in: `make fuzz`. What ever failed is kept in `tests/corpus`, and tested."""
