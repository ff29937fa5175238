"""The equations of the papers: tensors in, tensors out. Needs torch, and jaxtyping for the shapes in signatures."""
