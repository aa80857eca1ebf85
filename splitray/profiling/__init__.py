"""Measures this machine and holds the cost model's predictions against it."""
