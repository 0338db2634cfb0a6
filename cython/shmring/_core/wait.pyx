"""Waiting: one loop for put, get, join, several rings, and the helper thread of asyncio.

A wait is a series of slices.  A slice announces the sleeper in a wait word
(`sync.h`), looks, sleeps, and looks again, without the GIL.  Between slices the
GIL is taken, and signals, peers and the deadline are checked.
"""

cimport cython
from cpython.exc cimport PyErr_CheckSignals
from cpython.float cimport PyFloat_CheckExact
from libc.errno cimport ENOSPC
from libc.stdint cimport INT64_MAX, int64_t, uint32_t, uint64_t

from shmring._core.diagnostics cimport (
    CALL_GET, CALL_PEEK, CALL_PUT, CALL_RESERVE, CALL_WAIT, FOR_LEASE, FOR_LOCK, FOR_MESSAGE, FOR_RESERVATION,
    FOR_ROOM, Wait, waiter_show, waiter_hide,
)
from shmring._core.handle cimport GIL_BYTES, RingHandle, ends_wait, identity_of
from shmring._core.layout cimport SHMRING_NO_CPU, Header, shmring_frame_span
from shmring._core.lending cimport drop_idle_blocks
from shmring._core.owner cimport owner_goes_on, owner_is_dead, owner_of
from shmring._core.ring cimport (
    BEHIND_LEASE, BEHIND_RESERVATION, BRIEFLY, BUSY, CORRUPT, DONE, EMPTY, FULL, FULL_COUNT, IS_WAITING, LENT,
    MAY_GROW, MAY_WAIT, PARTIAL, SHUT, Item, Take,
)
from shmring._core.spin cimport SPIN_SLEPT_NS, spin_between_looks, spin_for_writing, spin_while_equal
from shmring._core.sync cimport (
    SYNC_SLICE_LEAST_NS, SYNC_SLICE_NS, SYNC_WORDS_MOST, bell_heard, bell_ring, current_cpu, fence_full, fetch_add64,
    handle_enter, handle_leave, load_acquire64, load_relaxed32, load_relaxed64, lock_owner,
    monotonic_ns, store_relaxed32, store_relaxed64, sync_set_waitv_absent, sync_start, wait_announce, wait_sleep,
    wait_wake_all,
)
from shmring._core.watch cimport watch_begin, watch_hand_on, watch_leave

from shmring import _warnings
from shmring.arguments import checked_timeout

cdef enum:
    WORDS = 127  # SYNC_WORDS_MOST, where C wants a constant
    FULL_MEMORY = 1  # full_seen: the file system is full,
    FULL_LIMIT = 2  # max_capacity is reached,
    FULL_SAID = 3  # and the log says so

cdef int64_t HOLDER_NS = 1000000000  # the longest wait of an *_nowait for a lock whose owner runs
cdef int64_t PEERS_FIRST_NS = 2000000  # the first sleep beside peers: a peer mostly dies soon
cdef int64_t PEERS_NS = 40000000  # PeerPoll.SLICE
cdef int64_t CROWD_NS = 5000000  # the longest sleep on more words than the kernel takes
cdef int64_t IDLE_NS = 30000000  # an empty sleep of a slice, or so long, gives memory back
cdef int64_t GROWTH_PAUSE_NS = 1000000  # how long a put waits for moving consumers before it grows
cdef int64_t STANDSTILL_NS = 300000  # consumers that have not moved for this long do not move,
cdef int64_t PREEMPTED_NS = 20000000  # or for this long, if they moved lately:
cdef int64_t LATELY_NS = 200000000

cdef extern from *:
    """
    static __thread int shmring_brief;
    """
    int brief "shmring_brief"  # of this thread, see set_brief

cdef object PeerPoll = None  # imported when peers= is first used

sync_start()


# ---- deadlines ---------------------------------------------------------------------------------

