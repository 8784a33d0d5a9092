"""Loads a model by its plan, verifies that every tensor is on the planned device, and runs the model."""
