"""Messages of bytes: fields and methods."""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_CheckExact, PyBytes_GET_SIZE
from libc.stdint cimport uint32_t, uint64_t

from shmring._core.area cimport Mapping
from shmring._core.handle cimport RingHandle
from shmring._core.block cimport BlockSpace
from shmring._core.ring cimport Item, Lending, Segment, Take

cdef enum:
    SMALL = 4096  # taken over the stack
    TABLE_MOST = 500  # segments whose table fits into SMALL

cdef object MOVED

# One message on its way into the ring: what it is made of, and what keeps
# that alive.
cdef class Parcel:
    cdef Item item
    cdef Segment *segments
    cdef Py_buffer *buffers
    cdef int opened
    cdef uint64_t *table
    cdef Lending lending

    cdef int pack(self, tuple encoded) except -1
    cdef int lend(self, MessageRing ring, bint patient) except -1

cdef class MessageRing(RingHandle):
    cdef bint raw  # exact bytes travel as they are

    cdef object frame_of(self, object obj, uint32_t *kind)
    cdef int put_batch(self, object objects, object block, object timeout) except -1
    cdef object take_large(self, Take *take)
    cdef object take_lent(self, Take *take)
    cdef object next_object(self, bint block, object timeout)
    cdef object decode_at(self, uint32_t kind, char *payload, uint64_t length)
    # the second half of a large take: None, or CHANGED instead of DONE, means to begin again
    cdef object take_whole(self, Take *take)
    cdef int take_into(self, Take *take) except -1

# The memory of one large buffer that came in a block; the views of it hold it.
cdef class LentBuffer:
    cdef BlockSpace *space
    cdef int index
    cdef char *data
    cdef uint64_t capacity
    cdef Py_ssize_t length
    cdef uint32_t epoch
    cdef uint64_t owner

cdef list lent_buffers(MessageRing ring, Take *take)

cdef class BytesRing(MessageRing):
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
    cdef Py_ssize_t exports  # memoryviews and arrays that look at the payload
    cdef unsigned int epoch
    cdef bint writable  # a reservation; else a lease
    cdef bint live
    cdef bint abandoned  # the block was left while exports lived
    cdef object block
    cdef object timeout
    cdef object window  # the memoryview that the block was given
    cdef object entered  # the name of the block in `blocks`, once it was entered

    cdef int take_up(self) except -1
    cdef int finish(self, bint keep) except -1
    cdef int drop(self) except -1
    cdef int let_go(self) except -1
    cdef int forget(self) except -1

cdef inline int fill_item(Item *item, Segment *segment, object encoded) except -1:
    """All of a Parcel, and of bytes all but the kind; `encoded` has to outlive the item."""
    if not PyBytes_CheckExact(encoded):
        item[0] = (<Parcel>encoded).item
        return 0
    segment.data = PyBytes_AS_STRING(encoded)
    item.length = segment.length = <uint64_t>PyBytes_GET_SIZE(encoded)
    item.segments = segment
    item.count = 1
    item.owner = 0
    item.lending = NULL
    return 0
