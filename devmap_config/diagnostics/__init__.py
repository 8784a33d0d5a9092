"""Diagnostics: findings with a place and advice. The stages make them; this package formats them."""
