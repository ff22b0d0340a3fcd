"""The commands of hf-prune, one a file: `arguments(parser)` says what it takes, `run(options)` does it and prints."""