cdef int64_t deadline_of(object timeout) except -1:
    """The monotonic nanosecond at which a wait of `timeout` ends."""
    cdef double seconds
    if timeout is None:
        return INT64_MAX
    if not PyFloat_CheckExact(timeout) and peers_of(timeout) is not None:
        return deadline_of(timeout.timeout)
    seconds = timeout
    if not seconds >= 0:
        seconds = checked_timeout(timeout)
    if seconds > 1e9:
        return INT64_MAX
    return monotonic_ns() + <int64_t>(seconds * 1e9)


cdef object with_peers(object peers, object timeout):
    """A timeout that ends when all of `peers` are dead."""
    global PeerPoll
    if PeerPoll is None:
        from shmring.process.peers import PeerPoll as imported
        PeerPoll = imported
    return PeerPoll(peers, timeout)


cdef object peers_of(object timeout):
    """The PeerPoll that stands in the place of a timeout, or None."""
    return timeout if type(timeout) is PeerPoll else None


cpdef bint set_brief(bint on) noexcept:
    """Whether *_nowait calls of this thread wait for a lock a few milliseconds at most, as on an
    event loop, which stands still meanwhile.  Returns what was before."""
    global brief
    cdef bint before = brief != 0
    brief = on
    return before


cdef bint is_brief() noexcept nogil:
    return brief != 0


cdef int64_t deadline_for(bint block, object timeout, int64_t until) noexcept:
    """`until` where a blocking call has a timeout; else what its kind of call means."""
    if not block:
        return monotonic_ns() + (0 if is_brief() else HOLDER_NS)
    return INT64_MAX if timeout is None else until


cdef bint is_running(uint32_t *word) noexcept nogil:
    """Whether the owner of a lock only needs a CPU, and is neither stopped nor dead."""
    cdef uint32_t owner = lock_owner(load_relaxed32(word))
    return owner == 0 or owner_goes_on(owner) or lock_owner(load_relaxed32(word)) != owner


# ---- the loop ----------------------------------------------------------------------------------

