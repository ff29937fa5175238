"""Helpers that do not depend on the rest of the package: files, images, HTML, plots, statistics, memory, protocols."""
