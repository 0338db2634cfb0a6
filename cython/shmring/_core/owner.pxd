"""What Cython sees of owner.h: owners, and the proof of their death."""

from libc.stdint cimport uint32_t, uint64_t

cdef extern from "owner.h" nogil:
    const int OWNER_PID_BITS
    uint64_t owner_of(uint32_t pid, uint64_t start_ticks) noexcept
    uint32_t owner_pid(uint64_t owner) noexcept
    uint64_t owner_start_ticks(uint64_t owner) noexcept
    uint64_t owner_self() noexcept
    bint owner_goes_on(uint32_t tid) noexcept
    bint owner_is_dead(uint64_t owner) noexcept
