"""Quantization as transformers applies it: one file of `methods` says all that is known of a method."""
