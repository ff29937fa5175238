"""Whether everything that should be trained is reached by the loss."""

from torch import nn


def without_gradient(module: nn.Module) -> list[str]:
    """After a backward pass: the names of the trainable tensors that received nothing. They would stay as they began."""
    return [name for name, p in module.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
