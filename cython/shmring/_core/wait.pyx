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
from shmring._core.count cimport count_read
from shmring._core.handle cimport RingHandle, deadline_of, set_brief
from shmring._core.layout cimport (
    SHMRING_DEATH_COUNT, SHMRING_WAITER_COUNT, Death, Header, Waiter, shmring_area_of,
)
from shmring._core.owner cimport owner_is_dead, owner_pid, owner_start_ticks
from shmring._core.object_ring cimport ObjectRing, Parcel, item_of_bytes
from shmring._core.sync cimport (
    SYNC_SLICE_LEAST_NS, SYNC_SLICE_NS, SYNC_WORDS_MOST, bell_heard, bell_ring, compare_exchange64, fence_full,
    fetch_add64, handle_enter, handle_leave, load_acquire32, load_acquire64, load_relaxed32, load_relaxed64,
    lock_is_orphan, lock_owner, monotonic_ns, sync_set_waitv_absent, sync_start, wait_announce, wait_sleep_many,
)
from shmring._core.diagnostics cimport (
    CALL_AIO, CALL_GET, CALL_JOIN, CALL_PEEK, CALL_PUT, CALL_RESERVE, CALL_WAIT, FOR_LEASE, FOR_LOCK, FOR_MESSAGE,
    FOR_RESERVATION, FOR_ROOM, FOR_TASKS, HELD_CONSUMER_LOCK, HELD_LEASE, HELD_PRODUCER_LOCK, HELD_RESERVATION,
    Wait, witness_enter, witness_holder, witness_leave,
)

sync_start()

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


# ---- what stands in a header, as numbers ------------------------------------------------------------

CALLS = {
    CALL_GET: "get", CALL_PEEK: "peek", CALL_PUT: "put", CALL_RESERVE: "reserve", CALL_JOIN: "join",
    CALL_WAIT: "wait", CALL_AIO: "aget or aput",
}
REASONS = {
    FOR_MESSAGE: "a message", FOR_ROOM: "room", FOR_LOCK: "a lock", FOR_LEASE: "the end of a peek",
    FOR_RESERVATION: "the end of a reserve", FOR_TASKS: "task_done",
}
HELD = {
    HELD_PRODUCER_LOCK: "the producers' lock", HELD_CONSUMER_LOCK: "the consumers' lock",
    HELD_RESERVATION: "a reserve", HELD_LEASE: "a peek",
}


def user_kind(RingHandle ring):
    """Which class laid it out: 1 is Ring, 2 one of the queues."""
    ring.enter()
    try:
        return ring.header.user_kind
    finally:
        ring.leave()


def counters(RingHandle ring):
    """The fields of RingStatistics that are numbers and flags."""
    cdef Header *h
    ring.enter()
    try:
        h = ring.header
        return {
            "capacity": shmring_area_of(h, load_acquire64(&h.write_generation)).capacity,
            "max_capacity": h.max_capacity,
            "used_bytes": (0 if load_acquire32(&h.shutdown) == 2
                           else load_acquire64(&h.write_position) - load_acquire64(&h.read_position)),
            "messages": ring._qsize(),
            "messages_put": count_read(&h.put_count, &h.write_position),
            "messages_taken": count_read(&h.get_count, &h.read_position),
            "bytes_put": load_acquire64(&h.write_position),
            "growths": load_acquire64(&h.write_generation),
            "recoveries": load_relaxed32(&h.recoveries),
            "consumers_waiting": load_relaxed32(&h.data_wait) & 1 != 0,
            "producers_waiting": load_relaxed32(&h.space_wait) & 1 != 0,
            "shut_down": load_relaxed32(&h.shutdown) != 0,
            "poisoned": load_relaxed32(&h.poisoned) != 0,
        }
    finally:
        ring.leave()


def waiters(RingHandle ring):
    """[(pid, start ticks, thread, call, reason, since in ns)] of the living.

    The records of the dead are given free.
    """
    cdef Waiter *waiter
    cdef uint64_t owner, since
    cdef uint32_t thread, call, reason
    cdef uint64_t i
    cdef list found = []
    ring.enter()
    try:
        for i in range(SHMRING_WAITER_COUNT):
            waiter = &ring.header.waiters[i]
            owner = load_acquire64(&waiter.owner)
            since = load_acquire64(&waiter.since_ns)
            thread = load_relaxed32(&waiter.thread)
            call = load_relaxed32(&waiter.call)
            reason = load_relaxed32(&waiter.reason)
            if owner == 0 or since == 0 or since != load_acquire64(&waiter.since_ns):
                continue
            if owner_is_dead(owner):
                compare_exchange64(&waiter.owner, owner, 0)
            else:
                found.append((owner_pid(owner), owner_start_ticks(owner), thread, call, reason, since))
    finally:
        ring.leave()
    return found


def holders(RingHandle ring):
    """[(pid, start ticks or 0, thread or 0, held, died)] at this moment."""
    cdef list found = []
    ring.enter()
    try:
        # first, because a glance at the front recovers the consumers' lock
        add_lock(found, HELD_PRODUCER_LOCK, &ring.header.producer_lock)
        add_lock(found, HELD_CONSUMER_LOCK, &ring.header.consumer_lock)
        add_owner(found, HELD_LEASE, load_acquire64(&ring.header.lease_owner))
        add_owner(found, HELD_RESERVATION, front_reserver(ring))
    finally:
        ring.leave()
    return found


cdef int add_lock(list found, int held, const uint32_t *word) except -1:
    cdef uint32_t pid = witness_holder(word)
    cdef uint32_t seen = load_acquire32(word)
    if lock_is_orphan(seen):
        found.append((pid, 0, 0, held, True))
    elif lock_owner(seen) != 0:
        # until he has shown his pid, take him for the first thread of his process
        found.append((pid if pid != 0 else lock_owner(seen), 0, lock_owner(seen), held, False))
    return 0


cdef int add_owner(list found, int held, uint64_t owner) except -1:
    if owner != 0:
        found.append((owner_pid(owner), owner_start_ticks(owner), 0, held, owner_is_dead(owner)))
    return 0


cdef uint64_t front_reserver(RingHandle ring) except? 0:
    """Whose reservation stands in front; 0 if nobody's, or the lock is not to be had."""
    cdef Take front
    cdef int result
    if load_acquire64(&ring.header.write_position) == load_acquire64(&ring.header.read_position):
        return 0
    with nogil:
        result = glance(ring, &front, BRIEFLY)
    return front.owner if result == BEHIND_RESERVATION else 0


def deaths(RingHandle ring):
    """[(pid or 0, held, when in ns)]: who died last, for each thing that can be held."""
    cdef Death *death
    cdef uint64_t pid, when
    cdef int held
    cdef list found = []
    ring.enter()
    try:
        for held in range(<int>SHMRING_DEATH_COUNT):
            death = &ring.header.deaths[held]
            when = load_acquire64(&death.when_ns)
            pid = load_acquire64(&death.pid)
            if when != 0 and when == load_acquire64(&death.when_ns):
                found.append((pid, held, when))
    finally:
        ring.leave()
    return found