@cython.binding(False)
cdef class Waiting:
    """One wait of one thread."""

    cdef int start(self, RingHandle ring, uint32_t call, uint32_t reason, uint32_t *word) except -1:
        self.ring = ring
        self.block = True
        self.pause_ns = INT64_MAX
        self.count = 1
        self.words = self.own_words
        self.announced = self.own_announced
        self.own_words[0] = word
        self.record.call = call
        self.reason = reason
        return 0

    cdef int run(self, int64_t until, object peers) except? -1:
        """Wait until the look ends it, until `until`, or until all of `peers` are dead.

        Returns what was found last.  The caller counts itself into the handle.
        """
        cdef int result = BUSY
        cdef int64_t limit
        if peers is not None:
            self.pause_ns = PEERS_FIRST_NS
        try:
            while True:
                limit = until
                if self.pause_ns != INT64_MAX:
                    limit = min(until, monotonic_ns() + self.pause_ns)
                with nogil:
                    result = self.slice(limit)
                if ends_wait(result):
                    return result
                self.record.turn += 1
                PyErr_CheckSignals()
                if peers is not None and not self.ring.closed:
                    if peers.proven and result in (EMPTY, FULL, FULL_COUNT):
                        raise peers.error(self.missing, self.done)
                    if self.newly_dead(peers):
                        continue  # look once more: what the dead committed came before their death
                if self.is_over(result, until):
                    return result
                if result == BUSY:
                    self.show(FOR_LOCK)
                self.between(result)
        finally:
            self.hide()
            self.end(result)

    cdef int slice(self, int64_t until) noexcept nogil:
        """Wait for a slice at most; looks last, so that its answer is fresh."""
        cdef int64_t began
        cdef int i
        cdef int result = self.prepare()
        if ends_wait(result) or result == BUSY or not self.block:
            return result
        for i in range(self.count):
            self.announced[i] = wait_announce(self.words[i])
        result = self.look(False)
        if ends_wait(result) or result == BUSY:
            return result
        self.show(FOR_LEASE if result == BEHIND_LEASE
                  else FOR_RESERVATION if result == BEHIND_RESERVATION else self.reason)
        began = monotonic_ns()
        self.asked_ns = until - began
        wait_sleep(self.words, self.announced, self.count, self.bell, self.asked_ns, self.longest(result, began))
        self.slept_ns = monotonic_ns() - began
        return self.look(True)

    cdef bint is_over(self, int result, int64_t until) noexcept:
        if (self.ring is not None and self.ring.closed) or monotonic_ns() >= until:
            return True
        if self.bell != NULL and bell_heard(self.bell):
            return True
        return not self.block and not (result == BUSY and is_running(self.lock))

    cdef bint newly_dead(self, object peers) except? True:
        """Whether all peers are now proven dead, and were not before.  Runs no Python while one
        that was seen alive lives."""
        if not peers.proven and (self.living == 0 or owner_is_dead(self.living)):
            if peers.all_dead():
                self.pause_ns = 0
                return True
            pid, start_ticks = peers.living_peer
            self.living = owner_of(pid, start_ticks)
        self.pause_ns = min(2 * self.pause_ns + PEERS_FIRST_NS, PEERS_NS)
        return False

    cdef void show(self, uint32_t reason) noexcept nogil:
        waiter_show(self.ring.header, &self.record, self.ring.myself(), reason)

    cdef void hide(self) noexcept nogil:
        if self.ring.header != NULL:
            waiter_hide(self.ring.header, &self.record, self.ring.myself())

    cdef int prepare(self) noexcept nogil:
        """The first part of a slice, before it is announced; without `block` all of it."""
        return EMPTY

    cdef int look(self, bint woken) noexcept nogil:
        """Try, after the announcement or after the sleep."""
        return DONE

    cdef int64_t longest(self, int result, int64_t now) noexcept nogil:
        """How long the sleep that begins now may be."""
        return SYNC_SLICE_NS

    cdef int between(self, int result) except -1:
        """After a slice in vain."""
        return 0

    cdef void end(self, int result) noexcept:
        """Leave the wait, with what was found last."""


# ---- put ---------------------------------------------------------------------------------------

