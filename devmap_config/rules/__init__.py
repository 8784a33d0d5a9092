"""Rules for parts of a model: the pattern language, its matcher, and the resolution of conflicting rules."""
