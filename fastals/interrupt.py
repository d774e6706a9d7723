"""Hold signals back while a step is made, so that what their handlers raise comes where the step can be undone.

Handlers are those of Python. What :mod:`faulthandler` has put in front of one is lost when it gets its place back.
"""

import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

#: Those whose handlers raise errors, in the user's code, in a scheduler's or in torch's: that of a data loader says by
#: SIGCHLD that a worker has died.
NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT", "SIGALRM", "SIGCHLD", "SIGUSR1", "SIGUSR2")
SIGNALS = [getattr(signal, name) for name in NAMES if hasattr(signal, name)]


class _Hold:
    """Takes the signals of the main thread in place of their handlers.

    Attributes:
        open: whether they are handed on at once.
        closed: whether nothing may open it.
        ended: whether the handlers have their places back.
    """

    def __init__(self) -> None:
        self.open = self.closed = self.ended = False
        self._handlers: dict[int, Callable] = {}
        self._pending: deque[tuple[int, Any]] = deque()  # signals and frames
        self._raised: BaseException | None = None  # by the last handler

    def begin(self) -> None:
        """Take the place of the handlers that are written in Python."""
        for number in SIGNALS:
            handler = signal.getsignal(number)
            if callable(handler):
                self._handlers[number] = handler
                signal.signal(number, self._take)

    def end(self) -> None:
        """Give the handlers their places back, and hand on what has waited."""
        try:
            self._give_back()
        except BaseException:  # of a signal that has come as soon as it could
            self._give_back()
            raise
        finally:
            self.ended, self._raised = True, None
            self.hand_on()

    def hand_on(self) -> None:
        """Hand on what has waited, each signal even if the one before it raises an error."""
        while self._pending:
            number, frame = self._pending.popleft()
            try:
                self._handlers[number](number, frame)
            except BaseException:
                self.hand_on()
                raise

    def _give_back(self) -> None:
        for number, handler in self._handlers.items():
            if signal.getsignal(number) == self._take:  # or the closure has set another one, which may go on to this
                signal.signal(number, handler)

    def _take(self, number: int, frame: Any) -> None:
        within = frame is not None and frame.f_code is not let_through.__code__
        if not self.ended and not (self.open and within and not self._unwinding()):
            self._pending.append((number, frame))
            return
        try:
            self._handlers[number](number, frame)
        except BaseException as error:
            self._raised = error
            raise

    def _unwinding(self) -> bool:
        """Whether the error of a handler is on its way: another one must not disturb what it undoes."""
        error = sys.exception()
        while error is not None and error is not self._raised:
            error = error.__context__
        return error is not None


class _Here(threading.local):
    """The hold of this thread; only the main one ever gets a signal."""

    hold: _Hold | None = None


_here = _Here()


@contextmanager
def held_back() -> Iterator[None]:
    """Hold signals back inside the ``with`` block, but for what :func:`let_through` calls; hand them on after it."""
    if _here.hold is not None:
        with _shut(_here.hold, closed=_here.hold.closed):
            yield
        return
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    hold = _Hold()
    try:
        hold.begin()
        _here.hold = hold
        yield
    finally:
        _here.hold = None
        hold.end()


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Let nothing through inside the ``with`` block, which is a part of one of :func:`held_back`."""
    if _here.hold is None:
        yield
        return
    with _shut(_here.hold, closed=True):
        yield


def let_through(function: Callable, *args: Any) -> Any:
    """Call a function of the user's, which signals may interrupt; those that have waited go on waiting."""
    hold = _here.hold
    if hold is None or hold.closed:
        return function(*args)
    before = hold.open
    try:
        hold.open = True
        return function(*args)
    finally:
        hold.open = before


def hand_on() -> None:
    """Hand on the signals that have waited."""
    if _here.hold is not None and not _here.hold.closed:
        _here.hold.hand_on()


@contextmanager
def _shut(hold: _Hold, *, closed: bool) -> Iterator[None]:
    """Hold back inside the ``with`` block what the hold would hand on outside of it."""
    before = hold.open, hold.closed
    hold.open, hold.closed = False, closed
    try:
        yield
    finally:
        hold.closed = before[1]
        if before[0]:
            hold.hand_on()
            hold.open = True
