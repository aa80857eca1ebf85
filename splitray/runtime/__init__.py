"""The split engine at work: devices, the wire between them, and the caller that starts runs."""
