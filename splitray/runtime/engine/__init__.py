"""The caller's half: one model on a fleet of devices, the runs on it, and what is done when links or devices change."""
