"""Processes: how many a machine can use, and the start of those that work for this one. Standard library only."""

import os
import signal
import threading
from collections.abc import Callable
from multiprocessing import parent_process
from multiprocessing.reduction import ForkingPickler
from pickle import loads
from typing import Any

from imprompt.errors import UserError

MIN_ADDRESS_SPACE = 1_500_000_000  # bytes


def check_num_processes(num_processes: int) -> None:
    """Raise UserError for more processes than this machine can use: as many as processors, or 8 where it has fewer."""
    processors = os.cpu_count() or 1
    if num_processes > max(8, processors):
        raise UserError(f"num_processes: expected at most {max(8, processors)} on {processors} processors, received {num_processes}")


def check_memory_limit() -> None:
    """Raise UserError where this process may use less address space than the libraries need to start: they would end it without a word."""
    try:
        import resource
    except ImportError:  # Windows
        return
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY and limit < MIN_ADDRESS_SPACE:
        raise UserError(
            f"this process may use {limit / 1e9:.1f} GB of memory (ulimit -v); expected at least {MIN_ADDRESS_SPACE / 1e9:g} GB, "
            "which the libraries need to start"
        )


class Deferred:
    """A value that is unpickled when it is asked for, so that a process can begin before it has imported what the value needs."""

    def __init__(self, value: Any):
        self.value = value

    def __reduce__(self) -> tuple[Callable[[bytes], "Deferred"], tuple[bytes]]:
        return Deferred, (bytes(ForkingPickler.dumps(self.value)),)

    def load(self) -> Any:
        """The value, in the process that received it; a forked one received it as it was."""
        return loads(self.value) if isinstance(self.value, bytes) else self.value


def start_worker(deferred: Deferred) -> None:
    """Begin a worker process: it ends with its parent, which alone is interrupted; then call the function with its arguments."""
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    function, arguments = deferred.load()
    function(*arguments)


def _exit_with_parent() -> None:
    """End this process when its parent does: a killed parent cannot terminate it, and it would go on with its task."""
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
