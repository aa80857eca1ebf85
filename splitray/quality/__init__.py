"""What a channel costs in quality: measured tables of relative perplexity, and a surrogate fitted to them."""
