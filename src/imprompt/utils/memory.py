"""Memory: how much was used at the peak, and what to say when there is not enough."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from imprompt.errors import UserError, brief

_SIGNS = ("out of memory", "can't allocate memory", "not enough memory", "failed to allocate")


@contextmanager
def enough_memory(advice: str) -> Iterator[None]:
    """Within the context, running out of memory is a UserError that ends with this advice."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is a RuntimeError
        if isinstance(error, MemoryError) or any(sign in str(error).lower() for sign in _SIGNS):
            raise UserError(f"out of memory ({brief(error)}); {advice}") from error
        raise


def peak_bytes(device: torch.device) -> int:
    """Most memory used so far: of the GPU, or resident of this process. 0 where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return 0
    import sys

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