@cython.binding(False)
cdef class PutWait(Waiting):
    """Wait for room."""

    cdef int attempt(self, int flags) noexcept nogil:
        return self.ring.put_items(self.items, self.item_count, &self.done, self.position, flags)

    cdef int prepare(self) noexcept nogil:
        """May grow; without `block` one attempt that waits for the lock a millisecond at most."""
        cdef Header *h = self.ring.header
        cdef int result
        if not self.block:
            result = self.attempt(BRIEFLY | MAY_GROW)
            return FULL if self.is_waiting_for_memory(result) else result
        result = self.attempt(MAY_WAIT)
        if result == FULL and h.max_capacity != h.min_capacity:
            if self.record.turn == 0:
                result = self.put_behind_moving()
            if result == FULL:
                result = self.attempt(MAY_WAIT | MAY_GROW)
                if result == FULL and load_relaxed32(&self.ring.full_seen) == 0:
                    store_relaxed32(&self.ring.full_seen, FULL_LIMIT)
        if self.is_waiting_for_memory(result):
            if load_relaxed32(&self.ring.full_seen) != FULL_SAID:
                store_relaxed32(&self.ring.full_seen, FULL_MEMORY)
            result = FULL
        return result

    cdef bint is_waiting_for_memory(self, int result) noexcept nogil:
        """/dev/shm is full, but the message fits the area there is: wait for space as in a bounded queue."""
        return (result == -ENOSPC and shmring_frame_span(self.items[self.done].length)
                <= load_relaxed64(&self.ring.write_capacity))

    cdef int look(self, bint woken) noexcept nogil:
        return self.attempt(MAY_WAIT if woken else MAY_WAIT | IS_WAITING)

    cdef int between(self, int result) except -1:
        """The log says once a handle that what was to grow waits."""
        cdef uint32_t seen = load_relaxed32(&self.ring.full_seen)
        if result == FULL and (seen == FULL_MEMORY or seen == FULL_LIMIT):
            store_relaxed32(&self.ring.full_seen, FULL_SAID)
            _warnings.warn_full(None if seen == FULL_MEMORY else self.ring.header.max_capacity)
        return 0

    cdef void end(self, int result) noexcept:
        if self.block and not ends_wait(result) and not self.ring.closed:
            self.ring.give_up_space()

    cdef int put_behind_moving(self) noexcept nogil:
        """Before growing: try again for a millisecond, and another for each MiB,
        but only while consumers make progress.  Fresh pages cost several times
        what warm ones do, and a ring that stays small stays in the cache.

        Consumers that moved lately may stand still for longer: they are
        probably just not running.
        """
        cdef Header *h = self.ring.header
        cdef int64_t now = monotonic_ns()
        cdef int64_t until = now + GROWTH_PAUSE_NS + <int64_t>self.items[self.done].length
        cdef int64_t moved = now
        cdef int64_t standstill = STANDSTILL_NS
        cdef uint64_t seen = load_acquire64(&h.read_position)
        cdef uint64_t full_read = load_relaxed64(&self.ring.full_read)
        cdef uint64_t read
        cdef int result = FULL
        if seen != full_read:
            store_relaxed64(&self.ring.moved_ns, <uint64_t>now)
        if now - <int64_t>load_relaxed64(&self.ring.moved_ns) < LATELY_NS:
            standstill = PREEMPTED_NS
            until += PREEMPTED_NS
        elif seen == full_read:
            return FULL  # not since the last growth, or never: nothing is read
        while result == FULL and now < until and now - moved < standstill:
            self.announced[0] = wait_announce(self.words[0])
            wait_sleep(self.words, self.announced, 1, NULL, STANDSTILL_NS // 3, SYNC_SLICE_NS)
            now = monotonic_ns()
            read = load_acquire64(&h.read_position)
            if read != seen:
                seen = read
                moved = now
                store_relaxed64(&self.ring.moved_ns, <uint64_t>now)
                result = self.attempt(MAY_WAIT)
        store_relaxed64(&self.ring.full_read, seen)
        return result


cdef Py_ssize_t put_or_wait(RingHandle ring, Item *items, Py_ssize_t count, Py_ssize_t *done,
                            uint64_t *position, bint block, object timeout) except -1:
    cdef Py_ssize_t i
    cdef int64_t until = 0
    cdef uint64_t bytes = 0
    cdef int result = BUSY
    cdef PutWait wait
    done[0] = 0
    if block and timeout is not None:
        until = deadline_of(timeout)  # may run Python, and that may close the handle
    handle_enter(&ring.inside)
    try:
        if ring.closed:
            ring.check_open()
        for i in range(count):
            bytes += items[i].length
        if bytes > ring.largest:
            for i in range(count):
                if items[i].length > ring.largest:
                    raise _warnings.too_large(items[i].length, ring.header.max_capacity, ring.largest)
        if bytes <= GIL_BYTES:
            result = ring.put_items(items, count, done, position, 0)
            if result == DONE:
                return done[0]
        if not ends_wait(result):
            wait = PutWait.__new__(PutWait)
            wait.start(ring, CALL_RESERVE if items[0].owner != 0 else CALL_PUT, FOR_ROOM, &ring.header.space_wait)
            wait.block = block
            wait.lock = &ring.header.producer_lock
            wait.items = items
            wait.item_count = count
            wait.position = position
            wait.done = done[0]
            wait.missing = "no room came"
            fetch_add64(&ring.inside, 1)
            try:
                result = wait.run(deadline_for(block, timeout, until), peers_of(timeout))
            finally:
                done[0] = wait.done
                ring.leave()
        if result == DONE:
            return done[0]
        if ends_wait(result):
            ring.raise_outcome(result)
        ring.check_open()
        return done[0]
    finally:
        if handle_leave(&ring.inside):
            ring.last_out()


# ---- take --------------------------------------------------------------------------------------

@cython.binding(False)
cdef class TakeWait(Waiting):
    """Wait for a message."""

    cdef int attempt(self, int flags) noexcept nogil:
        cdef int result = self.ring.take(self.take, flags)
        if result == BEHIND_LEASE or result == BEHIND_RESERVATION:
            self.ring.clear_the_way(self.take, result, flags)
            result = self.ring.take(self.take, flags)
        return result

    cdef int prepare(self) noexcept nogil:
        if not self.block:
            return self.attempt(BRIEFLY)
        return self.spin() if self.record.turn == 0 else EMPTY

    cdef int spin(self) noexcept nogil:
        """Worth it only while the producers run on another CPU, and something is expected soon."""
        cdef Header *h = self.ring.header
        cdef uint32_t other = load_relaxed32(&h.producer_cpu)
        cdef int64_t until
        cdef int result = EMPTY
        if (load_relaxed64(&self.ring.slept_ns) <= SPIN_SLEPT_NS and other != SHMRING_NO_CPU
                and other != current_cpu()
                and spin_while_equal(&h.write_position, &h.read_position,
                                     load_relaxed64(&self.ring.left_at) != load_relaxed64(&h.read_position))):
            result = self.ring.take(self.take, MAY_WAIT)
            if result == BEHIND_RESERVATION:
                until = monotonic_ns() + spin_for_writing(self.take.length)
                while result == BEHIND_RESERVATION and monotonic_ns() < until:
                    spin_between_looks()
                    result = self.ring.take(self.take, MAY_WAIT)
        return result

    cdef int look(self, bint woken) noexcept nogil:
        cdef int result
        if woken:
            store_relaxed64(&self.ring.slept_ns, <uint64_t>self.slept_ns)
        result = self.attempt(MAY_WAIT)
        if woken and result == EMPTY:
            shrink_idle(self.ring, self)
        elif woken and (result == SHUT or result == CORRUPT):
            wait_wake_all(self.words[0])  # the process that said so may have been killed before it woke all
        return result

    cdef int64_t longest(self, int result, int64_t now) noexcept nogil:
        cdef int64_t ns
        if result != EMPTY or self.asked_ns <= SYNC_SLICE_NS:
            return SYNC_SLICE_NS  # behind a lease or a reservation: the death of its owner is looked for
        ns = watch_begin(self.ring.header, &self.watch, now)
        if ns == SYNC_SLICE_NS and self.record.turn != 0:
            watch_hand_on(self.ring.header, &self.watch, now)
        return ns

    cdef int between(self, int result) except -1:
        if self.block and result != BUSY:
            check_name(self.ring)
        return 0

    cdef void end(self, int result) noexcept:
        if self.ring.header == NULL:
            return
        if not ends_wait(result):
            self.ring.wake_next()  # this thread may have been the one that was woken
        watch_leave(self.ring.header, &self.watch)


cdef void shrink_idle(RingHandle ring, Waiting wait) noexcept nogil:
    """After a sleep in which nothing came: give memory back."""
    cdef Header *h = ring.header
    if wait.slept_ns < (SYNC_SLICE_LEAST_NS if wait.asked_ns > SYNC_SLICE_NS else IDLE_NS):
        return
    if (load_relaxed64(&ring.read_capacity) != h.min_capacity
            or load_relaxed64(&h.write_generation) != load_relaxed64(&h.read_generation)):
        ring.shrink(h.min_capacity, MAY_WAIT)
    if load_relaxed32(&h.block_slots) != 0:
        drop_idle_blocks(ring)


cdef int check_name(RingHandle ring) except -1:
    """Once a slice of a wait for messages.  When two found no name, the log says so, once a
    handle; at the second, because a new name is marked before it appears."""
    if ring.name_gone == 2 or load_relaxed32(&ring.header.named) == 0:
        return 0
    if not _warnings.name_is_gone(ring.fd):
        ring.name_gone = 0
        return 0
    ring.name_gone += 1
    if ring.name_gone == 2:
        _, token, name = identity_of(ring)
        _warnings.warn_name_is_gone(name, token)
    return 0


cdef int take_or_wait(RingHandle ring, Take *take, bint block, object timeout) except -1:
    cdef int64_t until = 0
    cdef int result
    cdef TakeWait wait
    if block and timeout is not None:
        until = deadline_of(timeout)  # may run Python, and that may close the handle
    handle_enter(&ring.inside)
    try:
        if ring.closed:
            ring.check_open()
        take.target_count = 0
        result = ring.take(take, 0)
        if result == DONE or result == PARTIAL or result == LENT or (result == EMPTY and not block and timeout is None):
            if load_relaxed64(&ring.oversized) != 0:
                ring.give_back()
            return result
        if not ends_wait(result):
            wait = TakeWait.__new__(TakeWait)
            wait.start(ring, CALL_PEEK if take.leaser != 0 else CALL_GET, FOR_MESSAGE, &ring.header.data_wait)
            wait.block = block
            wait.lock = &ring.header.consumer_lock
            wait.take = take
            wait.missing = "nothing is left to take"
            fetch_add64(&ring.inside, 1)
            try:
                result = wait.run(deadline_for(block, timeout, until), peers_of(timeout))
            finally:
                ring.leave()
        if ends_wait(result) and result != DONE and result != PARTIAL and result != LENT:
            ring.raise_outcome(result)
        if not ends_wait(result):
            ring.check_open()
        return result
    finally:
        if handle_leave(&ring.inside):
            ring.last_out()


# ---- several rings -----------------------------------------------------------------------------
#
# A ring is *ready* when a get would return at once: the message in front can be
# taken, or the ring is shut down, broken or closed and get says so.  A waiter here
# takes nothing, so it may have been woken in the place of one that would: it passes
# the wake-up on when it leaves.

def _set_waitv_absent(bint absent):
    """For tests: sleep as on a kernel without futex_waitv; returns what was before."""
    return sync_set_waitv_absent(absent)


cdef inline bint in_the_way(int result) noexcept nogil:
    return result == BUSY or result == BEHIND_LEASE or result == BEHIND_RESERVATION


cdef int look(RingHandle ring, int flags) noexcept nogil:
    """Probe, clearing the way unless flags are 0."""
    cdef Take found
    cdef int result = ring.probe(&found, flags)
    if flags != 0 and (result == BEHIND_LEASE or result == BEHIND_RESERVATION):
        ring.clear_the_way(&found, result, flags)
        result = ring.probe(&found, flags)
    return result


cdef bint is_ready(RingHandle ring) noexcept:
    """The first attempt with the GIL; what takes time without."""
    cdef int result
    if ring.closed:
        return True
    result = look(ring, 0)
    if in_the_way(result):
        with nogil:
            result = look(ring, MAY_WAIT)
    return result != EMPTY and not in_the_way(result)


cdef list ready_of(list rings):
    return [ring for ring in rings if is_ready(<RingHandle>ring)]


cdef int enter(list rings) except -1:
    """Count this call into each handle, so that close() unmaps only after it has left."""
    cdef RingHandle ring
    for each in rings:
        if not isinstance(each, RingHandle):
            raise TypeError(f"{type(each).__name__} is not a handle on a ring")
    for each in rings:
        ring = each
        fetch_add64(&ring.inside, 1)
    fence_full()  # pairs with that of close(): one of the two sees the other
    return 0


cdef int leave(list rings) except -1:
    for ring in rings:
        (<RingHandle>ring).leave()
    return 0


cdef int check_all_open(list rings) except -1:
    for ring in rings:
        (<RingHandle>ring).check_open()
    return 0


@cython.binding(False)
cdef class AnyWait(Waiting):
    """Wait until one of several rings is ready; the first `count` of them are slept on."""

    cdef int look(self, bint woken) noexcept nogil:
        with gil:
            return self.look_at_all(woken)

    cdef int look_at_all(self, bint woken) noexcept:
        self.ready = ready_of(self.rings)
        if woken and not self.ready:
            for ring in self.rings:
                shrink_idle(<RingHandle>ring, self)
        return DONE if self.ready else EMPTY

    cdef int between(self, int result) except -1:
        cdef int64_t now = monotonic_ns()
        if now - self.names_checked_ns >= SYNC_SLICE_LEAST_NS:  # slices may be shorter
            self.names_checked_ns = now
            for ring in self.rings:
                check_name(<RingHandle>ring)
        return 0

    cdef void show(self, uint32_t reason) noexcept nogil:
        with gil:
            self.show_all(reason)

    cdef void show_all(self, uint32_t reason) noexcept:
        cdef RingHandle ring
        cdef int i
        for i in range(self.count):
            ring = self.rings[i]
            self.records[i].call = self.record.call
            self.records[i].turn = self.record.turn
            waiter_show(ring.header, &self.records[i], ring.myself(), reason)

    cdef void hide(self) noexcept nogil:
        with gil:
            self.hide_all()

    cdef void hide_all(self) noexcept:
        cdef RingHandle ring
        cdef int i
        for i in range(self.count):
            ring = self.rings[i]
            if ring.header != NULL:
                waiter_hide(ring.header, &self.records[i], ring.myself())

    cdef void end(self, int result) noexcept:
        cdef RingHandle ring
        for each in self.rings:
            ring = each
            if ring.header != NULL:  # closed perhaps, but mapped as long as this call counts
                ring.wake_next()


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
    cdef Wait records[WORDS]
    cdef int64_t until = deadline_of(timeout)
    cdef RingHandle ring
    cdef AnyWait wait
    cdef list ready
    cdef int i
    enter(rings)
    try:
        ready = ready_of(rings)
        check_all_open(rings)
        if ready or monotonic_ns() >= until:
            return ready
        wait = AnyWait.__new__(AnyWait)
        wait.start(None, CALL_WAIT, FOR_MESSAGE, NULL)
        wait.rings = rings
        wait.count = min(<int>len(rings), SYNC_WORDS_MOST)
        wait.words = words
        wait.announced = announced
        wait.records = records
        wait.names_checked_ns = monotonic_ns()
        wait.bell = NULL if bell is None else &bell.word
        if wait.count < len(rings):
            wait.pause_ns = CROWD_NS
        for i in range(wait.count):
            ring = rings[i]
            words[i] = &ring.header.data_wait
            records[i].slot = 0
        wait.run(until, None)
        check_all_open(rings)
        return wait.ready
    finally:
        leave(rings)


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
                wait_sleep(NULL, NULL, 0, &self.word, until - monotonic_ns(), SYNC_SLICE_NS)
            PyErr_CheckSignals()
        return True


cdef int look_now(RingHandle ring, int flags) noexcept:
    """Probe a handle that may be closed, which counts as something to take."""
    cdef int result = DONE
    handle_enter(&ring.inside)
    if not ring.closed:
        result = look(ring, flags)
    if handle_leave(&ring.inside):
        ring.last_out()
    return result


def ready_now(RingHandle ring):
    """Whether a get would return or raise at once; does not wait for a lock."""
    cdef int result = look_now(ring, 0)
    return result != EMPTY and not in_the_way(result)


def exhausted(RingHandle ring):
    """Whether nothing is left to take, not even behind a lock, a peek or a reservation."""
    return look_now(ring, BRIEFLY) == EMPTY


def pass_on(RingHandle ring):
    """Pass a wake-up on: this process was woken and took no message."""
    handle_enter(&ring.inside)
    if not ring.closed:
        ring.wake_next()
    if handle_leave(&ring.inside):
        ring.last_out()
