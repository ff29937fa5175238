"""Evaluation: systems, samples, metrics, and the report."""
