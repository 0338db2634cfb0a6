"""What every user of a ring has: made, waited on, asked, closed.

`RingHandle` turns the attempts of `ring.pyx` into calls that wait with a
deadline, raise the exceptions of `shmring.errors`, and end well when another
thread closes the handle.  A wait is a loop of slices: release the GIL, spin
if the other side runs on another CPU, announce, look, sleep for a slice at most,
look; take the GIL, check signals and peers.
"""

cimport cython
from cpython.exc cimport PyErr_CheckSignals
from cpython.float cimport PyFloat_CheckExact
from libc.errno cimport EILSEQ, ENOMEM, ENOSPC
from libc.stdint cimport INT64_MAX, int64_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset

from shmring._core.area cimport File, area_forget, area_is_ours, area_open, area_release, area_stat
from shmring._core.ring cimport (
    BEHIND_LEASE, BEHIND_RESERVATION, BRIEFLY, BUSY, CLAIM_HELD, CORRUPT, DONE, EMPTY,
    FULL, FULL_COUNT, IS_WAITING, MAY_GROW, MAY_WAIT, PARTIAL, POISON_AREA, POISON_FRAME,
    POISON_POSITIONS, SHUT, Item, RingCore, Take,
)
from shmring._core.count cimport count_read
from shmring._core.layout cimport (
    SHMRING_CLAIMS_OFFSET, SHMRING_FRAME_BYTES, SHMRING_HEADER_BYTES, SHMRING_BLOCK_MAGIC, SHMRING_MAGIC,
    SHMRING_NO_CPU, SHMRING_MAX_CAPACITY, SHMRING_MIN_CAPACITY, SHMRING_VERSION, Header, shmring_area_of,
    shmring_frame_span,
)
from shmring._core.owner cimport owner_goes_on, owner_is_dead, owner_of
from shmring._core.spin cimport SPIN_SLEPT_NS, spin_between_looks, spin_for_writing, spin_while_equal
from shmring._core.sync cimport (
    SYNC_SLICE_LEAST_NS, SYNC_SLICE_NS, compare_exchange32, current_cpu, fence_full, fetch_add64, handle_enter,
    handle_leave,
    load_acquire32, load_acquire64, load_relaxed32, load_relaxed64, lock_owner, monotonic_ns, nap_ns,
    store_relaxed32, store_relaxed64, store_release32, sync_start, wait_announce, wait_sleep, wait_wake_all,
)
from shmring._core.diagnostics cimport (
    CALL_GET, CALL_PEEK, CALL_PUT, CALL_RESERVE, FOR_LEASE, FOR_LOCK, FOR_MESSAGE, FOR_RESERVATION, FOR_ROOM,
    Wait, witness_enter, witness_leave,
)

import errno
import os

from shmring import _warnings
from shmring.errors import (
    AccessRefused,
    InvalidArgument,
    LayoutMismatch,
    RingClosed,
    RingCorrupted,
    RingExists,
    ShutDown,
)

cdef extern from "<sys/mman.h>" nogil:
    void *mmap(void *address, size_t length, int protection, int flags, int fd, long offset)
    const int PROT_READ
    const int PROT_WRITE
    const int MAP_SHARED
    void *MAP_FAILED

cdef enum: FULL_MEMORY = 1, FULL_LIMIT = 2, FULL_SAID = 3  # full_seen
cdef int64_t GROWTH_PAUSE_NS = 1000000  # what a put waits for moving consumers before it grows
cdef int64_t STANDSTILL_NS = 300000  # consumers that have not moved for this long do not move,
cdef int64_t PREEMPTED_NS = 20000000  # or for this long, if they moved lately:
cdef int64_t LATELY_NS = 200000000
cdef int64_t CLOSE_NS = 50000000  # what close waits for calls to leave; then the last of them unmaps
cdef int64_t IDLE_NS = 30000000  # who slept a slice, or so long, for nothing gives memory back

sync_start()

# ---- deadlines and peers ---------------------------------------------------------------------------

cdef extern from *:
    """
    static __thread int shmring_brief;
    """
    int brief "shmring_brief"  # of this thread, see set_brief

cdef object PeerPoll = None  # imported when somebody first names peers


