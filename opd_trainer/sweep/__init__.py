"""Sweeps: which trials there are, how far each has come, and what they add up to."""
