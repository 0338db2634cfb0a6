"""Ctrl-C and other signals, kept from steps that must not be left half done."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import TypeVar

__all__ = ["interrupts_held", "interrupts_put_off", "without_interrupts"]

T = TypeVar("T")


@contextlib.contextmanager
def interrupts_held() -> Iterator[None]:
    """Block Ctrl-C in this thread, and in what it starts.

    A worker that inherits it cannot die of Ctrl-C before it has learnt to ignore it.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def interrupts_put_off() -> Iterator[None]:
    """Have the handler of Ctrl-C run after the block, not in it.

    To block the signal is not enough: another thread may receive it, and then the
    handler runs in the main thread all the same.
    """
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield
        return
    noted: list[int] = []
    signal.signal(signal.SIGINT, lambda number, _: noted.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if noted:
            signal.raise_signal(signal.SIGINT)


def without_interrupts(call: Callable[[], T]) -> T:
    """Run a call where no signal handler can raise in the middle of it.

    Handlers run in the main thread alone: there the call gets a thread of its own, in
    which it goes on if a handler raises here.
    """
    if threading.current_thread() is not threading.main_thread():
        return call()
    outcome: Future[T] = Future()

    def run() -> None:
        try:
            outcome.set_result(call())
        except BaseException as error:
            outcome.set_exception(error)

    try:
        threading.Thread(target=run, name="shmring-uninterrupted").start()
    except RuntimeError:  # the interpreter is ending
        return call()
    return outcome.result()
