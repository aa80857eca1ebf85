"""Hugging Face decoders on slices: reading checkpoints, cutting layers, the KV cache."""
