"""The map of the compiled half of Queue: objects in, objects out."""

from libc.stdint cimport uint32_t, uint64_t

from shmring._core.ring cimport Item, Segment
from shmring._core.wait cimport Waiting
from shmring._core.bytes_ring cimport MessageRing

cdef class Watched:
    cdef list dicts
    cdef list seen  # their keys and values, in turn; held, so that no address is used again
    cdef object awaited

    cpdef bint changed(self) except? True
    cdef Py_ssize_t compared(self, dict entries, Py_ssize_t at) except? -2

cdef class ObjectRing(MessageRing):
    cdef object encoder  # obj -> (kind, segments); never called under a lock
    cdef object decoder  # kind, head, buffers -> obj
    cdef bint trees  # trees of exact builtins travel as builtin_codec.h writes them, past the codec

    # a pickler that is used again and again
    cdef object pickler_type
    cdef object loader
    cdef object explain_encode
    cdef object explain_decode
    cdef object dump
    cdef object clear_memo
    cdef list chunks
    cdef list buffers
    cdef Watched watched
    cdef uint32_t pickler_free

    cdef int renew_pickler(self) except -1
    cdef int make_pickler(self) except -1
    cdef object encode(self, object obj)
    cdef object encoded(self, object obj, uint32_t *kind)
    cdef object parcelled(self, object obj, uint32_t *kind, bint patient)
    cdef object decode(self, uint32_t kind, object head, object buffers)
    cdef object split(self, uint32_t kind, char *payload, uint64_t length, list lent)
    cdef Py_ssize_t put_object(self, object obj, uint64_t *position, bint block, object timeout) except -1
    cdef uint64_t due(self) noexcept nogil
    cdef uint64_t unfinished(self) noexcept nogil
    cdef int end_claim(self, uint64_t slot, bint free) except -1

cdef class JoinWait(Waiting):
    pass

cdef class HelperWait(Waiting):
    cdef Outgoing outgoing  # or None
    cdef bint data
    cdef bint may_get
    cdef bint may_put

# An encoded object that is put as often as it takes.
cdef class Outgoing:
    cdef ObjectRing ring
    cdef object encoded  # bytes, or a Parcel: keeps alive what the item points to
    cdef Segment segment
    cdef Item item
    cdef uint64_t seen  # where consumers stood before the last attempt
    cdef bint busy  # what the last attempt did not get was the lock
