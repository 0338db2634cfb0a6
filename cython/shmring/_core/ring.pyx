# distutils: language = c
"""RingCore: put, take, growth and recovery on one shared file.

`RingCore` knows bytes and a file descriptor.  What a message means is decided
by the classes above it (`bytes_ring.pyx`, `object_ring.pyx`); how the file is made
and which process may open it, by `shmring.shm.segment`.

Every operation is one attempt that runs without the GIL's help and never
blocks on Python: lock, look, copy, commit with one store, unlock, wake.  The
attempt is made with the GIL held first, because releasing it costs more than
most attempts; what has to wait is repeated in slices with the GIL released,
and signals are checked between slices.  docs/design.md maps each store to the
protocol.
"""

cimport cython
from libc.errno cimport EILSEQ, ENOSPC
from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.string cimport memcpy
from posix.unistd cimport close

from shmring._core.area cimport (
    AREA_GARBAGE, File, Mapping, area_grow, area_is_ours, area_may_shrink, area_next_capacity, area_open,
    area_power_of_two, area_reap, area_release, area_tidy,
)
from shmring._core.block cimport block_recover, block_return, block_space_leave, block_space_open, block_start
from shmring._core.count cimport count_at, count_on, count_read
from shmring._core.frame cimport frame_begin, frame_is_possible
from shmring._core.lending cimport adopt_blocks
from shmring._core.layout cimport (
    SHMRING_ABORTED, SHMRING_AREA_COUNT, SHMRING_AREAS_OFFSET, SHMRING_BLOCK_COUNT, SHMRING_BLOCK_MAGIC,
    SHMRING_BLOCKS_BYTES, SHMRING_CLAIM_COUNT, SHMRING_CLAIMS_OFFSET, SHMRING_CONSUMERS_OFFSET, SHMRING_DEATH_COUNT,
    SHMRING_DEATHS_OFFSET, SHMRING_FRAME_BYTES, SHMRING_HEADER_BYTES, SHMRING_JOINING_OFFSET, SHMRING_KIND_MULTI,
    SHMRING_LENT, SHMRING_MAGIC, SHMRING_MAX_CAPACITY, SHMRING_MIN_CAPACITY, SHMRING_PRODUCERS_OFFSET,
    SHMRING_RESERVED, SHMRING_VERSION, SHMRING_WAITER_COUNT, SHMRING_WAITERS_OFFSET, SHMRING_WAITING_OFFSET,
    SHMRING_WHOLE, Block, Claim, Frame, Header, shmring_area_of, shmring_frame_span,
)
from shmring._core.owner cimport OWNER_PID_BITS, owner_is_dead, owner_of, owner_pid, owner_self
from shmring._core.sync cimport (
    LOCK_BUSY, LOCK_GARBAGE, LOCK_TAKEN, SYNC_SLICE_NS,
    compare_exchange32, compare_exchange64, fence_after_unlock, fence_full, fetch_add32, fetch_add64,
    load_acquire32, load_acquire64, load_relaxed32, load_relaxed64, lock_release, lock_try, lock_wait,
    monotonic_ns, store_relaxed64, store_release32, store_release64, sync_epoch, sync_start,
    wait_wake_all, wait_wake_one, wait_wants_wake,
)
from shmring._core.diagnostics cimport (
    HELD_CONSUMER_LOCK, HELD_LEASE, HELD_PRODUCER_LOCK, HELD_RESERVATION, death_record, holder_show,
    holder_pid, holder_hide, user_show,
)

cdef extern from "<sys/mman.h>" nogil:
    int munmap(void *address, size_t length)

cdef int64_t RESERVED_NS = 300000000  # how long a waiting producer's need counts
cdef int64_t BRIEFLY_NS = 1000000  # what an *_nowait call waits for a lock at most

sync_start()
block_start()

