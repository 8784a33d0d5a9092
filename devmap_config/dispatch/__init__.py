"""What is attached to a model so that it runs as a plan says, besides what accelerate attaches by its device_map."""
