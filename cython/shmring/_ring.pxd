"""The map of Ring: bytes in, bytes out, and views in place."""

from libc.stdint cimport uint64_t

from shmring._area cimport Mapping
from shmring._handle cimport RingHandle

cdef class BytesRing(RingHandle):
    cdef set reserving  # the threads inside reserve(), by ident
    cdef set peeking  # the threads inside peek()

    cdef int check_reentry(self, object threads, str what) except -1

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
    cdef object thread

    cdef int finish(self, bint keep) except -1
    cdef int let_go(self) except -1
    cdef int forget(self) except -1
