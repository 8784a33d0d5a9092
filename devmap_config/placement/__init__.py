"""Chooses a device for every tensor, within the capacities and the rules."""
