"""The map of what every user of a ring has: waiting, errors, closing."""

from libc.stdint cimport int64_t, uint32_t, uint64_t

from shmring._core.ring cimport (
    BEHIND_LEASE, BEHIND_RESERVATION, BUSY, EMPTY, FULL, FULL_COUNT, Item, RingCore, Take,
)
from shmring._core.diagnostics cimport Wait

cdef enum:
    GIL_BYTES = 65536  # copies above this size release the GIL

cdef inline bint ends_wait(int outcome) noexcept nogil:
    return outcome not in (BUSY, FULL, FULL_COUNT, EMPTY, BEHIND_LEASE, BEHIND_RESERVATION)

cdef enum:
    HOLDER_NS = 1000000000  # what an *_nowait waits for a lock at most
    # sleeps between two looks at peers: whoever is to die mostly does so soon
    PEERS_FIRST_NS = 2000000
    PEERS_NS = 40000000  # PeerPoll.SLICE

# One wait beside somebody who is watched; begins as (0, PEERS_FIRST_NS).
cdef struct Vigil:
    uint64_t pivot  # as long as this one lives, nobody else needs to be asked
    int64_t pause  # how long the next sleep may be

cdef int64_t deadline_of(object timeout) except -1
cdef object watching(object peers, object timeout)
cdef object watch_of(object timeout)
cdef int64_t slice_end(object watch, const Vigil *vigil, int64_t until) noexcept
cdef bint newly_dead(object watch, Vigil *vigil) except? True
cpdef bint set_brief(bint on) noexcept
cdef bint is_brief() noexcept nogil
cdef bint is_running(uint32_t *word) noexcept nogil

cdef class RingHandle(RingCore):
    cdef readonly bint closed
    cdef readonly uint64_t largest  # payload bytes of one message
    cdef int64_t inside  # calls that go on without the GIL
    cdef int64_t views  # views that live
    cdef uint32_t ending  # 1 close began, 2 the last call that leaves unmaps, 3 one does; an atomic
    # advice for the next put; atomics, since puts wait without the GIL
    cdef uint32_t full_seen  # why a put could not grow, and whether the log says so
    cdef uint64_t full_read  # where consumers stood when a put last met a full ring
    cdef uint64_t moved_ns  # when consumers were last seen to have moved
    cdef uint64_t slept_ns  # how long a take last slept: advice for the next, an atomic
    cdef int name_gone  # slices of a wait that found the name removed; 2, and the log says so

    # A `timeout` is a number of seconds, None for ever, or a PeerPoll.
    # how many of the items went in; fewer than `count` only when time ran out
    cdef Py_ssize_t put_or_wait(self, Item *items, Py_ssize_t count, uint64_t *position,
                                bint block, object timeout) except -1
    # DONE, PARTIAL (only the head, nothing was taken) or why nothing is there
    cdef int take_or_wait(self, Take *take, bint block, object timeout) except -1
    cdef int say_full(self) except -1
    cdef int look_for_name(self) except -1
    cdef int give_back(self) except -1
    cdef int enter(self) except -1
    cdef void leave(self) noexcept
    cdef void last_out(self) noexcept
    cdef tuple identity(self)
    cdef int check_open(self) except -1
    cdef int raise_outcome(self, int outcome) except -1
    # as raise_outcome; of a put of many, with how many went in
    cdef int raise_counted(self, int outcome, Py_ssize_t count, Py_ssize_t done) except -1
    cdef int refuse(self, int side, uint32_t state) except -1
    cdef int map_header(self) except -1
    cdef int open_areas(self) except -1
    cdef int put_behind_moving(self, Item *items, Py_ssize_t count, Py_ssize_t *done,
                               uint64_t *position) noexcept nogil
    cdef int put_slice(self, Item *items, Py_ssize_t count, Py_ssize_t *done, uint64_t *position,
                       int64_t until, Wait *wait) noexcept nogil
    cdef int put_now(self, Item *items, Py_ssize_t count, Py_ssize_t *done, uint64_t *position) noexcept nogil
    cdef int spin_and_take(self, Take *take) noexcept nogil
    cdef int take_slice(self, Take *take, int64_t until, Wait *wait) noexcept nogil
    cdef int take_now(self, Take *take) noexcept nogil
