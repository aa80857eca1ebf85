"""One token of one sequence on numpy views of the very weights that HF's modules hold: norms, attention, FFNs, loop."""
