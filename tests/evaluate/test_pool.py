"""Processes side by side."""

import os
import subprocess
import sys
import time
from concurrent.futures.process import BrokenProcessPool

import pytest

from imprompt.errors import UserError
from imprompt.evaluation.workers import pool


def test_after_a_mistake_nobody_is_waited_for():
    with pytest.raises(UserError, match="a mistake"), pool(2, time.sleep, 0) as processes:
        hour = processes.submit(time.sleep, 60)
        processes.submit(time.sleep, 0).result()
        raise UserError("a mistake")
    assert isinstance(hour.exception(), BrokenProcessPool)


def test_a_process_that_was_killed_is_said():
    with pytest.raises(UserError, match="ended from outside"), pool(1, time.sleep, 0) as processes:
        processes.submit(os._exit, 9).result()


KILLED = """
import os, signal, time
from imprompt.evaluation.workers import pool

if __name__ == "__main__":
    with pool(1, time.sleep, 0) as processes:
        hour = processes.submit(time.sleep, 600)
        while not hour.running():
            time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGKILL)
"""


def test_when_the_command_is_killed_nobody_goes_on(tmp_path):
    (tmp_path / "killed.py").write_text(KILLED)
    command = [sys.executable, tmp_path / "killed.py"]
    subprocess.run(command, stdout=subprocess.PIPE, timeout=120, check=False)  # comes back when nobody holds its output any more
