"""Models, tokenizers and texts by name, as batches."""
