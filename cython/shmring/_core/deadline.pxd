"""The map of timeouts."""

from libc.stdint cimport int64_t, uint32_t, uint64_t

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
