"""Processes side by side, for work that is cut into pieces."""

from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context
from typing import Any

import torch

from imprompt.errors import UserError
from imprompt.pipelines import hide_progress


@contextmanager
def pool(processes: int, begin: Callable[..., None], *words: Any) -> Iterator[ProcessPoolExecutor]:
    """So many processes, each of which begins with `begin(*words)`, a function of a module. What has not begun
    when the block is left is dropped.

    Raises UserError where one of them is ended from outside.
    """
    with ProcessPoolExecutor(processes, get_context("spawn"), _begin, (begin, words)) as made:
        try:
            yield made
        except BrokenProcessPool as error:
            remedy = "probably for want of memory; the same command goes on, best with fewer --processes"
            raise UserError(f"a process was ended from outside, {remedy}") from error
        finally:
            made.shutdown(wait=True, cancel_futures=True)


def _begin(begin: Callable[..., None], words: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)  # so that processes do not wait for each other
    hide_progress()
    begin(*words)
