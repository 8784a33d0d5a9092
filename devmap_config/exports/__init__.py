"""Makes files with which another program runs a plan; what it cannot express is refused at its place in the profile."""
