"""Messages of bytes: fields and methods."""

from libc.stdint cimport uint32_t, uint64_t

from shmring._core.area cimport Mapping
from shmring._core.handle cimport RingHandle
from shmring._core.ring cimport Take

cdef enum:
    SMALL = 4096  # taken over the stack

cdef class TakingRing(RingHandle):
    cdef object next_object(self, bint block, object timeout)
    cdef object decode_at(self, uint32_t kind, char *payload, uint64_t length)
    # the second half of a large take: None, or CHANGED instead of DONE, means to begin again
    cdef object take_whole(self, Take *take)
    cdef int take_into(self, Take *take) except -1

cdef class BytesRing(TakingRing):
    # With no field of its own, Python would construct subclasses that also derive from
    # SharedHandle as mere RingHandles.
    cdef uint64_t token  # of the ring, as in its header

    cdef object check_reentry(self, bint writable, str what)
    cdef int end_lease_later(self, uint64_t position) except -1

cdef class FrameView:
    cdef BytesRing ring
    cdef Mapping *mapping  # a reference of our own: growth does not pull it away
    cdef char *payload
    cdef Py_ssize_t length
    cdef uint64_t position
    cdef Py_ssize_t shape[1]
    cdef Py_ssize_t strides[1]
    cdef Py_ssize_t exports  # memoryviews and arrays that look at the payload
    cdef unsigned int epoch
    cdef bint writable  # a reservation; else a lease
    cdef bint live
    cdef bint abandoned  # the block was left while exports lived
    cdef object block
    cdef object timeout
    cdef object window  # the memoryview that the block was given
    cdef object entered  # the name of the block in `blocks`, once it was entered

    cdef int take_up(self, object entered) except -1
    cdef int finish(self, bint keep) except -1
    cdef int drop(self) except -1
    cdef int let_go(self) except -1
    cdef int forget(self) except -1
