"""How a device holds the weights of a linear, and how it multiplies by them."""
