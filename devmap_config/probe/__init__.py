"""Finds out what this machine has, from the machine itself."""
