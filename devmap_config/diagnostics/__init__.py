"""Diagnostics: what is wrong, where, and what to do next; made where the rule is, formatted here."""