cdef int64_t deadline_of(object timeout) except -1:
    """The monotonic nanosecond at which a wait of `timeout` ends."""
    cdef double seconds
    if timeout is None:
        return INT64_MAX
    if not PyFloat_CheckExact(timeout) and watch_of(timeout) is not None:
        return deadline_of(timeout.timeout)
    seconds = timeout
    if not seconds >= 0:
        if not seconds < 0:
            raise InvalidArgument(f"timeout={timeout!r}: a number of seconds, or None to wait for ever")
        seconds = 0  # a deadline that has passed, as in shmring.arguments
    if seconds > 1e9:
        return INT64_MAX
    return monotonic_ns() + <int64_t>(seconds * 1e9)


cdef object watching(object peers, object timeout):
    """A timeout beside which `peers` are watched."""
    global PeerPoll
    if PeerPoll is None:
        from shmring.process.peers import PeerPoll as imported
        PeerPoll = imported
    return PeerPoll(peers, timeout)


cdef object watch_of(object timeout):
    """The PeerPoll that stands in the place of a timeout, or None."""
    return timeout if type(timeout) is PeerPoll else None


cdef int64_t slice_end(object watch, const Vigil *vigil, int64_t until) noexcept:
    """When the next sleep ends at the latest."""
    return until if watch is None else min(until, monotonic_ns() + vigil.pause)


cdef bint newly_dead(object watch, Vigil *vigil) except? True:
    """Asked once a slice: whether every one of the watched is now proven dead, and was not before.

    No Python is run as long as the pivot lives.  Whoever is told so looks once
    more, because what the dead committed came before their death.
    """
    if not watch.proven and (vigil.pivot == 0 or owner_is_dead(vigil.pivot)):
        if watch.all_dead():
            vigil.pause = 0
            return True
        pid, start_ticks = watch.living_peer
        vigil.pivot = owner_of(pid, start_ticks)
    vigil.pause = min(2 * vigil.pause + PEERS_FIRST_NS, PEERS_NS)
    return False


cpdef bint set_brief(bint on) noexcept:
    """Whether this thread's *_nowait calls wait for a lock a few milliseconds at most: on an event
    loop, which stands still meanwhile.  Returns what was before."""
    global brief
    cdef bint before = brief != 0
    brief = on
    return before


cdef bint is_brief() noexcept nogil:
    return brief != 0


cdef bint is_running(uint32_t *word) noexcept nogil:
    """Whether a lock's holder only needs a CPU: neither stopped nor gone.  Then even an *_nowait waits."""
    cdef uint32_t holder = lock_owner(load_relaxed32(word))
    return holder == 0 or owner_goes_on(holder) or lock_owner(load_relaxed32(word)) != holder


cdef int say_count(object error, Py_ssize_t count, Py_ssize_t done) except -1:
    """How many of a batch went in before an exception, whatever it is."""
    if count > 1:
        try:
            error.count = done
        except Exception:
            pass  # its class has other plans for that name
    return 0


