"""Processes side by side, for work that is cut into pieces, each of which is either kept whole or done again."""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import active_children, get_context, parent_process
from threading import Thread
from typing import Any

import torch

from imprompt.errors import UserError
from imprompt.models.base_pipelines import hide_progress


@contextmanager
def pool(processes: int, begin: Callable[..., None], *words: Any) -> Iterator[ProcessPoolExecutor]:
    """So many processes, each of which begins with `begin(*words)`, a function of a module.

    Where the block is left by an error or an interruption they are ended at once: a piece may take an hour. Raises UserError
    where one of them is ended from outside.
    """
    others = set(active_children())
    with ProcessPoolExecutor(processes, get_context("spawn"), _begin, (begin, words)) as made:
        try:
            yield made
        except BrokenProcessPool as error:
            remedy = "probably for want of memory; the same command goes on, best with fewer --processes"
            raise UserError(f"a process was ended from outside, {remedy}") from error
        except BaseException:
            for process in set(active_children()) - others:
                process.terminate()
            raise
        finally:
            made.shutdown(wait=True, cancel_futures=True)


def _begin(begin: Callable[..., None], words: tuple[Any, ...]) -> None:
    Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)  # so that processes do not wait for each other
    hide_progress()
    begin(*words)


def _end_with_parent() -> None:
    """A killed parent cannot end its processes; they would go on with their piece for nobody."""
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
