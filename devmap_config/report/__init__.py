"""Renders a plan as a page and as a picture, from the output of `--format json`."""
