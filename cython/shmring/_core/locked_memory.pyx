"""Plain shared bytes, copied in and out under a lock word that stands beside them.

The lock survives its owner: after a kill inside `write` the bytes may be half
old and half new (there is no message to be whole), but no process is blocked.
"""

cimport cython
from cpython.buffer cimport (
    PyBUF_CONTIG_RO, PyBUF_WRITABLE, PyBuffer_FillInfo, PyBuffer_Release, PyObject_GetBuffer,
)
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from cpython.exc cimport PyErr_CheckSignals
from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.string cimport memcpy

from shmring._core.sync cimport (
    LOCK_BUSY, LOCK_GARBAGE, SYNC_SLICE_NS, load_acquire64, lock_release, lock_wait, monotonic_ns,
    store_release64, sync_start,
)

import operator
import os

from shmring.errors import InvalidArgument, LayoutMismatch, RingCorrupted

cdef extern from "<sys/mman.h>" nogil:
    void *mmap(void *address, size_t length, int protection, int flags, int fd, long offset)
    int munmap(void *address, size_t length)
    const int PROT_READ
    const int PROT_WRITE
    const int MAP_SHARED
    void *MAP_FAILED

cdef enum:
    PAGE = 4096

cdef uint32_t VERSION = 1

MEMORY_HEADER_BYTES = PAGE

sync_start()


@cython.binding(False)
cdef class MappedFile:
    """A mapping of `size` bytes of a file behind `header_bytes` of header, as a buffer.

    It lives as long as this object, and so as long as any array made from it,
    and keeps no descriptor, unlike mmap.mmap, which would close its own one
    although another file may have got the number.
    """

    def __cinit__(self, int fd, uint64_t size, uint64_t header_bytes=0, uint64_t magic=0):
        cdef void *start
        found = os.fstat(fd).st_size
        if found < header_bytes + size:
            raise InvalidArgument(
                f"the block has {max(0, found - header_bytes)} bytes of data, size={size} were asked for")
        start = mmap(NULL, header_bytes + size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0)
        if start == MAP_FAILED:
            raise MemoryError(f"{size} bytes of shared memory could not be mapped")
        self.start = <char *>start
        self.data = self.start + header_bytes
        self.size = size

    def __dealloc__(self):
        if self.start != NULL:
            munmap(self.start, (self.data - self.start) + self.size)

    def __getbuffer__(self, Py_buffer *buffer, int flags):
        PyBuffer_FillInfo(buffer, self, self.data, <Py_ssize_t>self.size, 0, flags)


@cython.binding(False)
cdef class LockedMemory(MappedFile):
    """A block of `size` bytes behind a page of header, in which its lock stands.

    Supports the buffer protocol, without the lock.
    """

    def __cinit__(self, int fd, uint64_t size, uint64_t header_bytes, uint64_t magic):
        self.header = <MemoryHeader *>self.start
        if self.header.magic != magic or self.header.version != VERSION:
            raise LayoutMismatch(
                f"not a block of SharedMemoryManager: it begins with {self.header.magic:#018x}, version"
                f" {self.header.version}; expected {magic:#018x}, version {VERSION}"
            )

    cdef uint64_t check_range(self, object length, object offset) except? 0xFFFFFFFFFFFFFFFF:
        """Return the offset, if [offset, offset + length) lies inside; both are exact ints."""
        if length < 0 or offset < 0 or offset + length > self.size:
            raise InvalidArgument(
                f"offset={offset}, length={length}: the block has bytes 0 to {self.size}"
            )
        return offset

    cdef int copy(self, char *target, const char *source, uint64_t bytes) except -1:
        cdef int result = LOCK_BUSY
        while result == LOCK_BUSY:
            with nogil:
                result = lock_wait(&self.header.lock, SYNC_SLICE_NS)
                if result != LOCK_BUSY and result != LOCK_GARBAGE:
                    memcpy(target, source, bytes)
                    lock_release(&self.header.lock)
            PyErr_CheckSignals()
        if result == LOCK_GARBAGE:
            raise RingCorrupted("the lock word names a thread that does not exist; create the block anew")
        return 0

    def write(self, data, offset=0):
        """Copy a contiguous bytes-like object to `offset`, under the lock."""
        cdef Py_buffer buffer
        cdef uint64_t at
        PyObject_GetBuffer(data, &buffer, PyBUF_CONTIG_RO)
        try:
            at = self.check_range(buffer.len, operator.index(offset))
            self.copy(self.data + at, <char *>buffer.buf, <uint64_t>buffer.len)
        finally:
            PyBuffer_Release(&buffer)

    def read(self, length, offset=0):
        """Copy `length` bytes from `offset`, under the lock."""
        cdef uint64_t at
        length = operator.index(length)  # once: an object may answer otherwise the second time
        at = self.check_range(length, operator.index(offset))
        taken = PyBytes_FromStringAndSize(NULL, length)
        self.copy(PyBytes_AS_STRING(taken), self.data + at, <uint64_t>len(taken))
        return taken


