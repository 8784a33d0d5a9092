"""The plan: the result of a compilation, its verification, and the lock that deploys it."""
