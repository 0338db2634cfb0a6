# cython: language_level=3, freethreading_compatible=True
"""Threads inside one handle at once, without the GIL: what ThreadSanitizer is to look at.

A call of Ring or Queue runs under the GIL unless it waits or copies much, so Python
threads hardly ever meet in a ring.  These loops make the calls below, the same that `put`,
`get`, `reserve` and `peek` are made of, and let go of the GIL for all of them.  Each
message carries its producer, its number, and a sum over what fills it.
"""

from libc.stdint cimport INT64_MAX, int64_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy, memset

from shmring._core.ring cimport (
    BEHIND_LEASE, BEHIND_RESERVATION, BUSY, DONE, EMPTY, FULL, FULL_COUNT, MAY_WAIT, Item, Segment, Take,
)
from shmring._core.area cimport area_release
from shmring._core.fast_path cimport put_fast, take_fast
from shmring._core.handle cimport RingHandle
from shmring._core.layout cimport SHMRING_FRAME_BYTES, Frame, shmring_frame_span
from shmring._core.sync cimport monotonic_ns, sync_start
from shmring._core.diagnostics cimport CALL_GET, CALL_PUT, FOR_MESSAGE, FOR_ROOM
from shmring._core.wait cimport PutWait, TakeWait

sync_start()  # the direct way is compiled into this module, and locks from here

cdef enum: HEAD = 24  # producer, number, and the byte that fills the rest


cdef inline bint waits(int outcome) noexcept nogil:
    return outcome in (BUSY, FULL, FULL_COUNT, EMPTY, BEHIND_LEASE, BEHIND_RESERVATION)


cdef void fill(char *payload, uint64_t length, uint64_t producer, uint64_t number) noexcept nogil:
    cdef uint64_t byte = (producer * 31 + number) & 0xFF
    memset(payload, <int>byte, length)
    memcpy(payload, &producer, 8)
    memcpy(payload + 8, &number, 8)
    memcpy(payload + 16, &byte, 8)


cdef bint is_whole(const char *payload, uint64_t length) noexcept nogil:
    cdef uint64_t byte, i
    if length < HEAD:
        return False
    memcpy(&byte, payload + 16, 8)
    for i in range(HEAD, length):
        if <unsigned char>payload[i] != byte:
            return False
    return True


cdef inline uint64_t length_of(uint64_t producer, uint64_t number, uint64_t most) noexcept nogil:
    """Mostly short, and now and then anything up to `most`."""
    cdef uint64_t mixed = (producer * 1000003 + number) * 0x9E3779B97F4A7C15ULL
    return HEAD + (mixed >> 40) % (most if number % 16 == 0 else 200)


def produce(RingHandle ring, uint64_t producer, uint64_t count, uint64_t most, bint in_place):
    """Put `count` messages; with `in_place` by reservations, one of eight given up.

    Returns: how many went in.
    """
    cdef uint64_t number, length, position = 0
    cdef uint64_t sent = 0
    cdef Segment segment
    cdef Item item
    cdef bint keep
    cdef PutWait wait = PutWait.__new__(PutWait)
    cdef int result = DONE
    cdef char *payload = <char *>malloc(HEAD + most)
    wait.start(ring, CALL_PUT, FOR_ROOM, &ring.header.space_wait)
    memset(&item, 0, sizeof(item))
    wait.items = &item
    wait.item_count = 1
    wait.position = &position
    with nogil:
        for number in range(count):
            length = length_of(producer, number, most)
            item.segments = &segment
            item.count = 0 if in_place else 1
            item.length = segment.length = length
            item.owner = ring.myself() if in_place else 0
            segment.data = payload
            if not in_place:
                fill(payload, length, producer, number)
            if not in_place and number % 4 and put_fast(ring, 0, payload, length):
                sent += 1
                continue
            wait.done = wait.record.turn = 0
            result = BUSY
            while waits(result):
                result = wait.slice(INT64_MAX)
                wait.record.turn += 1
            wait.hide()
            if result != DONE:
                break
            keep = True
            if in_place:
                keep = number % 8 != 7
                if keep:
                    fill(item.payload, length, producer, number)
                result = ring.finish_reservation(item.payload, position, keep)
                area_release(item.mapping)
                if result != DONE:
                    break
            sent += keep
    free(payload)
    if result != DONE:
        raise RuntimeError(f"producer {producer} ended by outcome {result} at message {number}")
    return sent


cdef int note(const char *payload, uint64_t length, list taken) except -1:
    cdef uint64_t producer, number
    memcpy(&producer, payload, 8)
    memcpy(&number, payload + 8, 8)
    taken.append((producer, number))
    return 0


def consume(RingHandle ring, uint64_t most, str way, double seconds):
    """Take messages until none came for that long: "copy", "lease" or "span".

    Returns: [(producer, number)], in the order in which they were taken.
    """
    cdef uint64_t room_bytes = HEAD + most
    cdef char *room = <char *>malloc(2 * room_bytes)
    cdef Take take
    cdef Frame *frame
    cdef bint by_lease = way == "lease"
    cdef bint by_span = way == "span"
    cdef bint torn = False
    cdef uint64_t bytes = 0
    cdef uint64_t at
    cdef int64_t until = monotonic_ns() + <int64_t>(seconds * 1e9)
    cdef list taken = []
    cdef int result
    cdef TakeWait wait = TakeWait.__new__(TakeWait)
    wait.start(ring, CALL_GET, FOR_MESSAGE, &ring.header.data_wait)
    wait.take = &take
    while monotonic_ns() < until:
        wait.record.turn = 0
        with nogil:
            take.room = room
            take.room_bytes = room_bytes
            take.target_count = 0
            take.leaser = ring.myself() if by_lease else 0
            if by_span:
                result = ring.take_span(room, 2 * room_bytes, 16, <uint64_t>INT64_MAX, &bytes, MAY_WAIT)
                if waits(result):
                    take.leaser = 0
                    result = wait.slice(until)
                    bytes = 0
            elif not by_lease and take_fast(ring, &take):
                result = DONE
            else:
                result = wait.slice(until)
            wait.hide()
            if result == DONE and by_lease:
                torn = not is_whole(take.payload, take.length)
                memcpy(room, take.payload, HEAD)
                result = BUSY
                while result == BUSY:
                    result = ring.finish_lease(take.position, take.length, True, MAY_WAIT)
                area_release(take.mapping)
            elif result == DONE and bytes == 0:
                torn = not is_whole(room, take.length)
        if waits(result):
            continue
        if result != DONE or torn:
            free(room)
            raise RuntimeError(f"a consumer by {way} ended by outcome {result}, torn={torn}")
        until = monotonic_ns() + <int64_t>(seconds * 1e9)
        if by_span and bytes != 0:
            at = 0
            while at < bytes:
                frame = <Frame *>(room + at)
                if not is_whole(<char *>frame + SHMRING_FRAME_BYTES, frame.length):
                    raise RuntimeError("a span with a torn message")
                note(<char *>frame + SHMRING_FRAME_BYTES, frame.length, taken)
                at += shmring_frame_span(frame.length)
            bytes = 0
        else:
            note(room, take.length, taken)
    free(room)
    return taken