@cython.binding(False)
cdef class RingHandle(RingCore):
    """One handle of this process on one ring, with waiting, errors and closing."""

    def __cinit__(self, *args, **kwargs):
        self.closed = True

    # ---- made ------------------------------------------------------------------------------

    cdef int map_header(self) except -1:
        cdef void *start = mmap(NULL, SHMRING_HEADER_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, self.fd, 0)
        if start == MAP_FAILED:
            raise OSError(ENOMEM, "the header of a ring could not be mapped: out of address space or of maps")
        self.header = <Header *>start
        return 0

    def _create(self, int fd, uint64_t capacity, uint64_t max_capacity, uint64_t max_messages,
                uint64_t pid_namespace, uint32_t user_kind, uint64_t token, bytes name=b"",
                bint in_block=False):
        """Lay a ring into the file `fd`, whose first page and first area are allocated.

        With `in_block` the file is the user's, and nobody will reclaim it.
        """
        cdef Header *h
        cdef int error
        self.fd = fd
        error = area_stat(fd, &self.file)
        if error != 0:
            raise OSError(error, os.strerror(error))
        if self.file.bytes < SHMRING_HEADER_BYTES + capacity:
            raise InvalidArgument(
                f"the file has {self.file.bytes} bytes; a ring of capacity={capacity} needs"
                f" {SHMRING_HEADER_BYTES + capacity}"
            )
        self.map_header()
        h = self.header
        if in_block and h.magic == SHMRING_BLOCK_MAGIC and load_acquire32(&h.ready) == 1:
            raise RingExists(errno.EEXIST, "the block holds a ring already: attach to it, or take another block")
        memset(h, 0, SHMRING_CLAIMS_OFFSET)  # the claims' page may not be allocated yet
        h.version = SHMRING_VERSION
        h.header_bytes = SHMRING_HEADER_BYTES
        h.min_capacity = capacity
        h.max_capacity = max_capacity
        h.max_messages = max_messages
        h.pid_namespace = pid_namespace
        h.user_kind = user_kind
        h.token = token
        h.named = name != b""
        memcpy(h.name, <char *>name, len(name) if len(name) < 256 else 0)
        h.producer_cpu = SHMRING_NO_CPU
        h.areas[0].base = 0
        h.areas[0].capacity = capacity
        h.areas[0].offset = SHMRING_HEADER_BYTES
        h.magic = SHMRING_BLOCK_MAGIC if in_block else SHMRING_MAGIC
        store_release32(&h.ready, 1)
        self.open_areas()

    def _open(self, int fd, uint64_t pid_namespace, uint32_t user_kind):
        """Open the ring in the file `fd`; False while its creator is not ready.

        `pid_namespace` is the inode of this process's; `user_kind` 0 takes any.
        """
        cdef Header *h
        cdef int error
        self.fd = fd
        error = area_stat(fd, &self.file)
        if error != 0:
            raise OSError(error, os.strerror(error))
        if self.file.bytes == 0:
            return False
        if self.file.bytes < SHMRING_HEADER_BYTES + SHMRING_MIN_CAPACITY:
            raise LayoutMismatch(f"not a ring: the file has {self.file.bytes} bytes, too few for one")
        if self.header == NULL:
            self.map_header()
        h = self.header
        if load_acquire32(&h.ready) != 1 and h.magic in (0, SHMRING_MAGIC, SHMRING_BLOCK_MAGIC):
            return False
        if h.magic != SHMRING_MAGIC and h.magic != SHMRING_BLOCK_MAGIC:
            raise LayoutMismatch(f"not a ring: it begins with {h.magic:#018x} instead of {SHMRING_MAGIC:#018x}")
        if h.version != SHMRING_VERSION or h.header_bytes != SHMRING_HEADER_BYTES:
            raise LayoutMismatch(
                f"laid out by version {h.version} of the layout (header of {h.header_bytes} bytes); this"
                f" shmring reads version {SHMRING_VERSION} ({SHMRING_HEADER_BYTES} bytes)"
            )
        if user_kind != 0 and h.user_kind != user_kind:
            raise LayoutMismatch(
                f"laid out by a class of kind {h.user_kind}, not {user_kind}: attach with the class that created it"
            )
        if pid_namespace != h.pid_namespace:
            raise AccessRefused(
                "created in another PID namespace, where process ids mean other processes: the death of a"
                " peer could not be seen; share the namespace (for containers: --pid)"
            )
        if (h.min_capacity < SHMRING_MIN_CAPACITY or h.min_capacity > h.max_capacity
                or h.max_capacity > SHMRING_MAX_CAPACITY):
            raise RingCorrupted(f"impossible capacities {h.min_capacity} and {h.max_capacity} in the header")
        self.open_areas()
        return True

    cdef int open_areas(self) except -1:
        cdef Header *h = self.header
        cdef uint64_t written, read
        cdef int error = 0
        cdef int _turn
        for _turn in range(1000):  # a generation can be given back between reading and mapping it
            written = load_acquire64(&h.write_generation)
            read = load_acquire64(&h.read_generation)
            error = area_open(h, self.fd, &self.file, written, &self.producer_mapping)
            if error == 0:
                error = area_open(h, self.fd, &self.file, read, &self.consumer_mapping)
            if load_acquire64(&h.write_generation) == written and load_acquire64(&h.read_generation) == read:
                break
            area_release(self.producer_mapping)
            area_release(self.consumer_mapping)
            self.producer_mapping = self.consumer_mapping = NULL
        if error == EILSEQ:
            raise RingCorrupted(f"generations {read} and {written}: an area lies outside the file")
        if error != 0:
            raise OSError(error, f"an area of the ring could not be mapped: {os.strerror(error)}")
        self.write_capacity = self.producer_mapping.capacity
        self.read_capacity = self.consumer_mapping.capacity
        self.known_read = 0
        self.known_limit = 0
        self.largest = h.max_capacity - SHMRING_FRAME_BYTES
        self.closed = False
        return 0

    # ---- put --------------------------------------------------------------------------------

    cdef int put_behind_moving(self, Item *items, Py_ssize_t count, Py_ssize_t *done,
                               uint64_t *position) noexcept nogil:
        """Before growing: try again for a millisecond, and another for each MiB,
        but only while consumers make progress.  Fresh pages cost several times
        what warm ones do, and a ring that stays small stays in the cache.

        Consumers that were seen to move lately may stand still for longer: they
        are probably just not running.
        """
        cdef Header *h = self.header
        cdef int64_t now = monotonic_ns()
        cdef int64_t until = now + GROWTH_PAUSE_NS + <int64_t>items[done[0]].length
        cdef int64_t moved = now
        cdef int64_t standstill = STANDSTILL_NS
        cdef uint64_t seen = load_acquire64(&h.read_position)
        cdef uint64_t full_read = load_relaxed64(&self.full_read)
        cdef uint64_t read
        cdef uint32_t announced
        cdef int result = FULL
        if seen != full_read:
            store_relaxed64(&self.moved_ns, <uint64_t>now)
        if now - <int64_t>load_relaxed64(&self.moved_ns) < LATELY_NS:
            standstill = PREEMPTED_NS
            until += PREEMPTED_NS
        elif seen == full_read:
            return FULL  # not since the last growth, or never: nobody reads
        while result == FULL and now < until and now - moved < standstill:
            announced = wait_announce(&h.space_wait)
            wait_sleep(&h.space_wait, announced, STANDSTILL_NS // 3)
            now = monotonic_ns()
            read = load_acquire64(&h.read_position)
            if read != seen:
                seen = read
                moved = now
                store_relaxed64(&self.moved_ns, <uint64_t>now)
                result = self.put_items(items, count, done, position, MAY_WAIT)
        store_relaxed64(&self.full_read, seen)
        return result

    cdef int put_slice(self, Item *items, Py_ssize_t count, Py_ssize_t *done, uint64_t *position,
                       int64_t until, Wait *wait) noexcept nogil:
        """One slice of a waiting put; looks last, so that its answer is fresh."""
        cdef Header *h = self.header
        cdef uint32_t announced
        cdef int result = self.put_items(items, count, done, position, MAY_WAIT)
        if result == FULL and h.max_capacity != h.min_capacity:
            if wait.turn == 0:
                result = self.put_behind_moving(items, count, done, position)
            if result == FULL:
                result = self.put_items(items, count, done, position, MAY_WAIT | MAY_GROW)
                if result == FULL and load_relaxed32(&self.full_seen) == 0:
                    store_relaxed32(&self.full_seen, FULL_LIMIT)
        if result == -ENOSPC and shmring_frame_span(items[done[0]].length) <= load_relaxed64(&self.write_capacity):
            if load_relaxed32(&self.full_seen) != FULL_SAID:
                store_relaxed32(&self.full_seen, FULL_MEMORY)
            result = FULL  # waits for space like a bounded queue
        if result != FULL and result != FULL_COUNT:
            return result
        announced = wait_announce(&h.space_wait)
        result = self.put_items(items, count, done, position, MAY_WAIT | IS_WAITING)
        if result == FULL or result == FULL_COUNT:
            witness_enter(h, wait, self.myself(), FOR_ROOM)
            wait_sleep(&h.space_wait, announced, until - monotonic_ns())
            result = self.put_items(items, count, done, position, MAY_WAIT)
        return result

    cdef int put_now(self, Item *items, Py_ssize_t count, Py_ssize_t *done, uint64_t *position) noexcept nogil:
        """Never waits for a reader; for the lock a millisecond at a time."""
        cdef int result = self.put_items(items, count, done, position, BRIEFLY | MAY_GROW)
        if result == -ENOSPC and shmring_frame_span(items[done[0]].length) <= load_relaxed64(&self.write_capacity):
            return FULL
        return result

    cdef Py_ssize_t put_or_wait(self, Item *items, Py_ssize_t count, uint64_t *position,
                                bint block, object timeout) except -1:
        cdef Py_ssize_t done = 0
        cdef Py_ssize_t i
        cdef int64_t limit, until = 0
        cdef Vigil vigil
        cdef uint64_t bytes = 0
        cdef Wait wait
        cdef int result = BUSY
        if block and timeout is not None:
            until = deadline_of(timeout)
        handle_enter(&self.inside)
        try:
            if self.closed:
                self.check_open()
            for i in range(count):
                bytes += items[i].length
                if items[i].length > self.largest:
                    raise _warnings.too_large(items[i].length, self.header.max_capacity, self.largest)
            if bytes <= GIL_BYTES:
                result = self.put_items(items, count, &done, position, 0)
                if result == DONE:
                    return done
            if ends_wait(result):
                self.raise_counted(result, count, done)
            if not block:
                until = monotonic_ns() + (0 if is_brief() else HOLDER_NS)
            elif timeout is None:
                until = INT64_MAX
            watch = watch_of(timeout)
            wait.call = CALL_RESERVE if items[0].owner != 0 else CALL_PUT
            wait.turn = wait.slot = 0
            vigil.pivot = 0
            vigil.pause = PEERS_FIRST_NS
            fetch_add64(&self.inside, 1)
            try:
                while True:
                    limit = slice_end(watch, &vigil, until)
                    with nogil:
                        if block:
                            result = self.put_slice(items, count, &done, position, limit, &wait)
                        else:
                            result = self.put_now(items, count, &done, position)
                    if ends_wait(result):
                        break
                    wait.turn += 1
                    PyErr_CheckSignals()
                    if watch is not None and not self.closed:
                        if watch.proven and result != BUSY:
                            raise watch.error("no room came", done)
                        if newly_dead(watch, &vigil):
                            continue  # look once more
                    if (self.closed or monotonic_ns() >= until
                            or not (block or (result == BUSY and is_running(&self.header.producer_lock)))):
                        break
                    if result == BUSY:
                        witness_enter(self.header, &wait, self.myself(), FOR_LOCK)
                    elif result == FULL and load_relaxed32(&self.full_seen) in (FULL_MEMORY, FULL_LIMIT):
                        self.say_full()
            except BaseException as error:
                say_count(error, count, done)
                raise
            finally:
                witness_leave(self.header, &wait, self.myself())
                self.leave()
            if result == DONE:
                return done
            if ends_wait(result) or self.closed:
                self.raise_counted(result, count, done)
            if block:
                self.step_back()
            return done
        finally:
            if handle_leave(&self.inside):
                self.last_out()

    cdef int raise_counted(self, int outcome, Py_ssize_t count, Py_ssize_t done) except -1:
        try:
            if ends_wait(outcome):
                self.raise_outcome(outcome)
            self.check_open()
        except BaseException as error:
            say_count(error, count, done)
            raise
        return 0

    cdef int say_full(self) except -1:
        """Once a handle: what was meant to grow waits."""
        limit = None if load_relaxed32(&self.full_seen) == FULL_MEMORY else self.header.max_capacity
        store_relaxed32(&self.full_seen, FULL_SAID)
        _warnings.warn_full(limit)
        return 0

    # ---- take -------------------------------------------------------------------------------

    cdef int spin_and_take(self, Take *take) noexcept nogil:
        """Worth it only while the producers run on another CPU, and something is expected soon."""
        cdef Header *h = self.header
        cdef uint32_t other = load_relaxed32(&h.producer_cpu)
        cdef int64_t until
        cdef int result = EMPTY
        if (load_relaxed64(&self.slept_ns) <= SPIN_SLEPT_NS and other != SHMRING_NO_CPU and other != current_cpu()
                and spin_while_equal(&h.write_position, &h.read_position)):
            result = self.take(take, MAY_WAIT)
            if result == BEHIND_RESERVATION:
                until = monotonic_ns() + spin_for_writing(take.length)
                while result == BEHIND_RESERVATION and monotonic_ns() < until:
                    spin_between_looks()
                    result = self.take(take, MAY_WAIT)
        return result

    cdef int take_slice(self, Take *take, int64_t until, Wait *wait) noexcept nogil:
        """One slice of a waiting take; looks last, so that its answer is fresh."""
        cdef Header *h = self.header
        cdef uint32_t announced
        cdef int64_t began, woke
        cdef int result
        if wait.turn == 0:
            result = self.spin_and_take(take)
            if ends_wait(result):
                return result
        announced = wait_announce(&h.data_wait)
        result = self.take(take, MAY_WAIT)
        if result == BEHIND_LEASE or result == BEHIND_RESERVATION:
            self.clear_the_way(take, result, MAY_WAIT)
            result = self.take(take, MAY_WAIT)
        if result != EMPTY and result != BEHIND_LEASE and result != BEHIND_RESERVATION:
            return result
        witness_enter(h, wait, self.myself(), (
            FOR_MESSAGE if result == EMPTY else FOR_LEASE if result == BEHIND_LEASE else FOR_RESERVATION))
        began = monotonic_ns()
        wait_sleep(&h.data_wait, announced, until - began)
        woke = monotonic_ns()
        store_relaxed64(&self.slept_ns, <uint64_t>(woke - began))
        result = self.take(take, MAY_WAIT)
        if result == EMPTY:
            if (woke - began >= (SYNC_SLICE_LEAST_NS if until - began > SYNC_SLICE_NS else IDLE_NS)
                    and (load_relaxed64(&self.read_capacity) != h.min_capacity
                         or load_relaxed64(&h.write_generation) != load_relaxed64(&h.read_generation))):
                self.settle(h.min_capacity, MAY_WAIT)
        elif result == BEHIND_LEASE or result == BEHIND_RESERVATION:
            self.clear_the_way(take, result, MAY_WAIT)
        return result

    cdef int take_now(self, Take *take) noexcept nogil:
        """Never waits for a message; for the lock a millisecond at a time."""
        cdef int result = self.take(take, BRIEFLY)
        if result == BEHIND_LEASE or result == BEHIND_RESERVATION:
            self.clear_the_way(take, result, BRIEFLY)
            result = self.take(take, BRIEFLY)
        return result

    cdef int take_or_wait(self, Take *take, bint block, object timeout) except -1:
        cdef int64_t limit, until = 0
        cdef Vigil vigil
        cdef Wait wait
        cdef int result
        if block and timeout is not None:
            until = deadline_of(timeout)  # may run Python, and that may close the handle
        handle_enter(&self.inside)
        try:
            if self.closed:
                self.check_open()
            take.target_count = 0
            result = self.take(take, 0)
            if result == DONE or result == PARTIAL or (result == EMPTY and not block and timeout is None):
                if load_relaxed64(&self.oversized) != 0:
                    self.give_back()
                return result
            if ends_wait(result):
                self.raise_outcome(result)
            if not block:
                until = monotonic_ns() + (0 if is_brief() else HOLDER_NS)
            elif timeout is None:
                until = INT64_MAX
            watch = watch_of(timeout)
            wait.call = CALL_PEEK if take.leaser != 0 else CALL_GET
            wait.turn = wait.slot = 0
            vigil.pivot = 0
            vigil.pause = PEERS_FIRST_NS
            fetch_add64(&self.inside, 1)
            try:
                while True:
                    limit = slice_end(watch, &vigil, until)
                    with nogil:
                        if block:
                            result = self.take_slice(take, limit, &wait)
                        else:
                            result = self.take_now(take)
                    if ends_wait(result):
                        break
                    wait.turn += 1
                    try:
                        PyErr_CheckSignals()
                        if watch is not None and not self.closed:
                            if watch.proven and result == EMPTY:
                                raise watch.error("nothing is left to take")
                            if newly_dead(watch, &vigil):
                                continue  # look once more
                    except BaseException:
                        self.pass_baton()  # we may be the one who was woken
                        raise
                    if (self.closed or monotonic_ns() >= until
                            or not (block or (result == BUSY and is_running(&self.header.consumer_lock)))):
                        self.pass_baton()
                        break
                    if result == BUSY:
                        witness_enter(self.header, &wait, self.myself(), FOR_LOCK)
                    elif block:
                        self.look_for_name()
            finally:
                witness_leave(self.header, &wait, self.myself())
                self.leave()
            if result == DONE or result == PARTIAL:
                return result
            if ends_wait(result):
                self.raise_outcome(result)
            if self.closed:
                self.check_open()
            return result
        finally:
            if handle_leave(&self.inside):
                self.last_out()

    cdef int look_for_name(self) except -1:
        """Once a slice of a wait for messages.  When two found no name, the log says so, once a
        handle; at the second, because a new name is marked before it appears."""
        if self.name_gone == 2 or load_relaxed32(&self.header.named) == 0:
            return 0
        if not _warnings.name_is_gone(self.fd):
            self.name_gone = 0
            return 0
        self.name_gone += 1
        if self.name_gone == 2:
            _, token, name = self._identity()
            _warnings.warn_name_is_gone(name, token)
        return 0

    cdef int give_back(self) except -1:
        cdef uint64_t capacity = load_relaxed64(&self.oversized)
        if self.closed:
            return 0
        store_relaxed64(&self.oversized, 0)
        fetch_add64(&self.inside, 1)
        with nogil:
            self.settle(capacity, BRIEFLY)  # a get that found its message does not wait for others
        self.leave()
        return 0

    cdef int enter(self) except -1:
        """Count a call that lets go of the GIL: close() unmaps after the last one."""
        fetch_add64(&self.inside, 1)
        fence_full()
        if self.closed:
            self.leave()
            self.check_open()
        return 0

    cdef void leave(self) noexcept:
        cdef int64_t before = fetch_add64(&self.inside, -1)
        if before <= 0:  # entered before a fork, which has set the count to zero
            fetch_add64(&self.inside, 1)
        if before <= 1:
            self.last_out()

    cdef void last_out(self) noexcept:
        """No call is inside at this moment: where a close left it to us, unmap."""
        fence_full()
        if load_acquire32(&self.ending) == 2 and compare_exchange32(&self.ending, 2, 3):
            named, token, name = self.identity()
            identity = (self.file.device, self.file.inode)
            self.unmap()
            self._left(named, token, name, identity)

    def _left(self, named, token, name, identity):
        """Hook: the mapping is gone, and what must follow that may be done."""

    # ---- errors ------------------------------------------------------------------------------

    cdef int check_open(self) except -1:
        if self.closed:
            raise self._why_closed()
        return 0

    def _why_closed(self):
        """What a call on the closed handle raises."""
        return RingClosed(f"{type(self).__name__} is closed: this handle cannot be used again")

    cdef int raise_outcome(self, int outcome) except -1:
        if outcome == SHUT:
            raise ShutDown(f"{type(self).__name__} is shut down")
        if outcome == CLAIM_HELD:
            raise RuntimeError("the claim of the previous message was not released: answer it first")
        if outcome == CORRUPT and self.header == NULL:
            self.check_open()
        if outcome == CORRUPT:
            raise _warnings.corrupted({
                0: "owner", POISON_POSITIONS: "positions", POISON_FRAME: "frame", POISON_AREA: "area",
            }.get(load_relaxed32(&self.header.poisoned)), self.header.write_position, self.header.read_position)
        if outcome < 0:
            raise _warnings.system_error(-outcome)
        raise RuntimeError(f"outcome {outcome} has no exception")

    # ---- asked ---------------------------------------------------------------------------------

    @property
    def capacity(self):
        """Bytes of the area that producers write to now."""
        self.enter()
        try:
            return shmring_area_of(self.header, load_acquire64(&self.header.write_generation)).capacity
        finally:
            self.leave()

    @property
    def max_capacity(self):
        """Bytes to which the ring may grow."""
        self.enter()
        try:
            return self.header.max_capacity
        finally:
            self.leave()

    def _identity(self):
        """(named, token, name given at creation): what the file is called."""
        self.enter()
        try:
            return self.identity()
        finally:
            self.leave()

    cdef tuple identity(self):
        cdef Header *h = self.header
        return load_acquire32(&h.named) != 0, h.token, h.name[:255].split(b"\0", 1)[0]

    def _file(self):
        """What tells the ring's file from others: (st_dev, st_ino)."""
        return self.file.device, self.file.inode

    def _set_named(self, bint named):
        self.enter()
        store_release32(&self.header.named, named)
        self.leave()

    def fileno(self):
        """There is none that becomes readable when a message comes: always an error.

        Raises:
            OSError: wait with shmring.wait, which takes queues, processes and files.
        """
        # No ValueError, in whose place selectors would say something of its own.
        raise OSError(
            errno.EOPNOTSUPP,
            f"{type(self).__name__} has no descriptor to select on: wait with"
            " shmring.wait([queue, process, connection, ...])")

    def _fileno(self):
        """The file descriptor of the ring's file."""
        cdef File found
        self.check_open()
        if area_is_ours(self.fd, &self.file, &found) != 0:
            raise _warnings.system_error(errno.EBADF)
        return self.fd

    def _qsize(self):
        """Messages in the ring: true at an instant during the call."""
        cdef Header *h
        cdef uint64_t written, puts, gets
        cdef int _turn
        self.enter()
        try:
            h = self.header
            if load_acquire32(&h.shutdown) == 2:
                return 0  # nobody gets what is left
            for _turn in range(1000):
                written = load_acquire64(&h.write_position)
                puts = count_read(&h.put_count, &h.write_position)
                gets = count_read(&h.get_count, &h.read_position)
                fence_full()
                if load_acquire64(&h.write_position) == written:
                    break
            return puts - gets if puts > gets else 0
        finally:
            self.leave()

    def _put_count(self):
        self.enter()
        try:
            return count_read(&self.header.put_count, &self.header.write_position)
        finally:
            self.leave()

    def _max_messages(self):
        self.enter()
        try:
            return self.header.max_messages
        finally:
            self.leave()

    # ---- ended -----------------------------------------------------------------------------------

    cdef int refuse(self, int side, uint32_t state) except -1:
        """Raise `shutdown` to `state` under the producers' lock (side 0) or the consumers'."""
        cdef Header *h = self.header
        cdef int result = BUSY
        while result == BUSY:
            with nogil:
                result = self.lock_producers(MAY_WAIT) if side == 0 else self.lock_consumers(MAY_WAIT)
                if result == DONE:
                    if h.shutdown < state:
                        store_release32(&h.shutdown, state)
                    if side == 0:
                        self.unlock_producers()
                    else:
                        self.unlock_consumers()
            PyErr_CheckSignals()
        if result != DONE:
            self.raise_outcome(result)
        return 0

    def _shutdown(self, bint immediate, bint without_views=False):
        """Refuse further puts in every process; gets too, at once or when empty.

        What is dropped at once gives its memory back where views cannot exist: nobody looks at it.
        """
        self.enter()
        try:
            # Each refusal under the lock of those whom it refuses, so that none who
            # began earlier commits after it: both counts then stand still.
            self.refuse(0, 1)
            if immediate:
                self.refuse(1, 2)
            wait_wake_all(&self.header.data_wait)
            wait_wake_all(&self.header.space_wait)
            wait_wake_all(&self.header.done_wait)
            if immediate and without_views:
                with nogil:
                    area_forget(self.fd, &self.file)
        finally:
            self.leave()

    def _adopt(self):
        """In a child right after fork: threads that were inside, and views, stayed behind."""
        self.inside = 0
        self.views = 0
        if self.closed:
            self.last_out()

    def _close(self):
        """Leave the ring: unmap, and close the descriptor.  Others go on.

        BufferError while a view lives; another call after its end succeeds.
        Calls of this process that wait in the ring get RingClosed.  One that
        cannot leave meanwhile, because this call interrupted it, unmaps when it does.
        """
        cdef int64_t until
        if self.views > 0:
            raise BufferError(f"{self.views} view(s) into the ring are alive: release them, then close")
        if not compare_exchange32(&self.ending, 0, 1):
            return  # another thread closes it, or did
        if self.header == NULL:
            self.closed = True
            self.unmap()
            return
        self.closed = True
        fence_full()  # pairs with handle_enter: who is not counted yet will see that it is closed
        if self.views > 0:  # a reserve() or peek() succeeded meanwhile
            self.closed = False
            store_release32(&self.ending, 0)
            raise BufferError(f"{self.views} view(s) into the ring are alive: release them, then close")
        until = monotonic_ns() + CLOSE_NS
        while <int64_t>load_acquire64(<uint64_t *>&self.inside) > 0:
            wait_wake_all(&self.header.data_wait)
            wait_wake_all(&self.header.space_wait)
            wait_wake_all(&self.header.done_wait)
            if monotonic_ns() >= until:
                break
            with nogil:
                nap_ns(200000)
        store_release32(&self.ending, 2)
        fence_full()  # pairs with the count of who leaves: one of us sees the other
        if <int64_t>load_acquire64(<uint64_t *>&self.inside) <= 0:
            self.last_out()
