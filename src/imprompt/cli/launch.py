"""The same command in several processes on this machine."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from imprompt.utils.processes import check_num_processes
from imprompt.utils.signals import handle_signals

_PARENT = "IMPROMPT_LAUNCHER"  # the process that launched this one
SECONDS_TO_END = 10  # of a process that is ended because another one has failed


def launch(processes: int) -> int:
    """Run this very command once for each process; when one fails, all are ended, and its exit code is returned.

    The first speaks to the terminal. What the others say on standard error is kept back, and shown where they failed. A signal
    is passed on, and a second one kills. Raises UserError for more processes than this machine can use.
    """
    check_num_processes(processes)
    command = [sys.executable, "-m", "imprompt", *sys.argv[1:]]
    with tempfile.TemporaryDirectory() as folder, _running() as group:
        logs = [Path(folder) / str(rank) for rank in range(processes)]
        for log, environment in zip(logs, _environments(processes), strict=True):
            if not group.signals:
                group.start(command, environment, log)
        codes = group.wait()
        if group.signals:
            return 128 + group.signals[0]
        group.end()
        if group.processes[0].returncode == 2:  # meanwhile it has printed what is wrong
            codes[0] = 2
        return _report(codes, logs)


def _environments(processes: int) -> Iterator[dict[str, str]]:
    """What each process finds the others with."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), _PARENT: str(os.getpid())}
    shared |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    shared.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    return (shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes))


class _Group:
    """The running processes, and the signals that were received for them."""

    def __init__(self) -> None:
        self.processes: list[subprocess.Popen[bytes]] = []
        self.signals: list[int] = []

    def start(self, command: list[str], environment: dict[str, str], log: Path) -> None:
        """Start one. In a group of its own it gets no signal of the terminal, but from here."""
        with log.open("wb") as file:
            output = file if self.processes else None
            self.processes.append(subprocess.Popen(command, env=environment, stderr=output, stdout=output, process_group=0))

    def receive(self, signum: int, frame: object) -> None:
        """Pass a signal on; kill at the second one."""
        self.signals.append(signum)
        for process in self.processes:
            process.send_signal(signum if len(self.signals) == 1 else signal.SIGKILL)

    def wait(self) -> list[int | None]:
        """Exit codes when all have ended, or shortly after one has failed: the others may be about to say why."""
        while True:
            codes = [process.poll() for process in self.processes]
            if any(codes):
                time.sleep(2)
                return [process.poll() for process in self.processes]
            if all(code == 0 for code in codes):
                return codes
            time.sleep(0.1)

    def end(self) -> None:
        """End all that still run; one that waits for another process gets no signal, and is killed."""
        for process in self.processes:
            process.terminate()
        deadline = time.monotonic() + SECONDS_TO_END
        for process in self.processes:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@contextmanager
def _running() -> Iterator[_Group]:
    """A group whose processes have ended when the context is left."""
    group = _Group()
    with handle_signals(group.receive):
        try:
            yield group
        finally:
            group.end()


def _report(codes: list[int | None], logs: list[Path]) -> int:
    """The exit code of the command; what the process that failed has printed is shown."""
    failed = _culprit(codes)
    if failed is None:
        return 0
    if failed:
        sys.stderr.write(logs[failed].read_text("utf-8", errors="replace"))
    code = codes[failed] or 1
    if code < 0:
        name = signal.Signals(-code).name
        print(
            f"imprompt: process {failed} was ended by {name}; if that was not you, memory was short: smaller --batch-size", file=sys.stderr
        )
    return code if code > 0 else 1


def watch_launcher() -> None:
    """In a process that was launched: end when the launcher is gone, so that nothing goes on writing behind its back."""
    parent = os.environ.get(_PARENT)
    if parent is None or "LOCAL_RANK" not in os.environ:
        return

    def watch() -> None:
        while os.getppid() == int(parent):
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="imprompt-watch").start()


def _culprit(codes: list[int | None]) -> int | None:
    """Who failed first and foremost: one with something to say to the user, else one that was killed, else any."""
    for sort in (lambda c: c == 2, lambda c: c is not None and c < 0, bool):
        for rank, code in enumerate(codes):
            if sort(code):
                return rank
    return None
