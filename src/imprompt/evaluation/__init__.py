"""Measuring: what is compared, how it is scored, and how that is told."""
