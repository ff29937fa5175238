"""Processes side by side."""

import os
import time
from concurrent.futures.process import BrokenProcessPool

import pytest

from imprompt.errors import UserError
from imprompt.evaluate.pool import pool


def test_after_a_mistake_nobody_is_waited_for():
    with pytest.raises(UserError, match="a mistake"), pool(2, time.sleep, 0) as processes:
        hour = processes.submit(time.sleep, 60)
        processes.submit(time.sleep, 0).result()
        raise UserError("a mistake")
    assert isinstance(hour.exception(), BrokenProcessPool)


def test_a_process_that_was_killed_is_said():
    with pytest.raises(UserError, match="ended from outside"), pool(1, time.sleep, 0) as processes:
        processes.submit(os._exit, 9).result()
