"""The model as data: its module tree, tensors, ties and blocks; made with torch, used without it."""
