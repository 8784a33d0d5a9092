"""Runs a plan's forward on simulated accelerators, without data, weights or a real accelerator."""
