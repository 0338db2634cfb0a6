"""Waiting: fields and methods."""

from libc.stdint cimport int64_t, uint32_t, uint64_t

from shmring._core.diagnostics cimport Wait
from shmring._core.handle cimport RingHandle
from shmring._core.ring cimport Item, Take
from shmring._core.watch cimport Watch

# One wait of one thread.
cdef class Waiting:
    cdef RingHandle ring  # None while several rings are waited for
    cdef bint block  # else only the lock is waited for, while its owner runs
    cdef int64_t pause_ns  # the longest sleep
    cdef int64_t asked_ns  # how long the last sleep was to be,
    cdef int64_t slept_ns  # and how long it was
    # the wait words slept on
    cdef int count
    cdef uint32_t **words
    cdef uint32_t *announced
    cdef uint32_t *own_words[2]
    cdef uint32_t own_announced[2]
    cdef uint32_t *bell  # or NULL
    cdef uint32_t *lock  # the lock word that an attempt takes
    # diagnostics
    cdef Wait record
    cdef uint32_t reason
    # peer polling
    cdef uint64_t living  # an owner: while it lives, no other peer needs to be asked
    cdef object missing  # what PeerDied says did not come
    cdef Py_ssize_t done  # how many messages went in

    cdef int start(self, RingHandle ring, uint32_t call, uint32_t reason, uint32_t *word) except -1
    cdef int run(self, int64_t until, object peers) except? -1
    cdef int slice(self, int64_t until) noexcept nogil
    cdef bint is_over(self, int result, int64_t until) noexcept
    cdef bint newly_dead(self, object peers) except? True
    cdef void show(self, uint32_t reason) noexcept nogil
    cdef void hide(self) noexcept nogil
    # what a subclass defines
    cdef int prepare(self) noexcept nogil
    cdef int look(self, bint woken) noexcept nogil
    cdef int64_t longest(self, int result, int64_t now) noexcept nogil
    cdef int between(self, int result) except -1
    cdef void end(self, int result) noexcept

cdef class PutWait(Waiting):
    cdef Item *items
    cdef Py_ssize_t item_count
    cdef uint64_t *position

    cdef int attempt(self, int flags) noexcept nogil
    cdef bint is_waiting_for_memory(self, int result) noexcept nogil
    cdef int put_behind_moving(self) noexcept nogil

cdef class TakeWait(Waiting):
    cdef Take *take
    cdef Watch watch

    cdef int attempt(self, int flags) noexcept nogil
    cdef int spin(self) noexcept nogil

cdef class AnyWait(Waiting):
    cdef list rings
    cdef list ready
    cdef Wait *records
    cdef int64_t names_checked_ns

    cdef int look_at_all(self, bint woken) noexcept
    cdef void show_all(self, uint32_t reason) noexcept
    cdef void hide_all(self) noexcept

# Ends the sleep of one thread of this process.
cdef class Bell:
    cdef uint32_t word  # see sync.h

# A `timeout` is a number of seconds, None for ever, or a PeerPoll.
cdef int64_t deadline_of(object timeout) except -1
cdef object with_peers(object peers, object timeout)
cpdef bint set_brief(bint on) noexcept
cdef bint is_brief() noexcept nogil
# How many of the items went in, fewer than `count` only when time ran out; `done` also after an error.
cdef Py_ssize_t put_or_wait(RingHandle ring, Item *items, Py_ssize_t count, Py_ssize_t *done,
                            uint64_t *position, bint block, object timeout) except -1
# DONE, PARTIAL (only the head, nothing was taken) or why nothing is there.
cdef int take_or_wait(RingHandle ring, Take *take, bint block, object timeout) except -1
cdef bint is_ready(RingHandle ring) noexcept
cdef void shrink_idle(RingHandle ring, Waiting wait) noexcept nogil
cdef int check_name(RingHandle ring) except -1
