"""Checkpoints in the formats of other engines. One format a file."""
