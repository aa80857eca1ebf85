"""Placements on two devices as arrays: every choice, its price for many instances at once, and the exact program."""
