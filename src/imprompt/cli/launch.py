"""The same command in several processes on this machine."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import NoReturn

_PARENT = "IMPROMPT_LAUNCHER"  # the process that launched this one


def launch(processes: int) -> int:
    """Run this very command once for each process; when one fails, all are ended, and its exit code is returned.

    The first speaks to the terminal. What the others say on standard error is kept back, and shown where they failed.
    """
    signal.signal(signal.SIGTERM, _leave)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), _PARENT: str(os.getpid())}
    shared |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    shared.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    command = [sys.executable, "-m", "imprompt", *sys.argv[1:]]
    with tempfile.TemporaryDirectory() as folder:
        logs = [Path(folder) / str(rank) for rank in range(processes)]
        running = []
        try:
            for rank, log in enumerate(logs):
                own = shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                with log.open("wb") as file:
                    running.append(subprocess.Popen(command, env=own, stderr=file if rank else None, stdout=file if rank else None))
            codes = _wait(running)
        finally:
            for process in running:
                process.terminate()
            for process in running:
                process.wait()
        failed = _culprit(codes)
        if failed is None:
            return 0
        if failed:
            sys.stderr.write(logs[failed].read_text("utf-8", errors="replace"))
        code = codes[failed] or 1
        if code < 0:
            name = signal.Signals(-code).name
            print(
                f"imprompt: process {failed} was ended by {name}; if that was not you, memory was short: smaller --batch-size",
                file=sys.stderr,
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


def _wait(running: list[subprocess.Popen[bytes]]) -> list[int | None]:
    """Exit codes when all have ended, or shortly after one has failed: the others may be about to say why."""
    while True:
        codes = [process.poll() for process in running]
        if any(codes):
            time.sleep(2)
            return [process.poll() for process in running]
        if all(code == 0 for code in codes):
            return codes
        time.sleep(0.1)


def _culprit(codes: list[int | None]) -> int | None:
    """Who failed first and foremost: one with something to say to the user, else one that was killed, else any."""
    for sort in (lambda c: c == 2, lambda c: c is not None and c < 0, bool):
        for rank, code in enumerate(codes):
            if sort(code):
                return rank
    return None


def _leave(*_: object) -> NoReturn:
    raise SystemExit(143)
