"""Everything that is attached to a model to run it by a plan, besides the hooks that accelerate attaches."""
