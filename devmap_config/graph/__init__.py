"""The model as data: its module tree, tensors, ties and blocks. torch is needed to make it, but not to use it."""
