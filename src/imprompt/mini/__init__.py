"""The mini model: its procedural image world, tokenizer, evaluation models and weights."""
