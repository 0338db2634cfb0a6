"""Waiting on many rings at once, and the compiled half of aget and aput.

A ring is *ready* when a get would return at once: the message in front can be
taken, or the ring is shut down or broken and get says so.  A waiter here takes
nothing, so it may have been woken in the place of one who would: it announces
itself and clears WOKEN like every sleeper (`sync.h`), and passes the baton
when it leaves.
"""

from cpython.bytes cimport PyBytes_CheckExact
from cpython.exc cimport PyErr_CheckSignals
from libc.stdint cimport UINT64_MAX, int64_t, uint32_t, uint64_t

from shmring._core.ring cimport (
    BEHIND_LEASE, BEHIND_RESERVATION, BRIEFLY, BUSY, DONE, EMPTY, IS_WAITING, MAY_WAIT, Item, Segment, Take,
)
from shmring._core.deadline cimport deadline_of, set_brief
from shmring._core.handle cimport RingHandle
from shmring._core.layout cimport Header
from shmring._core.object_ring cimport ObjectRing, Parcel, item_of_bytes
from shmring._core.sync cimport (
    SYNC_SLICE_LEAST_NS, SYNC_SLICE_NS, SYNC_WORDS_MOST, bell_heard, bell_ring, fence_full, fetch_add64,
    handle_enter, handle_leave, load_acquire32, load_acquire64, load_relaxed64, monotonic_ns,
    sync_set_waitv_absent, sync_start, wait_announce, wait_sleep_many,
)
from shmring._core.diagnostics cimport CALL_AIO, CALL_WAIT, FOR_MESSAGE, FOR_ROOM, Wait, witness_enter, witness_leave

sync_start()  # _core has checked that the kernel can do it

cdef enum:
    WORDS = 127  # SYNC_WORDS_MOST, where C wants a constant

cdef int64_t CROWD_NS = 5000000  # the slice of those who wait on more words than the kernel takes


def _set_waitv_absent(bint absent):
    """For tests: sleep as on a kernel without futex_waitv; returns what was before."""
    return sync_set_waitv_absent(absent)


# ---- is it ready -------------------------------------------------------------------------------

cdef int glance(RingHandle ring, Take *found, int flags) noexcept nogil:
    """CHANGED: the front can be taken.  Otherwise why it cannot, as from `take`.

    A take that expects a message at a position where none can be finds out
    everything about the front and leaves it there.
    """
    cdef Segment nowhere
    nowhere.data = NULL
    nowhere.length = 0
    found.targets = &nowhere
    found.target_count = 1
    found.expected = UINT64_MAX
    found.leaser = 0
    found.room = NULL
    found.room_bytes = 0
    return ring.take(found, flags)


cdef int look(RingHandle ring, int flags) noexcept nogil:
    """A glance where it is not plain that there is nothing, clearing the way unless flags are 0."""
    cdef Header *h = ring.header
    cdef Take found
    cdef int result
    if (load_acquire64(&h.write_position) == load_acquire64(&h.read_position)
            and load_acquire32(&h.shutdown) == 0 and load_acquire32(&h.poisoned) == 0):
        return EMPTY
    result = glance(ring, &found, flags)
    if flags != 0 and (result == BEHIND_LEASE or result == BEHIND_RESERVATION):
        ring.clear_the_way(&found, result, flags)
        result = glance(ring, &found, flags)
    return result


cdef inline bint in_the_way(int result) noexcept nogil:
    return result == BUSY or result == BEHIND_LEASE or result == BEHIND_RESERVATION


cdef bint is_ready(RingHandle ring) except -1:
    """The first attempt with the GIL, as everywhere; what takes time without."""
    cdef int result
    ring.check_open()
    result = look(ring, 0)
    if in_the_way(result):
        with nogil:
            result = look(ring, MAY_WAIT)
    return result != EMPTY and not in_the_way(result)


cdef list ready_of(list rings):
    cdef RingHandle ring
    cdef list ready = []
    for each in rings:
        ring = each
        if is_ready(ring):
            ready.append(ring)
    return ready


cdef int enter(list rings) except -1:
    """Count us in, so that close() unmaps only after we have left."""
    cdef RingHandle ring
    for each in rings:
        if not isinstance(each, RingHandle):
            raise TypeError(f"{type(each).__name__} is not a handle on a ring")
    for each in rings:
        ring = each
        fetch_add64(&ring.inside, 1)
    fence_full()  # pairs with that of close(): either it sees us, or we see that it closed
    return 0


