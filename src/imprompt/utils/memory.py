"""Memory: the peak that was used, and the error for running out of it."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from imprompt.errors import UserError, summarize_error

_OOM_PHRASES = ("out of memory", "can't allocate memory", "not enough memory", "failed to allocate")


@contextmanager
def explain_oom(advice: str) -> Iterator[None]:
    """Within the context, running out of memory raises a UserError that ends with this advice."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is a RuntimeError
        if isinstance(error, MemoryError) or any(phrase in str(error).lower() for phrase in _OOM_PHRASES):
            raise UserError(f"out of memory ({summarize_error(error)}); {advice}") from error
        raise


def peak_memory_bytes(device: torch.device) -> int:
    """The peak of memory used so far, in bytes: of the GPU, or resident in this process. 0 where the system does not report it."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return 0
    import sys

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
