"""Training recipes for the learned placement policy."""
