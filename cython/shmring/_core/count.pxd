"""What Cython sees of count.h: how many messages a side has counted."""

from libc.stdint cimport uint64_t

from shmring._core.layout cimport Count

cdef extern from "count.h" nogil:
    uint64_t count_at(const Count *count, uint64_t position) noexcept  # under the side's lock
    void count_on(Count *count, uint64_t position, uint64_t following, uint64_t by) noexcept
    uint64_t count_read(const Count *count, const uint64_t *position) noexcept
