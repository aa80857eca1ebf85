"""How the small model that ships was trained: its text, tokens, batches, optimiser, loop, card and n-gram rival."""
