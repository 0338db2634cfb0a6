"""How long to wait, and for whose sake.

What is handed down as a `timeout` is a number of seconds, None for ever, or a
PeerWatch: a timeout, beside which somebody is watched.  Whoever waits looks at
him when a slice has passed in vain, so that calls without peers pay nothing.
"""

from cpython.float cimport PyFloat_CheckExact
from libc.stdint cimport INT64_MAX, int64_t, uint64_t

from shmring._owner cimport owner_is_dead
from shmring._sync cimport monotonic_ns, sync_start

from shmring.errors import InvalidArgument

sync_start()  # _core has checked that the kernel can do it

cdef object PeerWatch = None  # imported when somebody first names peers


cdef int64_t deadline_of(object timeout) except -1:
    """The monotonic nanosecond at which a wait of `timeout` ends."""
    cdef double seconds
    if timeout is None:
        return INT64_MAX
    if not PyFloat_CheckExact(timeout) and watch_of(timeout) is not None:
        return deadline_of(timeout.timeout)
    seconds = timeout
    if not seconds >= 0:
        raise InvalidArgument(
            f"timeout={timeout!r}: a timeout is a number of seconds, 0 or more; None waits for ever"
        )
    if seconds > 1e9:
        return INT64_MAX
    return monotonic_ns() + <int64_t>(seconds * 1e9)


cdef object watching(object peers, object timeout):
    """A timeout beside which `peers` are watched."""
    global PeerWatch
    if PeerWatch is None:
        from shmring.peers import PeerWatch as imported
        PeerWatch = imported
    return PeerWatch(peers, timeout)


cdef object watch_of(object timeout):
    """The PeerWatch that stands in the place of a timeout, or None."""
    return timeout if type(timeout) is PeerWatch else None


cdef bint all_dead(object watch, uint64_t *pivot) except? True:
    """Asked once a slice: whether every one of the watched is proven dead.

    As long as the one in `pivot` lives, nobody else needs to be asked, and no
    Python is run; 0 at first.
    """
    if pivot[0] != 0 and not owner_is_dead(pivot[0]):
        return False
    if watch.all_dead():
        return True
    pivot[0] = watch.pivot
    return False
