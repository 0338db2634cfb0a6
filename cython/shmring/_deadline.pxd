"""The map of timeouts."""

from libc.stdint cimport int64_t, uint64_t

cdef enum:
    # sleeps between two looks at peers: whoever is to die mostly does so soon
    PEERS_FIRST_NS = 2000000
    PEERS_NS = 40000000  # PeerWatch.SLICE

cdef int64_t deadline_of(object timeout) except -1
cdef object watching(object peers, object timeout)
cdef object watch_of(object timeout)
cdef bint all_dead(object watch, uint64_t *pivot) except? True