@cython.binding(False)
cdef class Words:
    """Words of eight bytes in a writable buffer: every load acquires, every store releases.

    Args:
        buffer: contiguous, writable, a whole number of words.
    """

    def __cinit__(self, buffer):
        PyObject_GetBuffer(buffer, &self.view, PyBUF_WRITABLE)
        if self.view.len % 8 != 0 or <size_t>self.view.buf % 8 != 0:
            PyBuffer_Release(&self.view)
            raise InvalidArgument(f"a buffer of {self.view.len} bytes is no row of aligned words")
        self.words = <uint64_t *>self.view.buf
        self.count = self.view.len // 8

    def __dealloc__(self):
        if self.words != NULL:
            PyBuffer_Release(&self.view)

    cdef uint64_t *word(self, Py_ssize_t index) except NULL:
        if self.words == NULL:
            raise ValueError("the words have been released")
        if not 0 <= index < self.count:
            raise IndexError(f"word {index} of {self.count}")
        return self.words + index

    @cython.critical_section
    def __getitem__(self, Py_ssize_t index):
        return load_acquire64(self.word(index))

    @cython.critical_section
    def __setitem__(self, Py_ssize_t index, uint64_t value):
        store_release64(self.word(index), value)

    @cython.critical_section
    def copy(self, Py_ssize_t start, Py_ssize_t count):
        """The bytes of `count` words from `start` on, loaded one by one in this order."""
        cdef Py_ssize_t i
        cdef uint64_t *out
        self.word(start + count - 1)
        copied = PyBytes_FromStringAndSize(NULL, 8 * count)
        out = <uint64_t *>PyBytes_AS_STRING(copied)
        for i in range(count):
            out[i] = load_acquire64(self.word(start + i))
        return copied

    @cython.critical_section
    def release(self):
        """Let go of the buffer; any later use is a ValueError."""
        if self.words != NULL:
            self.words = NULL
            PyBuffer_Release(&self.view)


@cython.binding(False)
cdef class TaskWords:
    """The words of a slot that a worker stores for every call.

    Args:
        words: of the registry.
        places: the indices of: task started (ns), heartbeat (ns), task, state, tasks done.
        idle: the state of a worker without a task.
        working: the state of one with a task.
    """

    def __cinit__(self, Words words, places, uint64_t idle, uint64_t working):
        self.words = words
        self.started, self.heartbeat, self.task, self.state, self.tasks = places
        self.idle = idle
        self.working = working

    cdef int64_t stamp(self, uint64_t task) except -1:
        cdef int64_t now = monotonic_ns()
        with cython.critical_section(self.words):
            store_release64(self.words.word(self.started), <uint64_t>now)
            store_release64(self.words.word(self.heartbeat), <uint64_t>now)
            store_release64(self.words.word(self.task), task)
        return now

    def begin(self, uint64_t task):
        """Say that a task begins; `task` as it stands in the word."""
        with cython.critical_section(self.words):
            self.stamp(task)
            store_release64(self.words.word(self.state), self.working)

    def end(self, uint64_t calls):
        """Say that nothing is being done, and that so many more calls are done."""
        cdef uint64_t *tasks
        with cython.critical_section(self.words):
            tasks = self.words.word(self.tasks)
            store_release64(self.words.word(self.task), 0)
            store_release64(self.words.word(self.state), self.idle)
            store_release64(self.words.word(self.heartbeat), <uint64_t>monotonic_ns())
            store_release64(tasks, load_acquire64(tasks) + calls)

    def call_each(self, function, tuple items, list values, uint64_t task, uint64_t step, bint spread, int64_t span):
        """Call `function` for items and append what it returns, storing which is being done.

        Args:
            items: arguments; with `spread` each is a tuple of them.
            values: results of the first items; what follows is called.
            task: the word of the task for the first item.
            step: what is added to it for each item.
            span: return after the first call that ends so many nanoseconds from now.
        """
        cdef Py_ssize_t first = len(values)
        cdef Py_ssize_t count = len(items)
        cdef Py_ssize_t i
        cdef int64_t now, until = 0
        for i in range(first, count):
            now = self.stamp(task + step * <uint64_t>i)
            if i == first:
                until = now + span
            elif now >= until:
                return
            item = items[i]
            values.append(function(*item) if spread else function(item))


cdef extern from *:
    """
    #include <stdlib.h>
    #ifdef __GLIBC__
    #include <malloc.h>
    static void shmring_keep_freed(int bytes)
    {
        mallopt(M_MMAP_THRESHOLD, bytes / 4);
        mallopt(M_TRIM_THRESHOLD, bytes);
    }
    #else
    static void shmring_keep_freed(int bytes) { (void)bytes; }
    #endif
    """
    void shmring_keep_freed(int bytes) noexcept


def keep_freed_memory(int nbytes):
    """Let this process keep up to so much freed memory: fresh pages cost more than copying into them."""
    shmring_keep_freed(nbytes)