# The layout's numbers, for Python code that reads or makes a header.
LAYOUT = dict(
    MAGIC=SHMRING_MAGIC, BLOCK_MAGIC=SHMRING_BLOCK_MAGIC, VERSION=SHMRING_VERSION,
    HEADER_BYTES=SHMRING_HEADER_BYTES, WAITING_OFFSET=SHMRING_WAITING_OFFSET,
    PRODUCERS_OFFSET=SHMRING_PRODUCERS_OFFSET, CONSUMERS_OFFSET=SHMRING_CONSUMERS_OFFSET,
    JOINING_OFFSET=SHMRING_JOINING_OFFSET, DEATHS_OFFSET=SHMRING_DEATHS_OFFSET,
    DEATH_COUNT=SHMRING_DEATH_COUNT, AREAS_OFFSET=SHMRING_AREAS_OFFSET, AREA_COUNT=SHMRING_AREA_COUNT,
    WAITERS_OFFSET=SHMRING_WAITERS_OFFSET, WAITER_COUNT=SHMRING_WAITER_COUNT,
    CLAIMS_OFFSET=SHMRING_CLAIMS_OFFSET, CLAIM_COUNT=SHMRING_CLAIM_COUNT, FRAME_BYTES=SHMRING_FRAME_BYTES,
    MIN_CAPACITY=SHMRING_MIN_CAPACITY, MAX_CAPACITY=SHMRING_MAX_CAPACITY, WHOLE=SHMRING_WHOLE,
    RESERVED=SHMRING_RESERVED, ABORTED=SHMRING_ABORTED, LENT=SHMRING_LENT, BLOCK_COUNT=SHMRING_BLOCK_COUNT,
    BLOCKS_BYTES=SHMRING_BLOCKS_BYTES,
)


def is_dead(uint64_t pid, uint64_t start_ticks, /):
    """Whether the kernel proves that a process has ended; without its start time, 0, a later one
    of the same pid is taken for it."""
    return pid >> OWNER_PID_BITS != 0 or owner_is_dead(owner_of(<uint32_t>pid, start_ticks))


cdef void leave_blocks(BlockSpace *space) noexcept nogil:
    block_space_leave(space)


cdef void return_block(BlockSpace *space, int index, char *data, uint64_t capacity, uint32_t epoch,
                       uint64_t owner) noexcept nogil:
    block_return(space, index, data, capacity, epoch, owner)


cdef uint64_t owner  # this process, found out when first needed: asking /proc takes 20 us
cdef uint32_t owner_epoch


