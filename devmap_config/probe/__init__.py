"""What this machine has, asked of the machine itself."""
