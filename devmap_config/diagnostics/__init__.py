"""Diagnostics: findings with a place and advice. They are made by the stages; the formats are here."""