cdef int leave(list rings, bint slept) except -1:
    cdef RingHandle ring
    for each in rings:
        ring = each
        if slept and ring.header != NULL:  # closed perhaps, but mapped as long as we count
            ring.pass_baton()
        ring.leave()
    return 0


cdef int shrink_idle(list rings) except -1:
    """After a slice in which nothing came: memory goes back, as in a sleeping get."""
    cdef RingHandle ring
    cdef Header *h
    for each in rings:
        ring = each
        h = ring.header
        if ((load_relaxed64(&ring.read_capacity) != h.min_capacity
             or load_relaxed64(&h.write_generation) != load_relaxed64(&h.read_generation))
                and load_acquire64(&h.write_position) == load_acquire64(&h.read_position)):
            with nogil:
                ring.settle(h.min_capacity, MAY_WAIT)
    return 0


cdef int look_for_names(list rings) except -1:
    """Once a slice, as in a sleeping get: who waits in vain hears why."""
    cdef RingHandle ring
    for each in rings:
        ring = each
        ring.look_for_name()
    return 0


def wait_rings(list rings, timeout=None, Bell bell=None):
    """Sleep until one of `rings` is ready, the bell was rung, or time ran out.

    Args:
        rings: handles, each once.
        timeout: seconds; 0 only looks.
        bell: another reason to return.

    Returns:
        The handles that are ready, in the order given.

    Raises:
        RingClosed: one of them is closed.
    """
    cdef uint32_t *words[WORDS]
    cdef uint32_t announced[WORDS]
    cdef uint32_t *bell_word = NULL if bell is None else &bell.word
    cdef int64_t until = deadline_of(timeout)
    cdef int64_t slept, slice_ns
    cdef int64_t looked = monotonic_ns()
    cdef bint ever_slept = False
    cdef bint heard = False
    cdef RingHandle ring
    cdef Py_ssize_t all = len(rings)
    cdef int count = <int>(all if all < SYNC_WORDS_MOST else SYNC_WORDS_MOST)
    cdef Wait waits[WORDS]
    cdef int i
    cdef list ready
    for i in range(count):
        waits[i].call = CALL_WAIT
        waits[i].turn = waits[i].slot = 0
    enter(rings)
    try:
        ready = ready_of(rings)
        while not ready and not heard and monotonic_ns() < until:
            for i in range(count):
                ring = rings[i]
                words[i] = &ring.header.data_wait
                announced[i] = wait_announce(words[i])
            ready = ready_of(rings)
            if ready:
                break
            slept = monotonic_ns()
            slice_ns = until - slept
            if all > count and slice_ns > CROWD_NS:
                slice_ns = CROWD_NS
            ever_slept = True
            for i in range(count):
                ring = rings[i]
                witness_enter(ring.header, &waits[i], ring.myself(), FOR_MESSAGE)
                waits[i].turn += 1
            with nogil:
                wait_sleep_many(words, announced, count, bell_word, slice_ns)
            if bell_word != NULL:
                heard = bell_heard(bell_word)
            PyErr_CheckSignals()
            ready = ready_of(rings)
            if not ready and monotonic_ns() - slept >= SYNC_SLICE_LEAST_NS:
                shrink_idle(rings)
            if not ready and monotonic_ns() - looked >= SYNC_SLICE_LEAST_NS:  # slices may be shorter
                looked = monotonic_ns()
                look_for_names(rings)
        return ready
    finally:
        if ever_slept:
            for i in range(count):
                ring = rings[i]
                if ring.header != NULL:
                    witness_leave(ring.header, &waits[i], ring.myself())
        leave(rings, ever_slept)


# ---- asyncio -----------------------------------------------------------------------------------

cdef class Bell:
    """Ends the sleep of one thread: rung before or during it."""

    def ring(self):
        """Wake the sleeper, or keep it from falling asleep."""
        bell_ring(&self.word)

    def wait(self, timeout=None):
        """Sleep until it is rung; False when time ran out first."""
        cdef int64_t until = deadline_of(timeout)
        while not bell_heard(&self.word):
            if monotonic_ns() >= until:
                return False
            with nogil:
                wait_sleep_many(NULL, NULL, 0, &self.word, until - monotonic_ns())
            PyErr_CheckSignals()
        return True


