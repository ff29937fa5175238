"""SIGINT, SIGTERM and SIGHUP: they end a command with one sentence and the exit code 128 + signal. Standard library only."""

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
Handler = Callable[[int, FrameType | None], object]


class Interrupted(KeyboardInterrupt):
    """A signal that ends the command; `text` is the rest of the sentence."""

    def __init__(self, signum: int = signal.SIGINT, text: str = ""):
        super().__init__(text)
        self.signum, self.text = signum, text


def raise_on_signals() -> None:
    """From now on, signals raise Interrupted in the main thread. One that is ignored, as under nohup, stays so."""
    _set_handlers(_raise)


def restore_signals() -> None:
    """From now on, signals end the process without a word."""
    _set_handlers(signal.SIG_DFL)


def _raise(signum: int, frame: FrameType | None) -> NoReturn:
    raise Interrupted(signum)


def _set_handlers(handler: Handler | signal.Handlers) -> dict[int, object]:
    """Set the handler of all signals; those that they had."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    return {signum: signal.signal(signum, handler) for signum in SIGNALS if signal.getsignal(signum) != signal.SIG_IGN}


@contextmanager
def handle_signals(handler: Handler) -> Iterator[None]:
    """Within the context, signals call this handler."""
    previous = _set_handlers(handler)
    try:
        yield
    finally:
        for signum, old in previous.items():
            signal.signal(signum, old)  # type: ignore[arg-type]


class StopRequest:
    """Within `requests()`, the first signal only asks to stop, and the second one raises Interrupted."""

    def __init__(self) -> None:
        self.signum = 0  # of the signal that was received

    def __bool__(self) -> bool:
        return self.signum != 0

    @contextmanager
    def requests(self) -> Iterator[None]:
        """The context in which signals are requests."""
        with handle_signals(self._receive):
            yield

    def _receive(self, signum: int, frame: FrameType | None) -> None:
        if self.signum:
            raise Interrupted(signum)
        self.signum = signum


@contextmanager
def explain_interrupt(text: str) -> Iterator[None]:
    """Within the context, the sentence of a signal ends with this text, unless it has one."""
    try:
        yield
    except KeyboardInterrupt as error:
        raise Interrupted(getattr(error, "signum", signal.SIGINT), getattr(error, "text", "") or text) from error


def report_interrupt(error: KeyboardInterrupt) -> int:
    """Print the sentence of an interrupt; the exit code."""
    signum, text = getattr(error, "signum", signal.SIGINT), getattr(error, "text", "")
    what = "interrupted" if signum == signal.SIGINT else f"ended by {signal.Signals(signum).name}"
    print(f"imprompt: {what}" + (f"; {text}" if text else ""), file=sys.stderr)
    return 128 + signum
