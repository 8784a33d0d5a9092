"""Decides where every tensor goes, within capacities and the rules that hold."""
