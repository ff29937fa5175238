"""Worker processes."""

import subprocess
import sys
from concurrent.futures.process import BrokenProcessPool
from importlib import import_module
from operator import methodcaller

import pytest

from imprompt.errors import UserError
from imprompt.evaluation.workers import process_pool

pytestmark = pytest.mark.usefixtures("forked_workers")


def test_after_an_error_running_tasks_are_terminated():
    with pytest.raises(UserError, match="a mistake"), process_pool(2, import_module, "time") as processes:
        long_task = processes.submit(methodcaller("sleep", 60))
        processes.submit(methodcaller("sleep", 0)).result()
        raise UserError("a mistake")
    assert isinstance(long_task.exception(), BrokenProcessPool)


def test_every_task_gets_the_object_that_its_process_built():
    with process_pool(1, dict, a=1) as processes:
        processes.submit(dict.update, b=2).result()
        assert processes.submit(dict.copy).result() == {"a": 1, "b": 2}


def test_a_killed_process_is_reported():
    with pytest.raises(UserError, match="killed from outside"), process_pool(1, import_module, "os") as processes:
        processes.submit(methodcaller("_exit", 9)).result()


KILLED_COMMAND = """
import os, signal, time
from importlib import import_module
from operator import methodcaller
from imprompt.evaluation.workers import process_pool

if __name__ == "__main__":
    with process_pool(1, import_module, "time") as processes:
        long_task = processes.submit(methodcaller("sleep", 600))
        while not long_task.running():
            time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGKILL)
"""


def test_when_the_command_is_killed_its_processes_end(tmp_path):
    (tmp_path / "killed.py").write_text(KILLED_COMMAND)
    command = [sys.executable, tmp_path / "killed.py"]
    subprocess.run(command, stdout=subprocess.PIPE, timeout=120, check=False)  # returns when no process holds its output any more
