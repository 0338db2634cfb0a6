"""Ring handle: create, open, close, errors, and the header as numbers.

What the numbers mean is said by `shmring.diagnostics.snapshot`.  They may be
old by the time they are read, and the processes that they name wrote them:
diagnostics only.
"""

cimport cython
from cpython.exc cimport PyErr_CheckSignals
from libc.errno cimport EILSEQ, ENOMEM
from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset

from shmring._core.area cimport File, area_forget, area_is_ours, area_open, area_release, area_stat
from shmring._core.count cimport count_read
from shmring._core.diagnostics cimport (
    CALL_AIO, CALL_GET, CALL_JOIN, CALL_PEEK, CALL_PUT, CALL_RESERVE, CALL_WAIT, FOR_LEASE, FOR_LOCK, FOR_MESSAGE,
    FOR_RESERVATION, FOR_ROOM, FOR_TASKS, HELD_CONSUMER_LOCK, HELD_LEASE, HELD_PRODUCER_LOCK, HELD_RESERVATION,
    holder_pid,
)
from shmring._core.layout cimport (
    SHMRING_BLOCK_COUNT, SHMRING_BLOCK_MAGIC, SHMRING_CLAIMS_OFFSET, SHMRING_DEATH_COUNT, SHMRING_FRAME_BYTES,
    SHMRING_HEADER_BYTES, SHMRING_MAGIC, SHMRING_MAX_CAPACITY, SHMRING_MIN_CAPACITY, SHMRING_NO_CPU,
    SHMRING_VERSION, SHMRING_WAITER_COUNT, Block, Death, Header, Waiter, shmring_area_of,
)
from shmring._core.owner cimport owner_is_dead, owner_pid, owner_start_ticks
from shmring._core.ring cimport (
    BEHIND_RESERVATION, BRIEFLY, BUSY, CLAIM_HELD, CORRUPT, DONE, MAY_WAIT, POISON_AREA, POISON_FRAME,
    POISON_POSITIONS, SHUT, RingCore, Take,
)
from shmring._core.sync cimport (
    compare_exchange32, compare_exchange64, fence_full, fetch_add64, load_acquire32, load_acquire64, load_relaxed32,
    load_relaxed64, lock_is_orphan, lock_owner, monotonic_ns, nap_ns, store_relaxed64, store_release32, wait_wake_all,
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

cdef int64_t CLOSE_NS = 50000000  # what close waits for calls to leave; then the last of them unmaps


@cython.binding(False)
cdef class RingHandle(RingCore):
    """One handle of this process on one ring, with waiting, errors and closing."""

    def __cinit__(self, *args, **kwargs):
        self.closed = True

    # ---- create and open ------------------------------------------------------------------------------

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

        With `in_block` the file is the user's, and is never reclaimed.
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
        h.created_ns = <uint64_t>monotonic_ns()
        h.creator = self.myself()
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
                " (docs: containers#pid-namespaces)"
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
            if error == 0 and read == written:
                self.consumer_mapping = self.producer_mapping
                fetch_add64(&self.consumer_mapping.references, 1)
            elif error == 0:
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

    # ---- calls inside -----------------------------------------------------------------------

    cdef int give_back(self) except -1:
        cdef uint64_t capacity = load_relaxed64(&self.oversized)
        if self.closed:
            return 0
        store_relaxed64(&self.oversized, 0)
        fetch_add64(&self.inside, 1)
        with nogil:
            self.shrink(capacity, BRIEFLY)  # a get that found its message does not wait for others
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
            named, token, name = identity_of(self)
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

    # ---- questions ---------------------------------------------------------------------------------

    @property
    def capacity(self):
        """Bytes of the area that producers write to now."""
        return inside(self, capacity_of)

    @property
    def max_capacity(self):
        """Bytes to which the ring may grow."""
        return inside(self, max_capacity_of)

    def _identity(self):
        """(named, token, name given at creation): what the file is called."""
        return inside(self, identity_of)

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
        # No ValueError, which selectors would replace by its own text.
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
        return inside(self, message_count_of)

    def _put_count(self):
        return inside(self, put_count_of)

    def _max_messages(self):
        return inside(self, max_messages_of)

    # ---- shutdown and close -----------------------------------------------------------------------------------

    cdef int visit_lock(self, int side, uint32_t shutdown) except -1:
        """Take and release the producers' lock (side 0) or the consumers', which recovers it.
        `shutdown` is raised to that value under it."""
        cdef Header *h = self.header
        cdef int result = BUSY
        while result == BUSY:
            with nogil:
                result = self.lock_producers(MAY_WAIT) if side == 0 else self.lock_consumers(MAY_WAIT)
                if result == DONE:
                    if h.shutdown < shutdown:
                        store_release32(&h.shutdown, shutdown)
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

        An immediate shutdown gives memory back where no views can exist.
        """
        self.enter()
        try:
            # Each under the lock of the side that it refuses, so that no call that
            # began earlier commits after it: both counts then stand still.
            self.visit_lock(0, 1)
            if immediate:
                self.visit_lock(1, 2)
            wait_wake_all(&self.header.data_wait)
            wait_wake_all(&self.header.space_wait)
            wait_wake_all(&self.header.done_wait)
            if immediate and without_views:
                with nogil:
                    if self.find_blocks() == 0:
                        area_forget(self.header, self.blocks(), self.fd, &self.file)
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
        fence_full()  # pairs with handle_enter: a call that is not counted yet sees that it is closed
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
        fence_full()  # pairs with the count of the calls inside: one of the two sees the other
        if <int64_t>load_acquire64(<uint64_t *>&self.inside) <= 0:
            self.last_out()


# ---- the header, as numbers ---------------------------------------------------------------------

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


cdef object inside(RingHandle ring, Question question):
    """Answer a question about an open handle, which no close() unmaps meanwhile."""
    ring.enter()
    try:
        return question(ring)
    finally:
        ring.leave()


cdef object capacity_of(RingHandle ring):
    return shmring_area_of(ring.header, load_acquire64(&ring.header.write_generation)).capacity


cdef object max_capacity_of(RingHandle ring):
    return ring.header.max_capacity


cdef object max_messages_of(RingHandle ring):
    return ring.header.max_messages


cdef object put_count_of(RingHandle ring):
    return count_read(&ring.header.put_count, &ring.header.write_position)


cdef object identity_of(RingHandle ring):
    cdef Header *h = ring.header
    return load_acquire32(&h.named) != 0, h.token, h.name[:255].split(b"\0", 1)[0]


cdef object message_count_of(RingHandle ring):
    cdef Header *h = ring.header
    cdef uint64_t written, puts, gets
    cdef int _turn
    if load_acquire32(&h.shutdown) == 2:
        return 0  # what is left is never taken
    for _turn in range(1000):
        written = load_acquire64(&h.write_position)
        puts = count_read(&h.put_count, &h.write_position)
        gets = count_read(&h.get_count, &h.read_position)
        fence_full()
        if load_acquire64(&h.write_position) == written:
            break
    return puts - gets if puts > gets else 0


def user_kind(RingHandle ring):
    """Which class laid it out: 1 is Ring, 2 one of the queues."""
    return inside(ring, user_kind_of)


cdef object user_kind_of(RingHandle ring):
    return ring.header.user_kind


def counters(RingHandle ring):
    """The fields of RingStatistics that are numbers and flags."""
    return inside(ring, counters_of)


cdef object counters_of(RingHandle ring):
    cdef Header *h = ring.header
    blocks, block_bytes, lent_bytes = blocks_of(ring)
    return {
        "capacity": capacity_of(ring),
        "max_capacity": h.max_capacity,
        "used_bytes": (0 if load_acquire32(&h.shutdown) == 2
                       else load_acquire64(&h.write_position) - load_acquire64(&h.read_position)),
        "messages": message_count_of(ring),
        "messages_put": put_count_of(ring),
        "messages_taken": count_read(&h.get_count, &h.read_position),
        "bytes_put": load_acquire64(&h.write_position),
        "growths": load_acquire64(&h.write_generation),
        "blocks": blocks,
        "block_bytes": block_bytes,
        "lent_bytes": lent_bytes,
        "recoveries": load_relaxed32(&h.recoveries),
        "consumers_waiting": load_relaxed32(&h.data_wait) & 1 != 0,
        "producers_waiting": load_relaxed32(&h.space_wait) & 1 != 0,
        "shut_down": load_relaxed32(&h.shutdown) != 0,
        "poisoned": load_relaxed32(&h.poisoned) != 0,
    }


cdef object blocks_of(RingHandle ring):
    """(how many, bytes of all, bytes of those that are held)."""
    cdef const Block *block
    cdef uint64_t capacity
    cdef int count = 0, i
    total = held = 0
    ring.find_blocks()
    block = ring.blocks()
    if block != NULL:
        for i in range(<int>SHMRING_BLOCK_COUNT):
            capacity = load_relaxed64(&block[i].capacity)
            if capacity != 0:
                count += 1
                total += capacity
                held += capacity if load_relaxed64(&block[i].holder) != 0 else 0
    return count, total, held


def waiters(RingHandle ring):
    """[(pid, start ticks, thread, call, reason, since in ns)] of the living.

    Frees the records of dead processes.
    """
    return inside(ring, waiters_of)


cdef object waiters_of(RingHandle ring):
    cdef Waiter *waiter
    cdef uint64_t owner, since
    cdef uint32_t thread, call, reason
    cdef uint64_t i
    cdef list found = []
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
    return found


def holders(RingHandle ring):
    """[(pid, start ticks or 0, thread or 0, held, died)] at this moment."""
    return inside(ring, holders_of)


cdef object holders_of(RingHandle ring):
    cdef list found = []
    # the locks first, because a probe recovers that of the consumers
    add_lock(found, HELD_PRODUCER_LOCK, &ring.header.producer_lock)
    add_lock(found, HELD_CONSUMER_LOCK, &ring.header.consumer_lock)
    add_owner(found, HELD_LEASE, load_acquire64(&ring.header.lease_owner))
    add_owner(found, HELD_RESERVATION, first_reserver(ring))
    return found


cdef int add_lock(list found, int held, const uint32_t *word) except -1:
    cdef uint32_t pid = holder_pid(word)
    cdef uint32_t seen = load_acquire32(word)
    if lock_is_orphan(seen):
        found.append((pid, 0, 0, held, True))
    elif lock_owner(seen) != 0:
        # before the pid is stored, the owner is taken for the first thread of its process
        found.append((pid if pid != 0 else lock_owner(seen), 0, lock_owner(seen), held, False))
    return 0


cdef int add_owner(list found, int held, uint64_t owner) except -1:
    if owner != 0:
        found.append((owner_pid(owner), owner_start_ticks(owner), 0, held, owner_is_dead(owner)))
    return 0


cdef uint64_t first_reserver(RingHandle ring) except? 0:
    """The owner of the reservation in front; 0 if there is none, or the lock is not to be had."""
    cdef Take found
    cdef int result
    with nogil:
        result = ring.probe(&found, BRIEFLY)
    return found.owner if result == BEHIND_RESERVATION else 0


def deaths(RingHandle ring):
    """[(pid or 0, held, when in ns)]: which process died last, for each thing that can be held."""
    return inside(ring, deaths_of)


cdef object deaths_of(RingHandle ring):
    cdef Death *death
    cdef uint64_t pid, when
    cdef int held
    cdef list found = []
    for held in range(<int>SHMRING_DEATH_COUNT):
        death = &ring.header.deaths[held]
        when = load_acquire64(&death.when_ns)
        pid = load_acquire64(&death.pid)
        if when != 0 and when == load_acquire64(&death.when_ns):
            found.append((pid, held, when))
    return found
