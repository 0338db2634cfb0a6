"""What Cython sees of frame.h: the head of a frame."""

from libc.stdint cimport uint32_t, uint64_t

from shmring._core.layout cimport Frame

cdef extern from "frame.h" nogil:
    void frame_begin(Frame *frame, uint64_t position, uint64_t length, uint32_t kind,
                     uint32_t state, uint64_t owner) noexcept
    bint frame_is_possible(const Frame *frame, uint64_t length, uint64_t position,
                           uint64_t capacity, uint64_t limit) noexcept
