"""Files by which another program runs a plan, as texts; what it cannot express is refused where the profile asks it."""
