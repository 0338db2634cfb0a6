"""What Cython sees of _spin.h: looking for a moment before falling asleep."""

from libc.stdint cimport uint64_t

cdef extern from "_spin.h" nogil:
    const uint64_t SPIN_SLEPT_NS
    bint spin_while_equal(const uint64_t *written, const uint64_t *read) noexcept