@cython.binding(False)
cdef class RingCore:
    """One handle of this process on one ring.

    It owns its file descriptor.
    """

    def __cinit__(self, *args, **kwargs):
        self.header = NULL
        self.fd = -1
        self.producer_mapping = self.consumer_mapping = NULL
        self.producer_stale = self.consumer_stale = NULL
        self.claim = NULL
        self.space = NULL

    def __dealloc__(self):
        self.unmap()

    cdef void unmap(self):
        cdef int fd
        cdef File found
        area_release(self.producer_mapping)
        area_release(self.consumer_mapping)
        self.producer_mapping = self.consumer_mapping = NULL
        if self.header != NULL:
            munmap(self.header, SHMRING_HEADER_BYTES)
            self.header = NULL
        if self.space != NULL:  # the views keep it
            block_space_leave(self.space)
            self.space = NULL
        if self.fd >= 0:
            fd = self.fd
            self.fd = -1
            if area_is_ours(fd, &self.file, &found) == 0:  # the number may be another file's by now
                close(fd)

    # ---- locks ----------------------------------------------------------------------------

    @cython.final
    cdef int lock_slowly(self, uint32_t *word, int tried, int flags) noexcept nogil:
        """The lock word was not simply free."""
        cdef int result = tried
        cdef bint producers = word == &self.header.producer_lock
        if result == LOCK_BUSY and flags & (MAY_WAIT | BRIEFLY):
            result = lock_wait(word, SYNC_SLICE_NS if flags & MAY_WAIT else BRIEFLY_NS)
        if result == LOCK_TAKEN:
            holder_show(word)
            return DONE
        if result == LOCK_BUSY:
            return BUSY
        if result == LOCK_GARBAGE:
            return CORRUPT
        death_record(self.header, HELD_PRODUCER_LOCK if producers else HELD_CONSUMER_LOCK, holder_pid(word))
        holder_show(word)
        result = self.recover_producers() if producers else self.recover_consumers()
        if result != DONE and producers:
            self.unlock_producers()
        elif result != DONE:
            self.unlock_consumers()
        return result

    cdef int lock_producers(self, int flags) noexcept nogil:
        cdef int tried = lock_try(&self.header.producer_lock)
        if tried != LOCK_TAKEN:
            return self.lock_slowly(&self.header.producer_lock, tried, flags)
        holder_show(&self.header.producer_lock)
        return DONE

    cdef int lock_consumers(self, int flags) noexcept nogil:
        cdef int tried = lock_try(&self.header.consumer_lock)
        if tried != LOCK_TAKEN:
            return self.lock_slowly(&self.header.consumer_lock, tried, flags)
        holder_show(&self.header.consumer_lock)
        return DONE

    cdef void unlock_producers(self) noexcept nogil:
        cdef Mapping *stale = self.producer_stale
        self.producer_stale = NULL
        holder_hide(&self.header.producer_lock)
        lock_release(&self.header.producer_lock)
        if stale != NULL:
            area_release(stale)

    cdef void unlock_consumers(self) noexcept nogil:
        cdef Mapping *stale = self.consumer_stale
        self.consumer_stale = NULL
        holder_hide(&self.header.consumer_lock)
        lock_release(&self.header.consumer_lock)
        if stale != NULL:
            area_release(stale)

    @cython.final
    cdef int poison(self, uint32_t reason) noexcept nogil:
        store_release32(&self.header.poisoned, reason)
        wait_wake_all(&self.header.data_wait)
        wait_wake_all(&self.header.space_wait)
        return CORRUPT

    @cython.final
    cdef int recover_producers(self) noexcept nogil:
        """The last owner died.  What it wrote is committed or was never visible."""
        cdef Header *h = self.header
        cdef uint64_t pos = h.write_position
        cdef uint64_t read = load_acquire64(&h.read_position)
        cdef int error
        fetch_add32(&h.recoveries, 1)
        if read > pos or pos % 8 != 0:
            return self.poison(POISON_POSITIONS)
        h.starved_producer = h.reserved_space = h.reserved_until_ns = 0
        if h.max_capacity != h.min_capacity:
            error = self.find_blocks()
            if error == 0 and self.space != NULL:
                block_recover(self.space, pos)
            if error == 0:
                error = area_tidy(h, self.blocks(), self.fd, &self.file)  # pages of a growth that was cut short
            if error == EILSEQ:
                return self.poison(POISON_AREA)
        wait_wake_all(&h.data_wait)
        wait_wake_all(&h.space_wait)
        return DONE

    @cython.final
    cdef int recover_consumers(self) noexcept nogil:
        """The last owner died, perhaps between writing a claim and the commit."""
        cdef Header *h = self.header
        cdef uint64_t pos = h.read_position
        cdef uint64_t i
        fetch_add32(&h.recoveries, 1)
        if pos > load_acquire64(&h.write_position) or pos % 8 != 0:
            return self.poison(POISON_POSITIONS)
        for i in range(SHMRING_CLAIM_COUNT):
            # before the next take, or these messages would be claimed twice
            if load_relaxed64(&h.claims[i].high) > pos:
                store_release64(&h.claims[i].high, h.claims[i].low)
        if h.lease_owner != 0 and h.lease_high <= pos:
            store_release64(&h.lease_owner, 0)
        if area_reap(h, self.fd, &self.file) == EILSEQ:
            return self.poison(POISON_AREA)
        wait_wake_all(&h.data_wait)
        wait_wake_all(&h.space_wait)
        return DONE

    cdef uint64_t myself(self) noexcept nogil:
        cdef uint32_t epoch = sync_epoch()
        if load_acquire32(&owner_epoch) != epoch:
            store_relaxed64(&owner, owner_self())
            store_release32(&owner_epoch, epoch)  # last: threads without the GIL look as well
        return load_relaxed64(&owner)

    # ---- put ------------------------------------------------------------------------------

    cdef int put_items(self, Item *items, Py_ssize_t count, Py_ssize_t *done,
                       uint64_t *position, int flags) noexcept nogil:
        """Put as many of `items` from `done` on as fit, under one lock."""
        cdef Py_ssize_t before = done[0]
        cdef int result = RingCore.lock_producers(self, flags)
        if result != DONE:
            return result
        result = self.put_locked(items, count, done, position, flags)
        RingCore.unlock_producers(self)
        if done[0] != before:
            self.wake_consumers()
        return result

    @cython.final
    cdef int put_locked(self, Item *items, Py_ssize_t count, Py_ssize_t *done,
                        uint64_t *position, int flags) noexcept nogil:
        cdef Header *h = self.header
        cdef uint64_t pos, start, read, taken, span = 0
        cdef uint64_t budget = 0xFFFFFFFFFFFFFFFF
        cdef Py_ssize_t at = done[0]
        cdef Py_ssize_t j
        cdef Item *item
        cdef Segment segment
        cdef Frame *frame
        cdef char *out
        cdef int result = DONE
        cdef int i
        cdef Mapping *m = self.producer_mapping
        if load_relaxed32(&h.poisoned) != 0:
            return CORRUPT
        if load_relaxed32(&h.shutdown) != 0:
            return SHUT
        if m.generation != h.write_generation:
            result = area_open(h, self.fd, &self.file, h.write_generation, &m)
            if result != 0:
                return self.poison(POISON_AREA) if result == EILSEQ else -result
            self.producer_stale = self.producer_mapping
            self.producer_mapping = m
            store_relaxed64(&self.write_capacity, m.capacity)
        start = pos = h.write_position
        if pos & 7:
            return self.poison(POISON_POSITIONS)
        if h.max_messages != 0:
            taken = count_at(&h.put_count, pos) - count_read(&h.get_count, &h.read_position)
            budget = h.max_messages - taken if taken < h.max_messages else 0
        while at < count:
            if budget == 0:
                result = FULL_COUNT
                break
            span = shmring_frame_span(items[at].length)
            read = self.known_read if self.known_read > m.base else m.base
            # in this form a position before `read` ends up here too, instead of overflowing
            if span > m.capacity or pos - read > m.capacity - span or h.reserved_until_ns != 0:
                result = self.make_room(pos, span, span, 0)
                if result == FULL and flags & MAY_GROW:
                    taken = 0
                    for j in range(at, count):
                        taken += shmring_frame_span(items[j].length)
                    if pos != start:  # the area's base is the committed position
                        count_on(&h.put_count, start, pos, at - done[0])
                        store_release64(&h.write_position, pos)
                        start = pos
                        done[0] = at
                    result = self.make_room(pos, span, taken, MAY_GROW)
                    m = self.producer_mapping
                if result != DONE:
                    break
            item = &items[at]
            frame = <Frame *>(m.data + (pos & m.mask))
            out = <char *>frame + SHMRING_FRAME_BYTES
            frame_begin(frame, pos, item.length, item.kind, SHMRING_WHOLE, item.owner)
            if item.lending != NULL:
                frame.state = SHMRING_LENT
                for i in range(item.lending.count):  # counts with the commit, not before
                    store_release64(&item.lending.space.blocks[item.lending.indices[i]].position, pos)
                item.lending.sent = True
            elif item.owner != 0:  # written in place, after the lock is released
                frame.state = SHMRING_RESERVED
                fetch_add64(&m.references, 1)
                item.mapping = m
                item.payload = out
            for segment in item.segments[:item.count]:
                memcpy(out, segment.data, segment.length)
                out += segment.length
            if position != NULL:
                position[0] = pos
            pos += span
            at += 1
            budget -= 1
        if pos != start:
            count_on(&h.put_count, start, pos, at - done[0])
            if start & (CPU_BYTES - 1) < pos - start:
                note_cpu(h)
                user_show(&h.last_producer)
            store_release64(&h.write_position, pos)  # the commit
            if h.starved_producer != 0 and h.starved_producer == self.starved_name():
                h.starved_producer = h.reserved_space = h.reserved_until_ns = 0
            done[0] = at
        elif flags & IS_WAITING and result == FULL and load_relaxed64(&h.reserved_until_ns) < <uint64_t>monotonic_ns():
            h.starved_producer = self.starved_name()
            h.reserved_space = span
            h.reserved_until_ns = <uint64_t>(monotonic_ns() + RESERVED_NS)
        return result

    @cython.final
    cdef int make_room(self, uint64_t pos, uint64_t span, uint64_t following, int flags) noexcept nogil:
        """Is there room for `span` bytes, now that it looks short?  May grow."""
        cdef Header *h = self.header
        cdef Mapping *m = self.producer_mapping
        cdef uint64_t read = load_acquire64(&h.read_position)
        cdef uint64_t need = span
        cdef uint64_t wanted, used, now
        cdef int error
        used = pos - (read if read > m.base else m.base)
        if read > pos or used > m.capacity:
            return self.poison(POISON_POSITIONS)
        self.known_read = read
        if h.reserved_until_ns != 0:
            now = <uint64_t>monotonic_ns()
            if h.reserved_until_ns - now > <uint64_t>RESERVED_NS:  # passed, or forged
                h.starved_producer = h.reserved_space = h.reserved_until_ns = 0
            elif h.starved_producer != self.starved_name() and h.reserved_space <= m.capacity:
                need += h.reserved_space  # keep space for the starved producer
                if need > m.capacity and span <= m.capacity:
                    need = m.capacity
        if used + need <= m.capacity:
            return DONE
        if not flags & MAY_GROW:
            return FULL
        # room for what follows, and for two of the kind: one is written while one is read
        wanted = following if following > 2 * span else 2 * span
        wanted = area_next_capacity(h, m.capacity, span, wanted)
        if wanted == AREA_GARBAGE:
            return self.poison(POISON_AREA)
        if wanted == 0:
            return FULL
        error = self.find_blocks()
        if error == 0:
            error = area_grow(h, self.blocks(), self.fd, &self.file, wanted, &m)
        while error == ENOSPC and wanted // 2 >= span and wanted > SHMRING_MIN_CAPACITY:
            wanted //= 2  # less than hoped for is better than waiting
            error = area_grow(h, self.blocks(), self.fd, &self.file, wanted, &m)
        if error != 0:
            return self.poison(POISON_AREA) if error == EILSEQ else -error
        if self.producer_stale != NULL:  # this handle was a generation behind already
            area_release(self.producer_stale)
        self.producer_stale = self.producer_mapping
        self.producer_mapping = m
        store_relaxed64(&self.write_capacity, m.capacity)
        return DONE

    cdef void give_up_space(self) noexcept nogil:
        """A producer that gives up needs no space any more."""
        cdef Header *h = self.header
        if self.lock_producers(BRIEFLY) == DONE:
            if h.starved_producer == self.starved_name():
                h.starved_producer = h.reserved_space = h.reserved_until_ns = 0
            self.unlock_producers()

    @cython.final
    cdef uint64_t starved_name(self) noexcept nogil:
        """Tells this handle from others, in this process and elsewhere; never 0."""
        return (self.myself() ^ <uint64_t><size_t><void *>self) | 1

    @cython.final
    cdef void wake_consumers(self) noexcept nogil:
        fence_after_unlock()
        if wait_wants_wake(&self.header.data_wait):
            wait_wake_one(&self.header.data_wait)

    cdef void wake_producers(self) noexcept nogil:
        """After a get.  At half empty, not at the first free byte: fewer
        switches; a producer that is not woken looks by itself each slice."""
        cdef Header *h = self.header
        cdef uint64_t used
        fence_after_unlock()
        if not wait_wants_wake(&h.space_wait):
            return
        used = load_acquire64(&h.write_position) - load_acquire64(&h.read_position)
        if h.max_messages != 0 or used <= load_relaxed64(&self.read_capacity) // 2:
            wait_wake_one(&h.space_wait)

    # ---- take -------------------------------------------------------------------------------

    @cython.final
    cdef int look_further(self, uint64_t pos) noexcept nogil:
        """Nothing more is known: how far does the committed data reach, and is
        it in this area?  Moves on to the next area where this one ends."""
        cdef Header *h = self.header
        cdef Mapping *m = self.consumer_mapping
        # in this order: the other way round would read a new frame's position in the old area
        cdef uint64_t written = load_acquire64(&h.write_position)
        cdef uint64_t last = load_acquire64(&h.write_generation)
        cdef uint64_t generation = h.read_generation
        cdef uint64_t limit = written
        cdef uint64_t following
        cdef int error
        if written < pos or pos & 7 or last < generation or last - generation >= SHMRING_AREA_COUNT:
            return self.poison(POISON_POSITIONS)
        while generation < last:
            following = load_relaxed64(&shmring_area_of(h, generation + 1).base)
            if following < pos:
                return self.poison(POISON_AREA)
            if following != pos:
                if following < limit:
                    limit = following
                break
            generation += 1
        if m.generation != generation:
            error = area_open(h, self.fd, &self.file, generation, &m)  # before anything changes
            if error != 0:
                return self.poison(POISON_AREA) if error == EILSEQ else -error
            if self.consumer_stale != NULL:
                area_release(self.consumer_stale)
            self.consumer_stale = self.consumer_mapping
            self.consumer_mapping = m
            store_relaxed64(&self.read_capacity, m.capacity)
        if h.read_generation != generation:
            store_release64(&h.read_generation, generation)
            if area_reap(h, self.fd, &self.file) == EILSEQ:
                return self.poison(POISON_AREA)
        if limit - pos > m.capacity:
            return self.poison(POISON_POSITIONS)
        self.known_limit = limit
        user_show(&h.last_consumer)
        return EMPTY if limit == pos else DONE

    @cython.final
    cdef int first_frame(self, Take *take) noexcept nogil:
        """Find and check the frame in front; its fields go to `take`."""
        cdef Header *h = self.header
        cdef Mapping *m
        cdef Frame *frame
        cdef uint64_t pos, length
        cdef uint32_t state, shutdown
        cdef int result
        if load_relaxed32(&h.poisoned) != 0:
            return CORRUPT
        if load_relaxed32(&h.shutdown) == 2:
            return SHUT
        if load_relaxed64(&h.lease_owner) != 0:
            take.owner = load_relaxed64(&h.lease_owner)
            take.position = h.lease_low
            if take.owner != 0:
                return BEHIND_LEASE
        while True:
            pos = h.read_position
            if self.consumer_mapping.generation != h.read_generation or pos >= self.known_limit or pos & 7:
                shutdown = load_acquire32(&h.shutdown)  # first, or a put and a shutdown fit in between
                result = self.look_further(pos)
                if result == EMPTY and shutdown != 0:
                    return SHUT
                if result != DONE:
                    return result
            elif pos & 7:  # went back: look_further was not asked
                return self.poison(POISON_POSITIONS)
            m = self.consumer_mapping
            frame = <Frame *>(m.data + (pos & m.mask))
            # one copy of each field, then checked, then used
            state = load_acquire32(&frame.state)
            length = load_relaxed64(&frame.length)
            take.position = pos
            take.length = length
            take.kind = load_relaxed32(&frame.kind)
            take.state = state
            if not frame_is_possible(frame, length, pos, m.capacity, self.known_limit):
                return self.poison(POISON_FRAME)
            if state == SHMRING_WHOLE:
                return DONE
            if state == SHMRING_LENT and self.adopts and take.kind & SHMRING_KIND_MULTI:
                return DONE
            if state == SHMRING_RESERVED:
                take.owner = load_relaxed64(&frame.owner)
                return BEHIND_RESERVATION
            if state != SHMRING_ABORTED:
                return self.poison(POISON_FRAME)
            self.commit_read(pos + shmring_frame_span(length), 1)

    cdef int probe(self, Take *found, int flags) noexcept nogil:
        """Look at the message in front without taking it: DONE, or why it cannot be taken."""
        cdef Header *h = self.header
        cdef int result
        if (load_acquire64(&h.write_position) == load_acquire64(&h.read_position)
                and load_acquire32(&h.shutdown) == 0 and load_acquire32(&h.poisoned) == 0):
            return EMPTY
        result = self.lock_consumers(flags)
        if result == DONE:
            result = self.first_frame(found)
            self.unlock_consumers()
        return result

    @cython.final
    cdef void commit_read(self, uint64_t pos, uint64_t count) noexcept nogil:
        cdef Header *h = self.header
        count_on(&h.get_count, h.read_position, pos, count)
        store_release64(&h.read_position, pos)  # the commit

    @cython.final
    cdef bint claim_is_held(self) noexcept nogil:
        cdef Claim *claim = self.claim
        return claim != NULL and load_acquire64(&claim.low) < load_relaxed64(&claim.high)

    @cython.final
    cdef void take_leave(self, uint64_t following, uint64_t count) noexcept nogil:
        """Claim and commit what was copied out."""
        cdef Header *h = self.header
        cdef Claim *claim = self.claim  # once: another thread may end the claiming
        if claim != NULL:
            # counts only up to read_position: valid with the commit, not before
            store_release64(&claim.low, h.read_position)
            store_release64(&claim.high, following)
        self.commit_read(following, count)
        store_relaxed64(&self.left_at, following)
        if following == self.known_limit and self.consumer_mapping.capacity != h.min_capacity:
            RingCore.note_empty(self, following)

    cdef int take(self, Take *take, int flags) noexcept nogil:
        """Take the message in front into `take.room` (PARTIAL, and nothing is
        taken, if it does not fit) or into `take.targets`."""
        cdef Header *h = self.header
        cdef Mapping *m
        cdef char *payload
        cdef uint64_t following
        cdef int i
        cdef int result = RingCore.lock_consumers(self, flags)
        if result != DONE:
            return result
        if self.claim_is_held():
            result = CLAIM_HELD
        else:
            result = self.first_frame(take)
        if result == DONE and take.leaser != 0:
            m = self.consumer_mapping
            fetch_add64(&m.references, 1)
            take.mapping = m
            take.payload = m.data + (take.position & m.mask) + SHMRING_FRAME_BYTES
            h.lease_low = take.position
            h.lease_high = take.position + shmring_frame_span(take.length)
            store_release64(&h.lease_owner, take.leaser)
        elif result == DONE:
            m = self.consumer_mapping
            payload = m.data + (take.position & m.mask) + SHMRING_FRAME_BYTES
            if take.target_count != 0:
                following = 0
                for i in range(take.target_count):
                    following += take.targets[i].length
                if take.position != take.expected or following != take.length:
                    result = CHANGED
                else:
                    for i in range(take.target_count):
                        memcpy(take.targets[i].data, payload, take.targets[i].length)
                        payload += take.targets[i].length
            elif take.length > take.room_bytes:
                memcpy(take.room, payload, take.room_bytes)
                result = PARTIAL
            else:
                memcpy(take.room, payload, take.length)
            if result == DONE and take.state == SHMRING_LENT:
                if take.target_count != 0:
                    result = adopt_blocks(self, take, take.targets[0].data, take.targets[0].length)
                else:
                    result = adopt_blocks(self, take, take.room, take.length)
        if (result == DONE or result == LENT) and take.leaser == 0:
            self.take_leave(take.position + shmring_frame_span(take.length), 1)
        RingCore.unlock_consumers(self)
        if (result == DONE or result == LENT) and take.leaser == 0:
            RingCore.wake_producers(self)
            RingCore.wake_next(self)
        return result

    # ---- blocks -----------------------------------------------------------------------------

    cdef int find_blocks(self) noexcept nogil:
        """Map the records of the blocks, if there are any: 0, an errno, or EILSEQ."""
        cdef BlockSpace *opened
        cdef int error
        if self.space != NULL or load_acquire64(&self.header.blocks_offset) == 0:
            return 0
        error = block_space_open(self.header, self.fd, &self.file, &opened)
        if error == 0 and not compare_exchange64(<uint64_t *>&self.space, 0, <uint64_t>opened):
            block_space_leave(opened)  # another thread was faster
        return error

    @cython.final
    cdef const Block *blocks(self) noexcept nogil:
        return self.space.blocks if self.space != NULL else NULL

    cdef int finish_reservation(self, char *payload, uint64_t position, bint commit) noexcept nogil:
        """No lock: the frame is the owner's until its state says otherwise."""
        cdef Frame *frame = <Frame *>(payload - SHMRING_FRAME_BYTES)
        cdef uint32_t state = SHMRING_WHOLE if commit else SHMRING_ABORTED
        if load_relaxed64(&frame.position) != position or not compare_exchange32(&frame.state, SHMRING_RESERVED, state):
            return CHANGED
        fence_full()
        self.wake_consumers()
        return DONE

    cdef int finish_lease(self, uint64_t position, uint64_t length, bint consume, int flags) noexcept nogil:
        """Without `consume` the message, of `length` bytes, stays; BUSY: call again."""
        cdef Header *h = self.header
        cdef int result = self.lock_consumers(flags)
        if result != DONE:
            return result
        if h.lease_owner != self.myself() or h.lease_low != position or h.read_position != position:
            result = CHANGED
        else:
            if consume:
                self.commit_read(position + shmring_frame_span(length), 1)
            store_release64(&h.lease_owner, 0)
        self.unlock_consumers()
        fence_full()
        if wait_wants_wake(&h.space_wait):
            wait_wake_one(&h.space_wait)
        self.wake_consumers()
        return result

    cdef void note_empty(self, uint64_t pos) noexcept nogil:
        """The ring may be empty, and its area is larger than the first one.  Much
        larger than all that passed since it was last empty: give memory back.
        A steady flow passes as much between two empty moments as it needs room."""
        cdef Header *h = self.header
        cdef uint64_t passed, wanted
        if load_acquire64(&h.write_position) != pos:
            return
        passed = pos - h.empty_position
        h.empty_position = pos
        if passed > self.consumer_mapping.capacity // 16:
            store_relaxed64(&h.needed_ns, <uint64_t>monotonic_ns())
            store_relaxed64(&self.oversized, 0)
            return
        wanted = area_power_of_two(4 * passed)
        if wanted < h.min_capacity:
            wanted = h.min_capacity
        if wanted < self.consumer_mapping.capacity and area_may_shrink(h):
            store_relaxed64(&self.oversized, wanted)

    cdef int take_span(self, char *room, uint64_t room_bytes, Py_ssize_t most, uint64_t stop,
                       uint64_t *bytes, int flags) noexcept nogil:
        """Take up to `most` whole messages, frames and all, that fit into the
        room and begin before position `stop`: copied as one span, split by the
        caller after unlocking."""
        cdef Take found
        cdef Frame *frame
        cdef uint64_t pos, end, length
        cdef Py_ssize_t count = 0
        cdef Mapping *m
        cdef int result = self.lock_consumers(flags)
        if result != DONE:
            return result
        bytes[0] = 0
        if self.claim_is_held():
            result = CLAIM_HELD
        else:
            result = self.first_frame(&found)
        if result == DONE:
            m = self.consumer_mapping
            pos = end = found.position
            while count < most and end < self.known_limit and (end < stop or count == 0):
                frame = <Frame *>(m.data + (end & m.mask))
                length = load_relaxed64(&frame.length)
                if (load_acquire32(&frame.state) != SHMRING_WHOLE
                        or not frame_is_possible(frame, length, end, m.capacity, self.known_limit)):
                    break  # left to first_frame()
                if end + shmring_frame_span(length) - pos > (room_bytes if room_bytes < m.capacity else m.capacity):
                    break
                end += shmring_frame_span(length)
                count += 1
            if count == 0:
                result = PARTIAL
            else:
                memcpy(room, m.data + (pos & m.mask), end - pos)
                bytes[0] = end - pos
                self.take_leave(end, count)
        self.unlock_consumers()
        if result == DONE:
            self.wake_producers()
            self.wake_next()
        return result

    cdef void wake_next(self) noexcept nogil:
        """Others sleep, no wake-up is pending, and something is left: wake one."""
        cdef Header *h = self.header
        if wait_wants_wake(&h.data_wait) and load_acquire64(&h.write_position) != load_acquire64(&h.read_position):
            wait_wake_one(&h.data_wait)

    # ---- clearing the way --------------------------------------------------------------------------

    cdef void clear_the_way(self, Take *blocked, int outcome, int flags) noexcept nogil:
        """Abort the reservation, or release the lease, of a dead owner."""
        cdef Header *h = self.header
        cdef Take found
        cdef Frame *frame
        if blocked.owner == self.myself() or not owner_is_dead(blocked.owner):
            return
        if self.lock_consumers(flags) != DONE:
            return
        if outcome == BEHIND_LEASE:
            if h.lease_owner == blocked.owner and h.lease_low == blocked.position:
                store_release64(&h.lease_owner, 0)
                death_record(h, HELD_LEASE, owner_pid(blocked.owner))
        elif (self.first_frame(&found) == BEHIND_RESERVATION and found.position == blocked.position
                and found.owner == blocked.owner):
            frame = <Frame *>(self.consumer_mapping.data + (found.position & self.consumer_mapping.mask))
            if compare_exchange32(&frame.state, SHMRING_RESERVED, SHMRING_ABORTED):
                death_record(h, HELD_RESERVATION, owner_pid(blocked.owner))
        self.unlock_consumers()
        self.wake_consumers()

    cdef void shrink(self, uint64_t capacity, int flags) noexcept nogil:
        """Move to a smaller area, if the ring is empty.  Two steps, each under
        its own lock; the next call that looks further takes the second one."""
        cdef Header *h = self.header
        cdef Mapping *m
        if self.lock_consumers(flags) != DONE:
            return
        self.look_further(h.read_position)
        self.unlock_consumers()
        if self.lock_producers(flags) != DONE:
            return
        if (h.write_position == load_acquire64(&h.read_position)
                and h.write_generation == load_acquire64(&h.read_generation)
                and shmring_area_of(h, h.write_generation).capacity > capacity
                and load_relaxed64(&h.lease_owner) == 0
                and h.write_generation - load_acquire64(&h.reaped) < SHMRING_AREA_COUNT // 2
                and area_may_shrink(h)
                and self.find_blocks() == 0
                and area_grow(h, self.blocks(), self.fd, &self.file, capacity, &m) == 0):
            if self.producer_stale != NULL:
                area_release(self.producer_stale)
            self.producer_stale = self.producer_mapping
            self.producer_mapping = m
            store_relaxed64(&self.write_capacity, m.capacity)
        self.unlock_producers()
        if self.lock_consumers(flags) != DONE:
            return
        self.look_further(h.read_position)
        self.unlock_consumers()
        self.wake_producers()
