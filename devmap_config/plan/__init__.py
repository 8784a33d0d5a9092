"""The plan: what a compilation gives, its verification, and the lock that it is deployed by."""
