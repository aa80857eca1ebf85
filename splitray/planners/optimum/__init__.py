"""The action space of our own planners as tables, and the searches and bounds over it."""
