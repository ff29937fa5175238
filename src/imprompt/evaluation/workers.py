"""Worker processes for work that is divided into small tasks, each of which is either stored completely or done again."""

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import active_children, get_context
from typing import Any, Concatenate, Generic, ParamSpec, TypeVar

import torch

from imprompt.errors import UserError
from imprompt.models.base_pipelines import hide_loading_progress
from imprompt.utils.processes import Deferred, check_num_processes, start_worker

Worker = TypeVar("Worker")
Result = TypeVar("Result")
Arguments = ParamSpec("Arguments")


class WorkerPool(Generic[Worker]):
    """Processes that each hold one worker, an object."""

    def __init__(self, executor: ProcessPoolExecutor):
        self._executor = executor

    def submit(
        self, task: Callable[Concatenate[Worker, Arguments], Result], *args: Arguments.args, **kwargs: Arguments.kwargs
    ) -> "Future[Result]":
        """Schedule `task(worker, *args, **kwargs)` in one of the processes, such as an unbound method of the worker. Must be picklable."""
        return self._executor.submit(_run_task, task, *args, **kwargs)


@contextmanager
def process_pool(
    num_processes: int, make_worker: Callable[Arguments, Worker], *args: Arguments.args, **kwargs: Arguments.kwargs
) -> Iterator[WorkerPool[Worker]]:
    """A pool of processes, each with a worker from `make_worker(*args, **kwargs)`, which must be picklable.

    Where the block is left by an error or an interruption the processes are terminated at once: a task may take an hour. Raises
    UserError where one of them is killed from outside, and for more processes than this machine can use.
    """
    check_num_processes(num_processes)
    deferred = Deferred((_make_worker, (make_worker, args, kwargs)))
    others = set(active_children())
    with ProcessPoolExecutor(num_processes, get_context("spawn"), start_worker, (deferred,)) as executor:
        try:
            yield WorkerPool(executor)
        except BrokenProcessPool as error:
            remedy = "probably for lack of memory; the same command continues, best with fewer --num-processes"
            raise UserError(f"a process was killed from outside, {remedy}") from error
        except BaseException:
            for process in set(active_children()) - others:
                process.terminate()
            raise
        finally:
            executor.shutdown(wait=True, cancel_futures=True)


_worker: Any = None  # of a worker process


def _make_worker(make_worker: Callable[..., object], args: tuple[object, ...], kwargs: dict[str, object]) -> None:
    global _worker
    torch.set_num_threads(1)  # so that processes do not wait for each other
    hide_loading_progress()
    _worker = make_worker(*args, **kwargs)


def _run_task(task: Callable[..., Any], *args: object, **kwargs: object) -> Any:
    return task(_worker, *args, **kwargs)
