"""Fast path: one small uncontended message, with no call in between.

`put_fast` and `take_fast` are `RingCore.put_items` and `RingCore.take` for the common
case: the lock is free, there is room, the message in front is whole and small.  Their
stores are the same, in the same order.  Any other case they leave to those two.
All of it is compiled into the callers, which call `sync_start` when they are imported.
"""

from cpython.float cimport PyFloat_AS_DOUBLE, PyFloat_CheckExact
from libc.stdint cimport uint32_t, uint64_t
from libc.string cimport memcpy

from shmring._core.area cimport Mapping
from shmring._core.ring cimport CPU_BYTES, DONE, Item, RingCore, Segment, Take, note_cpu
from shmring._core.count cimport count_on
from shmring._core.frame cimport frame_begin, frame_is_possible
from shmring._core.handle cimport GIL_BYTES, RingHandle
from shmring._core.layout cimport SHMRING_FRAME_BYTES, SHMRING_WHOLE, Frame, Header, shmring_frame_span
from shmring._core.sync cimport (
    fence_after_unlock, handle_enter, handle_leave, load_acquire32, load_acquire64, load_relaxed32,
    load_relaxed64, lock_release, lock_try_free, store_relaxed64, store_release64, wait_wake_one, wait_wants_wake,
)
from shmring._core.wait cimport put_or_wait, take_or_wait
from shmring._core.diagnostics cimport holder_show, holder_hide, user_show


cdef inline bint put_fast(RingCore ring, uint32_t kind, const char *data, uint64_t length) noexcept nogil:
    """Whether the message went in."""
    cdef Header *h = ring.header
    cdef uint64_t span = shmring_frame_span(length)
    cdef uint64_t pos, read
    cdef Mapping *m
    cdef Frame *frame
    cdef bint done = False
    if h.max_messages != 0 or not lock_try_free(&h.producer_lock):
        return False
    holder_show(&h.producer_lock)
    m = ring.producer_mapping
    pos = h.write_position
    read = ring.known_read if ring.known_read > m.base else m.base
    # in this form a position before `read` leaves no room either, instead of overflowing
    if (load_relaxed32(&h.poisoned) == 0 and load_relaxed32(&h.shutdown) == 0
            and m.generation == h.write_generation and pos & 7 == 0
            and span <= m.capacity and pos - read <= m.capacity - span and h.reserved_until_ns == 0):
        frame = <Frame *>(m.data + (pos & m.mask))
        frame_begin(frame, pos, length, kind, SHMRING_WHOLE, 0)
        memcpy(<char *>frame + SHMRING_FRAME_BYTES, data, length)
        count_on(&h.put_count, pos, pos + span, 1)
        if pos & (CPU_BYTES - 1) < span:
            note_cpu(h)
            user_show(&h.last_producer)
        store_release64(&h.write_position, pos + span)  # the commit
        done = True
    holder_hide(&h.producer_lock)
    lock_release(&h.producer_lock)
    if done:
        fence_after_unlock()
        if wait_wants_wake(&h.data_wait):
            wait_wake_one(&h.data_wait)
    return done


cdef inline bint take_fast(RingCore ring, Take *take) noexcept nogil:
    """Whether the message in front was taken into `take.room`."""
    cdef Header *h = ring.header
    cdef uint64_t pos, limit, length, following
    cdef Mapping *m
    cdef Frame *frame
    cdef bint done = False
    if not lock_try_free(&h.consumer_lock):
        return False
    holder_show(&h.consumer_lock)
    m = ring.consumer_mapping
    pos = h.read_position
    if (load_relaxed32(&h.poisoned) == 0 and load_relaxed32(&h.shutdown) == 0
            and load_relaxed64(&h.lease_owner) == 0 and ring.claim == NULL
            and m.generation == h.read_generation and pos & 7 == 0):
        limit = ring.known_limit
        if pos >= limit:
            # in this order: the other way round would read a new frame's position in the old area
            limit = load_acquire64(&h.write_position)
            if load_acquire64(&h.write_generation) != m.generation or limit - pos > m.capacity:
                limit = pos
            ring.known_limit = limit
            user_show(&h.last_consumer)
        frame = <Frame *>(m.data + (pos & m.mask))
        if pos < limit and load_acquire32(&frame.state) == SHMRING_WHOLE:
            # one copy of each field, then checked, then used
            length = load_relaxed64(&frame.length)
            take.kind = load_relaxed32(&frame.kind)
            if length <= take.room_bytes and frame_is_possible(frame, length, pos, m.capacity, limit):
                memcpy(take.room, <char *>frame + SHMRING_FRAME_BYTES, length)
                take.length = length
                following = pos + shmring_frame_span(length)
                count_on(&h.get_count, pos, following, 1)
                store_release64(&h.read_position, following)  # the commit
                store_relaxed64(&ring.left_at, following)
                if following == limit and m.capacity != h.min_capacity:
                    ring.note_empty(following)
                done = True
    holder_hide(&h.consumer_lock)
    lock_release(&h.consumer_lock)
    if done:
        fence_after_unlock()
        if wait_wants_wake(&h.space_wait):
            ring.wake_producers()
        if wait_wants_wake(&h.data_wait):
            ring.wake_next()
    return done


cdef inline bint asks_no_clock(bint block, object timeout):
    """Whether a first attempt may be made before a deadline is made of the timeout."""
    return timeout is None or not block or (PyFloat_CheckExact(timeout) and PyFloat_AS_DOUBLE(timeout) >= 0)


cdef inline Py_ssize_t put_one(RingHandle ring, uint32_t kind, char *data, Py_ssize_t length, uint64_t *position,
                               bint block, object timeout) except -1:
    """Put one message: 1, or 0 when time ran out."""
    cdef Segment segment
    cdef Item item
    cdef Py_ssize_t went_in
    cdef bint done = False
    if position == NULL and length <= GIL_BYTES and asks_no_clock(block, timeout):
        handle_enter(&ring.inside)
        if not ring.closed:
            done = put_fast(ring, kind, data, <uint64_t>length)
        if handle_leave(&ring.inside):
            ring.last_out()
        if done:
            return 1
    segment.data = data
    item.length = segment.length = <uint64_t>length
    item.segments = &segment
    item.count = 1
    item.kind = kind
    item.owner = 0
    item.lending = NULL
    return put_or_wait(ring, &item, 1, &went_in, position, block, timeout)


cdef inline int take_one(RingHandle ring, Take *take, bint block, object timeout) except -1:
    """Take the message in front into `take.room`: what `take_or_wait` returns."""
    cdef bint done = False
    if asks_no_clock(block, timeout):
        handle_enter(&ring.inside)
        if not ring.closed:
            done = take_fast(ring, take)
            if done and load_relaxed64(&ring.oversized) != 0:
                ring.give_back()
        if handle_leave(&ring.inside):
            ring.last_out()
        if done:
            return DONE
    return take_or_wait(ring, take, block, timeout)
