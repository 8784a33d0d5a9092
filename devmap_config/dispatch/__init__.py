"""Everything that is attached to a model to run it by a plan, in addition to accelerate's hooks."""
