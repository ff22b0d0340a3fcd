"""The vocabulary: which tokens texts use, a tokenizer of only those, and their ids wherever they are written."""
