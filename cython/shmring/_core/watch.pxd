"""What Cython sees of watch.h: the two consumers that keep a watch while others sleep longer."""

from libc.stdint cimport int64_t, uint64_t

from shmring._core.layout cimport Header

cdef extern from "watch.h" nogil:
    ctypedef struct Watch "watch_kept":
        uint64_t promise  # 0: keeps no watch

    int64_t watch_begin(Header *header, Watch *kept, int64_t now) noexcept
    void watch_hand_on(Header *header, const Watch *kept, int64_t now) noexcept
    void watch_leave(Header *header, Watch *kept) noexcept
