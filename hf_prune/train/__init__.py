"""Training: rounds of cut, repair and training in a transformers Trainer."""
