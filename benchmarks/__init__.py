"""Benchmarks: what imprompt costs in comparison with plain diffusers. Speed is a ratio within one run; nothing here passes or fails."""
