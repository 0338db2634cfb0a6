"""Lifeline: a process group that ends when the process that owns it is gone.

The owner holds the only writing end of a pipe. When it dies, however it dies,
the kernel closes that end and sends SIGKILL to every group bound to a reading
end (``F_SETOWN``, ``F_SETSIG``, ``O_ASYNC``): no thread has to run for it, and
what a member of the group started ends with it.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
from multiprocessing import connection

from shmring.process.leaving import adopted_by_forks

__all__ = ["Lifeline"]

_F_SETSIG = 10  # of <fcntl.h>; the module fcntl does not name it


class Lifeline:
    """The pipe, made by the owner and handed to each process that is to end with it.

    Pickled to a child that is being started, it carries the reading end.
    """

    def __init__(self) -> None:
        self._reader, self._writer = connection.Pipe(duplex=False)
        self._owner = os.getpid()
        _owned.add(self)

    def __getstate__(self) -> connection.Connection:
        return self._reader

    def __setstate__(self, reader: connection.Connection) -> None:
        self._reader = reader
        self._owner = 0

    def bind(self) -> None:
        """Move the calling process into a group of its own that ends with the owner."""
        import fcntl

        if os.getpgrp() != os.getpid():
            with contextlib.suppress(PermissionError):  # the leader of a session
                os.setpgid(0, 0)
        # A description of its own: owner and signal belong to the description.
        fd = os.open(f"/proc/self/fd/{self._reader.fileno()}", os.O_RDONLY | os.O_NONBLOCK)
        fcntl.fcntl(fd, _F_SETSIG, signal.SIGKILL)
        fcntl.fcntl(fd, fcntl.F_SETOWN, -os.getpgrp())
        fcntl.fcntl(fd, fcntl.F_SETFL, os.O_RDONLY | os.O_NONBLOCK | os.O_ASYNC)
        if self.is_cut():  # before the signal was asked for
            os.killpg(os.getpgrp(), signal.SIGKILL)

    def is_cut(self) -> bool:
        """Whether the owner is gone."""
        poll = select.poll()
        poll.register(self._reader.fileno(), select.POLLHUP)
        return bool(poll.poll(0))

    def close(self) -> None:
        """Close both ends: what is still bound ends."""
        self._reader.close()
        if self._owner == os.getpid():
            self._writer.close()

    def _leave_to_owner(self) -> None:
        self._writer.close()


# A copy of the writing end in a forked child would keep the groups alive.
_owned = adopted_by_forks(Lifeline, "_leave_to_owner")
