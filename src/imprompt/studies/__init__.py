"""Reproductions of both papers' comparisons."""
