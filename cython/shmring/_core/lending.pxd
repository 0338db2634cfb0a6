"""Lending: blocks of the ring taken, made, adopted and given up (block.h).

As fast_path.pxd, all of it is compiled into the callers.
"""

from libc.errno cimport EILSEQ
from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.string cimport memcpy

from shmring._core.block cimport (
    BLOCK_IDLE_NS, BLOCK_REFUSED_NS, block_any_idle, block_check, block_create, block_drop_idle,
    block_last_return, block_lend, block_make_records, block_reap_sometimes, block_space_keep,
    block_take,
)
from shmring._core.layout cimport (
    SHMRING_SEGMENT_INDEX_SHIFT, SHMRING_SEGMENT_LENGTH, SHMRING_SEGMENT_LENT, Header,
)
from shmring._core.ring cimport (
    BRIEFLY, DONE, LENT, LENT_MOST, MAY_WAIT, POISON_AREA, POISON_FRAME, RingCore, Take,
)
from shmring._core.sync cimport (
    SYNC_SLICE_NS, load_relaxed32, load_relaxed64, monotonic_ns, store_relaxed64, wait_announce, wait_sleep,
)

cdef enum:
    BLOCK_PAUSE_NS = 1000000  # what a put waits for a block, and a nanosecond a byte
    BLOCK_SLEEP_NS = 100000


cdef inline int take_block(RingCore ring, uint64_t bytes, bint patient) noexcept nogil:
    """The index of a block that this process holds now; negative if the buffer is to be copied.

    Where blocks come back, a patient producer waits for one rather than make
    another: as with a ring that stays small, fresh memory is cold.
    """
    cdef Header *h = ring.header
    cdef uint64_t returned
    cdef int index = -1
    if bytes > h.max_capacity // 2 or load_relaxed32(&h.poisoned) != 0:
        return -1
    if ring.space != NULL:
        index = block_take(ring.space, ring.myself(), bytes)
        if index < 0 and patient:
            returned = block_last_return(ring.space, bytes)
            if returned != 0:
                index = await_block(ring, bytes)
            if returned != 0 and index < 0:
                store_relaxed64(&ring.space.vain_ns, returned)
    if index < 0:
        index = make_block(ring, bytes, MAY_WAIT if patient else BRIEFLY)
    return index


cdef inline int await_block(RingCore ring, uint64_t bytes) noexcept nogil:
    cdef uint32_t *word = &ring.header.space_wait
    cdef uint32_t announced
    cdef int64_t until = monotonic_ns() + BLOCK_PAUSE_NS + <int64_t>bytes
    cdef int index = -1
    while index < 0 and monotonic_ns() < until:
        announced = wait_announce(word)
        index = block_take(ring.space, ring.myself(), bytes)
        if index < 0:
            wait_sleep(&word, &announced, 1, NULL, BLOCK_SLEEP_NS, SYNC_SLICE_NS)
            index = block_take(ring.space, ring.myself(), bytes)
    return index


cdef inline int make_block(RingCore ring, uint64_t bytes, int flags) noexcept nogil:
    """Reap those of the dead; else make a block, or the first one."""
    cdef Header *h = ring.header
    cdef int error
    cdef int index = -1
    if ring.space != NULL:
        if <uint64_t>monotonic_ns() - load_relaxed64(&ring.space.refused_ns) < BLOCK_REFUSED_NS:
            return -1
        block_reap_sometimes(ring.space, ring.myself())
        index = block_take(ring.space, ring.myself(), bytes)
        if index >= 0:
            return index
    ring.myself()  # asks /proc, the first time: not under the lock
    if ring.lock_producers(flags) != DONE:
        return -1
    error = block_make_records(h, ring.fd, &ring.file) if load_relaxed64(&h.blocks_offset) == 0 else 0
    if error == 0:
        error = ring.find_blocks()
    if error == 0:
        index = block_create(ring.space, ring.myself(), bytes)
    if error == EILSEQ or index == -3:
        ring.poison(POISON_AREA)
    ring.unlock_producers()
    if index == -2:
        store_relaxed64(&ring.space.refused_ns, <uint64_t>monotonic_ns())
    return index


cdef inline void drop_idle_blocks(RingCore ring) noexcept nogil:
    """After a sleep in which nothing came: give the memory of blocks back."""
    cdef uint64_t since = <uint64_t>monotonic_ns() - BLOCK_IDLE_NS
    if ring.find_blocks() != 0 or ring.space == NULL:
        return
    block_reap_sometimes(ring.space, ring.myself())
    if block_any_idle(ring.space, since) and ring.lock_producers(MAY_WAIT) == DONE:
        block_drop_idle(ring.space, ring.myself(), since)
        ring.unlock_producers()


cdef inline int adopt_blocks(RingCore ring, Take *take, char *table, uint64_t bytes) noexcept nogil:
    """The blocks of the message in front become this process's, with the commit that follows:
    LENT, or why not, and then nothing has changed.  `table` is a private copy."""
    cdef uint64_t count = 0
    cdef uint64_t i = 0
    cdef uint64_t part, index, length
    cdef int error = ring.find_blocks()
    cdef int j
    take.lent_count = 0
    if error == 0 and (ring.space == NULL or bytes < 8):
        error = EILSEQ
    if error == 0:
        memcpy(&count, table, 8)
        if count > (bytes - 8) // 8:
            error = EILSEQ
    while error == 0 and i < count:
        memcpy(&part, table + 8 + 8 * i, 8)
        i += 1
        if part & SHMRING_SEGMENT_LENT == 0:
            continue
        index = (part & ~SHMRING_SEGMENT_LENT) >> SHMRING_SEGMENT_INDEX_SHIFT
        length = part & SHMRING_SEGMENT_LENGTH
        error = EILSEQ
        if take.lent_count < LENT_MOST:
            error = block_check(ring.space, index, take.position, length)
            take.lent[take.lent_count].index = <int>index
            take.lent[take.lent_count].length = length
            take.lent_count += 1
    if error == EILSEQ:
        return ring.poison(POISON_FRAME)
    if error != 0:
        return -error
    for j in range(take.lent_count):
        block_lend(ring.space, take.lent[j].index, ring.myself())
    take.space = block_space_keep(ring.space)  # close() may follow at once
    return LENT
