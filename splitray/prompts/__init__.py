"""Many prompts from a file, answered one after another into a file: for people without a server."""
