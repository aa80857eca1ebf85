"""Learned planners: placements as arrays, environments, and what trains on them."""
