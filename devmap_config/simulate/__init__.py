"""Runs a plan's forward on simulated accelerators: no data, no weights, no accelerator."""
