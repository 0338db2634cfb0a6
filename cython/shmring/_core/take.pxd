"""The map of taking: one message or many."""

from libc.stdint cimport uint32_t, uint64_t

from shmring._core.ring cimport Take
from shmring._core.handle cimport RingHandle

cdef enum:
    SMALL = 4096  # taken over the stack

cdef class TakingRing(RingHandle):
    cdef object next_object(self, bint block, object timeout)
    cdef object decode_at(self, uint32_t kind, char *payload, uint64_t length)
    # the second half of a large take: None, or CHANGED instead of DONE, means to begin again
    cdef object take_whole(self, Take *take)
    cdef int take_into(self, Take *take) except -1
