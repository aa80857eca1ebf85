"""A device's half: what it holds of a model, its way through a step, and what it answers beside a run."""
