"""What Cython sees of spin.h: looking for a moment before falling asleep."""

from libc.stdint cimport int64_t, uint64_t

cdef extern from "spin.h" nogil:
    const uint64_t SPIN_SLEPT_NS
    void spin_between_looks() noexcept
    bint spin_while_equal(const uint64_t *written, const uint64_t *read, bint others) noexcept
    int64_t spin_for_writing(uint64_t length) noexcept
