"""What Cython sees of diagnostics.h: records of waiters, lock owners and deaths."""

from libc.stdint cimport uint32_t, uint64_t

from shmring._core.layout cimport Header

cdef extern from "diagnostics.h" nogil:
    const uint32_t CALL_GET
    const uint32_t CALL_PEEK
    const uint32_t CALL_PUT
    const uint32_t CALL_RESERVE
    const uint32_t CALL_JOIN
    const uint32_t CALL_WAIT
    const uint32_t CALL_AIO
    const uint32_t FOR_MESSAGE
    const uint32_t FOR_ROOM
    const uint32_t FOR_LOCK
    const uint32_t FOR_LEASE
    const uint32_t FOR_RESERVATION
    const uint32_t FOR_TASKS
    const int HELD_PRODUCER_LOCK
    const int HELD_CONSUMER_LOCK
    const int HELD_RESERVATION
    const int HELD_LEASE

    # One wait of one thread on one ring.
    ctypedef struct Wait "waiter_wait":
        uint32_t call
        int turn  # how many slices it has waited
        int slot  # its record plus 1, or 0

    void waiter_show(Header *header, Wait *wait, uint64_t owner, uint32_t reason) noexcept
    void waiter_hide(Header *header, Wait *wait, uint64_t owner) noexcept
    void death_record(Header *header, int held, uint32_t pid) noexcept
    # of a lock word
    void holder_show(uint32_t *word) noexcept  # by a thread that has tried for it
    void holder_hide(uint32_t *word) noexcept
    uint32_t holder_pid(const uint32_t *word) noexcept  # pid, or 0

    void user_show(uint32_t *word) noexcept  # of last_producer and last_consumer
