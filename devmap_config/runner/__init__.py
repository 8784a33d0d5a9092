"""Loads a model by its plan, proves that it sits where the plan says, and lets it speak."""
