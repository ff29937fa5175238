"""Helpers that know nothing of diffusion: files, images, HTML, memory, plots, statistics."""
