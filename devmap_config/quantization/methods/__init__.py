"""One method of quantization in each file of this folder, described by its `METHOD`."""
