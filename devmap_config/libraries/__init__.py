"""What is used of torch, transformers and accelerate without a promise that it stays: one adapter for each library.

Nothing of theirs that is private, or that their documentation does not speak of, is named outside of this package.
`docs/libraries.md` lists it.
"""
