"""Uses of private parts of torch, transformers and accelerate, with one adapter for each library.

Nothing that is private in them, or missing in their documentation, is used outside of this package. `docs/libraries.md`
lists these uses.
"""
