"""How long to wait, and for whose sake.

What is handed down as a `timeout` is a number of seconds, None for ever, or a
PeerPoll: a timeout, beside which somebody is watched.  Whoever waits looks at
him when a slice has passed in vain, so that calls without peers pay nothing.
"""

from cpython.float cimport PyFloat_CheckExact
from libc.stdint cimport INT64_MAX, int64_t, uint32_t

from shmring._core.owner cimport owner_goes_on, owner_is_dead, owner_of
from shmring._core.sync cimport load_relaxed32, lock_owner, monotonic_ns, sync_start

from shmring.errors import InvalidArgument

sync_start()  # _core has checked that the kernel can do it

cdef extern from *:
    """
    static __thread int shmring_brief;
    """
    int brief "shmring_brief"  # of this thread, see set_brief

cdef object PeerPoll = None  # imported when somebody first names peers


cdef int64_t deadline_of(object timeout) except -1:
    """The monotonic nanosecond at which a wait of `timeout` ends."""
    cdef double seconds
    if timeout is None:
        return INT64_MAX
    if not PyFloat_CheckExact(timeout) and watch_of(timeout) is not None:
        return deadline_of(timeout.timeout)
    seconds = timeout
    if not seconds >= 0:
        if not seconds < 0:
            raise InvalidArgument(f"timeout={timeout!r}: a number of seconds, or None to wait for ever")
        seconds = 0  # a deadline that has passed, as in shmring.deadline
    if seconds > 1e9:
        return INT64_MAX
    return monotonic_ns() + <int64_t>(seconds * 1e9)


cdef object watching(object peers, object timeout):
    """A timeout beside which `peers` are watched."""
    global PeerPoll
    if PeerPoll is None:
        from shmring.process.peers import PeerPoll as imported
        PeerPoll = imported
    return PeerPoll(peers, timeout)


cdef object watch_of(object timeout):
    """The PeerPoll that stands in the place of a timeout, or None."""
    return timeout if type(timeout) is PeerPoll else None


cdef int64_t slice_end(object watch, const Vigil *vigil, int64_t until) noexcept:
    """When the next sleep ends at the latest."""
    return until if watch is None else min(until, monotonic_ns() + vigil.pause)


cdef bint newly_dead(object watch, Vigil *vigil) except? True:
    """Asked once a slice: whether every one of the watched is now proven dead, and was not before.

    No Python is run as long as the pivot lives.  Whoever is told so looks once
    more, because what the dead committed came before their death.
    """
    if not watch.proven and (vigil.pivot == 0 or owner_is_dead(vigil.pivot)):
        if watch.all_dead():
            vigil.pause = 0
            return True
        pid, start_ticks = watch.living_peer
        vigil.pivot = owner_of(pid, start_ticks)
    vigil.pause = min(2 * vigil.pause + PEERS_FIRST_NS, PEERS_NS)
    return False


cpdef bint set_brief(bint on) noexcept:
    """Whether this thread's *_nowait calls wait for a lock a few milliseconds at most: on an event
    loop, which stands still meanwhile.  Returns what was before."""
    global brief
    cdef bint before = brief != 0
    brief = on
    return before


cdef bint is_brief() noexcept nogil:
    return brief != 0


cdef bint is_running(uint32_t *word) noexcept nogil:
    """Whether a lock's holder only needs a CPU: neither stopped nor gone.  Then even an *_nowait waits."""
    cdef uint32_t holder = lock_owner(load_relaxed32(word))
    return holder == 0 or owner_goes_on(holder) or lock_owner(load_relaxed32(word)) != holder
