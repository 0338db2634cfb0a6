"""The map of what every user of a ring has: waiting, errors, closing."""

from libc.stdint cimport int64_t, uint32_t, uint64_t

from shmring._core.ring cimport (
    BEHIND_LEASE, BEHIND_RESERVATION, BUSY, EMPTY, FULL, FULL_COUNT, RingCore,
)

cdef enum:
    GIL_BYTES = 65536  # copies above this size release the GIL

cdef inline bint ends_wait(int outcome) noexcept nogil:
    return outcome not in (BUSY, FULL, FULL_COUNT, EMPTY, BEHIND_LEASE, BEHIND_RESERVATION)

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

    cdef int give_back(self) except -1
    cdef int enter(self) except -1
    cdef void leave(self) noexcept
    cdef void last_out(self) noexcept
    cdef int check_open(self) except -1
    cdef int raise_outcome(self, int outcome) except -1
    cdef int visit_lock(self, int side, uint32_t shutdown) except -1
    cdef int map_header(self) except -1
    cdef int open_areas(self) except -1

ctypedef object (*Question)(RingHandle ring)

cdef object inside(RingHandle ring, Question question)
cdef object identity_of(RingHandle ring)
