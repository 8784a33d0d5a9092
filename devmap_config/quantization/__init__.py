"""Quantization as transformers applies it: each file of `methods` describes one method."""