def watch(RingHandle ring, Bell bell, bint data, outgoing):
    """What the helper thread of aget and aput does: sleep on one ring.

    Args:
        data: wait until the front can be taken.
        outgoing: None, or the `Outgoing` to wait with until another attempt is due.

    Returns:
        (ready to get, due to put); both False when the bell was rung.

    Raises:
        RingClosed: the handle was closed.
    """
    cdef uint32_t *words[2]
    cdef uint32_t announced[2]
    cdef Header *h
    cdef int count
    cdef int64_t slept
    cdef uint64_t seen = 0
    cdef bint room = outgoing is not None
    cdef bint busy = False
    cdef int locked
    cdef bint may_get = False
    cdef bint may_put = False
    cdef list rings = [ring]
    cdef Wait wait
    wait.call = CALL_AIO
    wait.turn = wait.slot = 0
    if room:
        seen = (<Outgoing>outgoing).seen
        busy = (<Outgoing>outgoing).busy
    enter(rings)
    try:
        while True:
            ring.check_open()
            h = ring.header
            count = 0
            if data:
                words[count] = &h.data_wait
                announced[count] = wait_announce(words[count])
                count += 1
            if room:
                words[count] = &h.space_wait
                announced[count] = wait_announce(words[count])
                count += 1
                # whoever is not woken looks by himself each slice
                may_put = (may_put or load_acquire64(&h.read_position) != seen
                           or load_acquire32(&h.shutdown) != 0 or load_acquire32(&h.poisoned) != 0)
            if busy:  # no room is missing: the lock is waited for here and not on the loop
                with nogil:
                    locked = ring.lock_producers(MAY_WAIT)
                    if locked == DONE:
                        ring.unlock_producers()
                may_put = may_put or locked != BUSY
            may_get = data and is_ready(ring)
            if may_get or may_put or bell_heard(&bell.word):
                return may_get, may_put
            slept = monotonic_ns()
            witness_enter(h, &wait, ring.myself(), FOR_MESSAGE if data else FOR_ROOM)
            wait.turn += 1
            with nogil:
                wait_sleep_many(words, announced, count, &bell.word, SYNC_SLICE_NS)
            if monotonic_ns() - slept >= SYNC_SLICE_LEAST_NS and not ring.closed:
                may_put = room
                shrink_idle(rings)
                if data:
                    look_for_names(rings)
    finally:
        if ring.header != NULL:
            witness_leave(ring.header, &wait, ring.myself())
        leave(rings, not may_get)


def ready_now(RingHandle ring):
    """Whether a get would return or raise at once; does not wait for a lock."""
    cdef int result = DONE
    handle_enter(&ring.inside)
    if not ring.closed:
        result = look(ring, 0)
    if handle_leave(&ring.inside):
        ring.last_out()
    return result != EMPTY and not in_the_way(result)


def exhausted(RingHandle ring):
    """Whether nothing is left to take, not even behind a lock, a peek or a reservation."""
    cdef int result = BUSY
    handle_enter(&ring.inside)
    if not ring.closed:
        result = look(ring, BRIEFLY)
    if handle_leave(&ring.inside):
        ring.last_out()
    return result == EMPTY


def pass_on(RingHandle ring):
    """Pass the baton: a wake was taken and a message was not."""
    handle_enter(&ring.inside)
    if not ring.closed:
        ring.pass_baton()
    if handle_leave(&ring.inside):
        ring.last_out()


cdef class Outgoing:
    """An object that was encoded once and is put as often as it takes."""

    def __init__(self, ObjectRing ring, obj):
        self.ring = ring
        self.encoded = ring.frame_of(obj, &self.item.kind)
        if PyBytes_CheckExact(self.encoded):
            item_of_bytes(&self.item, &self.segment, self.encoded)
        else:
            self.item = (<Parcel>self.encoded).item

    def put(self):
        """One attempt, on the loop: whether it went in.  Raises as Queue.put does."""
        cdef Py_ssize_t done = 0
        cdef bint before = set_brief(True)
        cdef int result
        cdef Item *item = &self.item
        cdef RingHandle ring = self.ring
        handle_enter(&ring.inside)
        try:
            ring.check_open()
            self.seen = load_acquire64(&ring.header.read_position)
            if ring.put_or_wait(item, 1, NULL, False, None) != 0:
                return True
            ring.check_open()
            # once more, so that smaller messages of others do not take the room for ever
            result = ring.put_items(item, 1, &done, NULL, IS_WAITING)
            self.busy = result == BUSY
            return result == DONE
        finally:
            set_brief(before)
            if handle_leave(&ring.inside):
                ring.last_out()
