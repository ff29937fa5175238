"""The same command in several processes on this machine."""

import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def launch(processes: int) -> int:
    """Run this very command once for each process; the exit code of the first that fails, and then all are ended.

    All speak to the same terminal but the others' errors are kept back: they are shown where only they failed.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    shared |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    shared.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    command = [sys.executable, "-m", "imprompt", *sys.argv[1:]]
    with tempfile.TemporaryDirectory() as folder:
        logs = [Path(folder) / str(rank) for rank in range(processes)]
        running = []
        for rank, log in enumerate(logs):
            own = shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            with log.open("wb") as file:
                running.append(subprocess.Popen(command, env=own, stderr=file if rank else None, stdout=file if rank else None))
        try:
            failed = _wait(running)
        finally:
            for process in running:
                process.terminate()
            for process in running:
                process.wait()
        if failed is None:
            return 0
        if failed:
            sys.stderr.write(logs[failed].read_text("utf-8", errors="replace"))
        code = running[failed].returncode
        return code if code > 0 else 1


def _wait(running: list[subprocess.Popen[bytes]]) -> int | None:
    """The first process that fails, or None when all have ended well. The first one is given a moment to fail by itself."""
    while True:
        codes = [process.poll() for process in running]
        bad = [rank for rank, code in enumerate(codes) if code]
        if bad and bad[0] != 0 and codes[0] is None:
            time.sleep(2)
            return 0 if running[0].poll() else bad[0]
        if bad:
            return bad[0]
        if all(code == 0 for code in codes):
            return None
        time.sleep(0.1)
