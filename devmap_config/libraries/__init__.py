"""Uses of torch, transformers and accelerate that those do not promise to keep, in one adapter for each library.

Nothing that is private in them, or missing in their documentation, is named outside of this package.
`docs/libraries.md` lists all of it.
"""
