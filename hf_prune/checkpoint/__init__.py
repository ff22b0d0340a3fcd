"""Checkpoints: how a config says pruned sizes, how they are built, written whole, proven, and remembered."""
