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


def check_num_processes(num_processes: int) -> None:
    """Raise UserError for more processes than this machine can use: as many as processors, or 8 where it has fewer."""
    processors = os.cpu_count() or 1
    if num_processes > max(8, processors):
        raise UserError(f"num_processes: expected at most {max(8, processors)} on {processors} processors, received {num_processes}")


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
