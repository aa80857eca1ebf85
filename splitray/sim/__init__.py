"""A virtual clock that drives cost.py and queues.py: traces, arrivals, and the simulator of one slot."""
