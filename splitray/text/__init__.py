"""Between text and token ids: decoding as early as it is certain, what ends an answer, and the chat template."""
