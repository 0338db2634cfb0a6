"""The map of the encoder for trees of exact builtins."""

from cpython.object cimport PyObject
from libc.stdint cimport uint64_t

cdef enum:
    TREE_SHARED = 16  # objects of one tree that others hold as well
    TREE_DEPTH = 32  # containers within containers

# A tree on its way into bytes.
cdef struct Writer:
    char *start  # what was written begins here: the room that was given,
    char *at
    char *end
    bint heap  # or memory of its own, when that was too small
    int depth
    int shared_count
    PyObject *shared[TREE_SHARED]

# Encode `obj` into `room`, or into memory of its own if it needs more.  False:
# it is not such a tree, and pickle's; nothing is left to be freed.
cdef bint tree_write(Writer *writer, char *room, uint64_t room_bytes, object obj) noexcept
cdef void tree_free(Writer *writer) noexcept
# The object; DecodeError for bytes that tree_write cannot have written.
cdef object tree_read(const char *data, uint64_t length)
