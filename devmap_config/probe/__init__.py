"""Probes this machine: its devices, memory and rates."""
