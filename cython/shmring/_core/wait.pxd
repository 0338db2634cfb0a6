"""The map of waiting on many: readiness, bells, and objects on their way in."""

from libc.stdint cimport uint32_t, uint64_t

from shmring._core.ring cimport Item, Segment, Take
from shmring._core.handle cimport RingHandle
from shmring._core.object_ring cimport ObjectRing

# Ends the sleep of one thread of this process.
cdef class Bell:
    cdef uint32_t word  # see sync.h

# An object that was encoded once and is put as often as it takes.
cdef class Outgoing:
    cdef ObjectRing ring
    cdef object encoded  # bytes, or a Parcel: keeps alive what the item points to
    cdef Segment segment
    cdef Item item
    cdef uint64_t seen  # where consumers stood before the last attempt
    cdef bint busy  # what the last attempt did not get was the lock

cdef int glance(RingHandle ring, Take *found, int flags) noexcept nogil
cdef int look(RingHandle ring, int flags) noexcept nogil
cdef bint is_ready(RingHandle ring) except -1
