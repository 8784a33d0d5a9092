"""A plan as a page and as a picture, made of what `--format json` prints of it."""
