"""The map of plain shared bytes, alone or behind a lock word."""

from libc.stdint cimport int64_t, uint32_t, uint64_t

# The file: a page of header, then the bytes.
cdef struct MemoryHeader:
    uint64_t magic
    uint32_t version
    uint32_t spare
    uint64_t padding[5]
    uint64_t pid_namespace  # inode of the creator's; shmring.shm.segment looks at it
    uint32_t lock  # on a line of its own

cdef class MappedFile:
    cdef char *start  # of the mapping
    cdef char *data  # behind the header
    cdef readonly uint64_t size

cdef class LockedMemory(MappedFile):
    cdef MemoryHeader *header

    cdef int copy(self, char *target, const char *source, uint64_t bytes) except -1
    cdef uint64_t check_range(self, object length, object offset) except? 0xFFFFFFFFFFFFFFFF

cdef class Words:
    cdef Py_buffer view
    cdef uint64_t *words  # NULL once released
    cdef Py_ssize_t count

    cdef uint64_t *word(self, Py_ssize_t index) except NULL

cdef class TaskWords:
    cdef Words words
    cdef Py_ssize_t started  # where in `words`
    cdef Py_ssize_t heartbeat
    cdef Py_ssize_t task
    cdef Py_ssize_t state
    cdef Py_ssize_t tasks
    cdef uint64_t idle  # values of the state
    cdef uint64_t working

    cdef int64_t stamp(self, uint64_t task) except -1
