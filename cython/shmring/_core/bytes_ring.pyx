"""Messages of bytes: get and get_many of every ring, and the compiled half of Ring.

A message of up to SMALL bytes is copied to the stack under the lock and becomes
an object afterwards.  A larger one is measured first, and its destination is
allocated between two visits, because nothing is allocated while a lock word is
held.
"""

cimport cython
from cpython.buffer cimport (
    PyBUF_CONTIG_RO, PyBUF_WRITABLE, PyBuffer_FillInfo, PyBuffer_Release, PyObject_CheckBuffer, PyObject_GetBuffer,
)
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_CheckExact, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.exc cimport PyErr_CheckSignals
from cpython.mem cimport PyMem_Free, PyMem_Malloc, PyMem_Realloc
from cpython.pyport cimport PY_SSIZE_T_MAX
from libc.stdint cimport uint32_t, uint64_t
from libc.string cimport memcpy

from shmring._core.area cimport area_release
from shmring._core.block cimport BlockMapping, block_free, block_space_keep
from shmring._core.ring cimport (
    BRIEFLY, BUSY, CHANGED, DONE, LENT, LENT_MOST, MAY_WAIT, PARTIAL, POISON_FRAME, Item, Lending, Segment,
    Take, leave_blocks, return_block,
)
from shmring._core.fast_path cimport put_one, take_one
from shmring._core.handle cimport GIL_BYTES, RingHandle, ends_wait
from shmring._core.layout cimport (
    SHMRING_FRAME_BYTES, SHMRING_KIND_BYTES, SHMRING_KIND_MULTI, SHMRING_SEGMENT_INDEX_SHIFT, SHMRING_SEGMENT_LENT,
    Frame, shmring_frame_span,
)
from shmring._core.lending cimport take_block
from shmring._core.sync cimport (
    fence_full, fetch_add64, handle_enter, handle_leave, load_acquire64, load_relaxed64, monotonic_ns, sync_epoch,
    sync_start,
)
from shmring._core.wait cimport is_brief, put_or_wait, take_or_wait, with_peers

import operator
import threading
from _thread import start_new_thread
from queue import Empty, Full

from shmring import _warnings
from shmring.errors import DecodeError, InvalidArgument, RingClosed, RingCorrupted, ShutDown

cdef enum: SPAN_BYTES = 16384  # what one visit of get_many takes at most, over the stack

cdef uint64_t lend_bytes = 1 << 20  # a smaller buffer costs less as a copy through the ring

sync_start()


MOVED = object()  # instead of a message that is no longer in front


def _set_lend_bytes(uint64_t least):
    """For tests: lend buffers of at least so many bytes; returns what was before."""
    global lend_bytes
    before = lend_bytes
    lend_bytes = least
    return before


@cython.binding(False)
@cython.freelist(16)
cdef class Parcel:
    """A message of one or more buffers on its way into the ring; keeps them alive.

    Payload of a frame whose kind carries MULTI
        +-------+----------+-----+--------------+------+----------+-----
        | count | length 0 | ... | length n - 1 | head | buffer 1 | ...
        +-------+----------+-----+--------------+------+----------+-----
          u64     u64 each                        each where the one before ends

    A length may name a block (layout.h), in which that buffer lies, and not in the frame.
    """

    def __cinit__(self):
        self.segments = NULL
        self.buffers = NULL
        self.table = NULL
        self.opened = 0
        self.lending.space = NULL
        self.lending.count = 0
        self.lending.sent = False

    def __dealloc__(self):
        cdef int i
        if self.lending.space != NULL:
            if not self.lending.sent and self.lending.epoch == sync_epoch():  # a forked copy owns nothing
                for i in range(self.lending.count):
                    block_free(self.lending.space, self.lending.indices[i], <uint64_t>monotonic_ns())
            leave_blocks(self.lending.space)
        for i in range(self.opened):
            PyBuffer_Release(&self.buffers[i])
        PyMem_Free(self.segments)
        PyMem_Free(self.buffers)
        PyMem_Free(self.table)

    cdef int pack(self, tuple encoded) except -1:
        """Take in what an encoder returned: (kind, segments)."""
        cdef Py_ssize_t count, i
        cdef uint32_t kind
        kind, parts = encoded
        self.item.owner = 0
        self.item.lending = NULL
        count = len(parts)
        if count < 1 or kind & SHMRING_KIND_MULTI:
            raise ValueError(f"the codec returned {count} segments of kind {kind}")
        self.segments = <Segment *>PyMem_Malloc((count + 1) * sizeof(Segment))
        self.buffers = <Py_buffer *>PyMem_Malloc(count * sizeof(Py_buffer))
        if self.segments == NULL or self.buffers == NULL:
            raise MemoryError
        self.item.length = 0
        for i in range(count):
            PyObject_GetBuffer(parts[i], &self.buffers[i], PyBUF_CONTIG_RO)
            self.opened += 1
            self.segments[i + 1].data = <char *>self.buffers[i].buf
            self.segments[i + 1].length = <uint64_t>self.buffers[i].len
            self.item.length += <uint64_t>self.buffers[i].len
        self.item.kind = kind
        if count == 1:
            self.item.segments = self.segments + 1
            self.item.count = 1
            return 0
        self.table = <uint64_t *>PyMem_Malloc((count + 1) * sizeof(uint64_t))
        if self.table == NULL:
            raise MemoryError
        self.table[0] = <uint64_t>count
        for i in range(count):
            self.table[i + 1] = self.segments[i + 1].length
        self.segments[0].data = <char *>self.table
        self.segments[0].length = <uint64_t>(count + 1) * sizeof(uint64_t)
        self.item.length += self.segments[0].length
        self.item.kind |= SHMRING_KIND_MULTI
        self.item.segments = self.segments
        self.item.count = <int>(count + 1)
        return 0

    cdef int lend(self, MessageRing ring, bint patient) except -1:
        """Write large buffers into blocks, as long as there are any."""
        cdef Lending *lending = &self.lending
        cdef Segment *segment
        cdef int index
        cdef int i
        if self.table == NULL or self.item.count > TABLE_MOST:
            return 0
        for i in range(2, self.item.count):  # behind the table and the head
            segment = &self.segments[i]
            if segment.length < lend_bytes or lending.count == LENT_MOST:
                continue
            ring.enter()
            try:
                with nogil:
                    index = take_block(ring, segment.length, patient)
                    if index >= 0:
                        if lending.space == NULL:
                            lending.space = block_space_keep(ring.space)
                            lending.epoch = sync_epoch()
                        lending.indices[lending.count] = index
                        lending.count += 1
                        memcpy(lending.space.mappings[index].data, segment.data, segment.length)
            finally:
                ring.leave()
            if index < 0:
                break
            self.table[i] |= SHMRING_SEGMENT_LENT | <uint64_t>index << SHMRING_SEGMENT_INDEX_SHIFT
            self.item.length -= segment.length
            segment.length = 0
            self.item.lending = lending
        return 0


@cython.binding(False)
@cython.freelist(16)
cdef class LentBuffer:
    """One large buffer in a block of the queue, writable; it goes back with the last view."""

    def __cinit__(self):
        self.space = NULL

    def __getbuffer__(self, Py_buffer *buffer, int flags):
        PyBuffer_FillInfo(buffer, self, self.data, self.length, False, flags)

    def __dealloc__(self):
        if self.space != NULL:
            return_block(self.space, self.index, self.data, self.capacity, self.epoch, self.owner)
            leave_blocks(self.space)


cdef list lent_buffers(MessageRing ring, Take *take):
    """A view of each block that came with a message."""
    cdef list made = []
    cdef LentBuffer buffer
    cdef BlockMapping *mapping
    cdef int i = 0
    try:
        for i in range(take.lent_count):
            buffer = LentBuffer.__new__(LentBuffer)
            mapping = &take.space.mappings[take.lent[i].index]
            buffer.index = take.lent[i].index
            buffer.data = mapping.data
            buffer.capacity = mapping.capacity
            buffer.length = <Py_ssize_t>take.lent[i].length
            buffer.epoch = sync_epoch()
            buffer.owner = ring.myself()
            buffer.space = block_space_keep(take.space)  # from here on it gives the block back
            take.lent[i].index = -1
            made.append(memoryview(buffer))
        return made
    except BaseException:
        for i in range(take.lent_count):
            if take.lent[i].index >= 0:
                mapping = &take.space.mappings[take.lent[i].index]
                return_block(
                    take.space, take.lent[i].index, mapping.data, mapping.capacity, sync_epoch(), ring.myself())
        raise
    finally:
        leave_blocks(take.space)


@cython.binding(False)
cdef class MessageRing(RingHandle):
    """What Ring and Queue share: one message or many."""

    cdef object next_object(self, bint block, object timeout):
        """The message in front, or Empty."""
        cdef char room[SMALL]
        cdef Take take
        cdef int result
        take.room = room
        take.room_bytes = SMALL
        take.leaser = 0
        while True:
            result = take_one(self, &take, block, timeout)
            if result == DONE:
                if take.kind == SHMRING_KIND_BYTES and self.raw:
                    return PyBytes_FromStringAndSize(room, <Py_ssize_t>take.length)
                return self.decode_at(take.kind, room, take.length)
            if result == LENT:
                return self.take_lent(&take)
            if result != PARTIAL:
                raise Empty
            message = self.take_large(&take)
            if message is not MOVED:
                return message

    cdef object take_large(self, Take *take):
        """A message of which only the head fitted the room, or MOVED."""
        message = self.take_whole(take)
        return message if message is not None else MOVED

    cdef object take_lent(self, Take *take):
        """A message that was taken, of which blocks are a part."""
        raise NotImplementedError

    cdef object take_whole(self, Take *take):
        """The payload of a message that was measured; None if it is no longer in front."""
        cdef Segment target
        message = PyBytes_FromStringAndSize(NULL, <Py_ssize_t>take.length)
        target.data = PyBytes_AS_STRING(message)
        target.length = take.length
        take.targets = &target
        take.target_count = 1
        return message if self.take_into(take) == DONE else None

    cdef object decode_at(self, uint32_t kind, char *payload, uint64_t length):
        """What a payload means, which lies in private memory."""
        return PyBytes_FromStringAndSize(payload, <Py_ssize_t>length)

    cdef int take_into(self, Take *take) except -1:
        cdef int result
        handle_enter(&self.inside)
        try:
            if self.closed:
                self.check_open()
            take.expected = take.position
            if take.length > GIL_BYTES:
                fetch_add64(&self.inside, 1)
                with nogil:
                    result = self.take(take, BRIEFLY if is_brief() else MAY_WAIT)
                self.leave()
            else:
                result = self.take(take, 0)
            take.target_count = 0
            if not ends_wait(result):
                return CHANGED
            if result != DONE and result != CHANGED and result != LENT:
                self.raise_outcome(result)
            if load_relaxed64(&self.oversized) != 0:
                self.give_back()
            return result
        finally:
            if handle_leave(&self.inside):
                self.last_out()

    cdef object frame_of(self, object obj, uint32_t *kind):
        """What travels for an object: bytes of a kind, or a Parcel, which has its own."""
        cdef Parcel parcel
        if PyBytes_CheckExact(obj):
            kind[0] = SHMRING_KIND_BYTES
            return obj
        check_bytes_like(obj)
        parcel = Parcel.__new__(Parcel)
        parcel.pack((SHMRING_KIND_BYTES, (obj,)))
        return parcel

    cdef int put_batch(self, object objects, object block, object timeout) except -1:
        """Encode all, then put them under one lock a batch."""
        cdef list held = []  # bytes, or a Parcel
        cdef Item *items = NULL
        cdef Item *longer
        cdef Segment *segments = NULL
        cdef Py_ssize_t room_for = 0
        cdef Py_ssize_t n = 0
        cdef Py_ssize_t i
        cdef Py_ssize_t done = 0
        try:
            for obj in objects:
                if n == room_for:
                    room_for = 2 * n + 64
                    longer = <Item *>PyMem_Realloc(items, room_for * sizeof(Item))
                    if longer == NULL:
                        raise MemoryError
                    items = longer
                if self.raw and PyBytes_CheckExact(obj):  # as frame_of, without the call
                    items[n].kind = SHMRING_KIND_BYTES
                    held.append(obj)
                else:
                    held.append(self.frame_of(obj, &items[n].kind))
                n += 1
            if n == 0:
                self.check_open()
                return 0
            segments = <Segment *>PyMem_Malloc(n * sizeof(Segment))
            if segments == NULL:
                raise MemoryError
            for i, obj in enumerate(held):
                fill_item(&items[i], &segments[i], obj)
            try:
                if put_or_wait(self, items, n, &done, NULL, block, timeout) < n:
                    raise Full(f"{done} of {n} objects went in")
            except BaseException as error:
                try:
                    error.count = done
                except Exception:
                    pass  # its class uses that name itself
                raise
        finally:
            PyMem_Free(items)
            PyMem_Free(segments)
        return 0

    def get_many(self, max_items=None, block=True, timeout=None, *, peers=None):
        """Wait for one message, then take what is there, in order.

        Args:
            max_items: how many at most, None for all that are there.
            block, timeout, peers: as for `get`, for the first one; `timeout` in seconds.

        Returns:
            A list of what `get` returns, at least one.

        Raises:
            Empty: nothing came in time.
            PeerDied: every one of `peers` is dead, and nothing is left to take.
            DecodeError: a message was taken and could not be decoded.  Its attribute
                `items`, as that of any exception after messages were taken, has all
                other objects of the batch.
            ShmringError: what else `get` raises.
        """
        cdef Py_ssize_t most = PY_SSIZE_T_MAX
        cdef char room[SPAN_BYTES]
        cdef uint64_t size = 0
        cdef uint64_t at, end, first
        cdef Frame *frame
        cdef int result
        cdef list taken = []
        cdef object failed = None
        if max_items is not None:
            max_items = operator.index(max_items)
            if max_items < 1:
                raise InvalidArgument(f"max_items={max_items}: at least 1, or None for all that are there")
            most = min(max_items, PY_SSIZE_T_MAX)
        if peers is not None:
            timeout = with_peers(peers, timeout)
        taken.append(self.next_object(block, timeout))
        if self.closed:
            return taken
        fetch_add64(&self.inside, 1)  # as enter(), but a handle that closes now raises nothing
        fence_full()
        try:
            # what is there now, not what steady producers go on adding
            end = 0 if self.closed else load_acquire64(&self.header.write_position)
            while (len(taken) < most and failed is None and not self.closed
                    and load_acquire64(&self.header.read_position) < end):
                result = self.take_span(room, SPAN_BYTES, most - len(taken), end, &size, 0)
                if result == PARTIAL:
                    try:
                        taken.append(self.next_object(False, None))
                        continue
                    except (Empty, RingClosed, ShutDown):
                        break  # nothing was taken; the next call says so again
                    except BaseException as error:
                        failed = error
                        break
                if result != DONE:
                    break  # an error shows itself in the next call; what was taken is not lost
                at = 0
                first = (<Frame *>room).position
                while at < size:
                    try:
                        while at < size:
                            frame = <Frame *>(room + at)
                            # our own copy, but made after the check: lengths may have changed between
                            if (size - at < SHMRING_FRAME_BYTES or frame.length > size - at - SHMRING_FRAME_BYTES
                                    or frame.position != first + at):
                                self.poison(POISON_FRAME)
                                size = at
                                break
                            at += shmring_frame_span(frame.length)
                            taken.append(
                                self.decode_at(frame.kind, <char *>frame + SHMRING_FRAME_BYTES, frame.length))
                    except BaseException as error:  # the rest of the span is taken: go on
                        # the first one is raised, but never in place of an interrupt
                        if failed is None or (isinstance(failed, Exception) and not isinstance(error, Exception)):
                            failed = error
        finally:
            self.leave()
        if failed is not None:
            try:
                failed.items = taken
            except Exception:  # its class has other plans for that name
                refused = DecodeError(f"a message was taken and cannot be decoded: {type(failed).__name__}: {failed}")
                refused.items = taken
                raise refused from failed
            raise failed
        return taken


# ---- Ring ----------------------------------------------------------------------------------------

# The blocks that threads of this process are in: (token of the ring, writable, thread).
cdef set blocks = set()


cdef int check_bytes_like(object data) except -1:
    if not PyObject_CheckBuffer(data):
        raise TypeError(
            f"a ring carries bytes-like objects, not {type(data).__name__}; use shmring.Queue for other objects"
        )
    return 0


@cython.binding(False)
cdef class BytesRing(MessageRing):
    """The compiled half of shmring.Ring."""

    def __cinit__(self, *args, **kwargs):
        self.raw = True

    def put(self, data, bint block=True, timeout=None, *, peers=None):
        """Put one message.

        Args:
            data: a contiguous bytes-like object.
            block: wait for room; otherwise Full at once.
            timeout: seconds to wait, None for ever.
            peers: processes (anything with a pid, or pids) without which
                waiting is in vain.

        Raises:
            queue.Full: no room in time.
            PeerDied: every one of `peers` is dead, and there is no room.
            MessageTooLarge: it can never fit.
            ShutDown: the ring was shut down.
            RingClosed: this handle was closed.
        """
        cdef Py_buffer buffer
        cdef Py_ssize_t done
        if peers is not None:
            return BytesRing.put(self, data, block, with_peers(peers, timeout))
        if PyBytes_CheckExact(data):
            done = put_one(self, 0, PyBytes_AS_STRING(data), PyBytes_GET_SIZE(data), NULL, block, timeout)
        else:
            check_bytes_like(data)
            PyObject_GetBuffer(data, &buffer, PyBUF_CONTIG_RO)
            try:
                done = put_one(self, 0, <char *>buffer.buf, buffer.len, NULL, block, timeout)
            finally:
                PyBuffer_Release(&buffer)
        if done == 0:
            raise Full

    def put_nowait(self, data):
        """As :meth:`put` with block=False."""
        self.put(data, False)

    def put_many(self, messages, block=True, timeout=None, *, peers=None):
        """Put each bytes-like object of an iterable, under one lock a batch.

        Args:
            messages: bytes-like objects.
            block, timeout, peers: as for `put`; `timeout`, in seconds, is for all of them together.

        Raises:
            Full: no room in time.  Its attribute `count`, as that of any exception on
                the way, tells how many went in.
            PeerDied: every one of `peers` is dead, and there is no room.
            ShmringError: what else `put` raises.
        """
        self.put_batch(messages, block, timeout if peers is None else with_peers(peers, timeout))

    def get(self, bint block=True, timeout=None, *, peers=None):
        """Take the message in front, as bytes.

        Args:
            block: wait for one; otherwise Empty at once.
            timeout: seconds to wait, None for ever.
            peers: processes (anything with a pid, or pids) without which
                waiting is in vain.

        Raises:
            queue.Empty: nothing came in time.
            PeerDied: every one of `peers` is dead, and nothing is left to take.
            RingCorrupted: what stands in front is not a frame.
            ShutDown: the ring was shut down and is empty.
        """
        if peers is not None:
            timeout = with_peers(peers, timeout)
        return self.next_object(block, timeout)

    cdef object next_object(self, bint block, object timeout):
        if blocks:
            self.check_reentry(False, "get() inside peek()")  # it would wait for itself
        return MessageRing.next_object(self, block, timeout)

    def get_nowait(self):
        """get(block=False)."""
        return self.get(False)

    def reserve(self, nbytes, block=True, timeout=None, *, peers=None):
        """A context that writes a message of `nbytes` bytes in place.

        A clean exit commits, an exception aborts.  Other producers go on
        meanwhile; consumers wait behind the reservation.  Leaving the block
        while an array or slice of the view lives raises BufferError; the
        message is then never published, and its place is given back when the
        export dies.

        Args:
            nbytes: the length of the message in bytes.
            block, timeout, peers: as for `put`; `timeout` in seconds.

        Raises:
            MessageTooLarge: it can never fit into max_capacity.
            RuntimeError: on entering, this thread is inside another reservation of
                this ring.
            ShmringError: on entering, what `put` raises.
        """
        self.check_open()
        nbytes = operator.index(nbytes)
        if nbytes < 0:
            raise InvalidArgument(f"nbytes={nbytes}: a message has 0 bytes or more")
        if nbytes > self.largest:
            raise _warnings.too_large(nbytes, self.largest + SHMRING_FRAME_BYTES, self.largest)
        return FrameView(self, True, nbytes, block, timeout if peers is None else with_peers(peers, timeout))

    def peek(self, block=True, timeout=None, *, peers=None):
        """A context that reads the message in front, in place.

        A clean exit consumes it, an exception leaves it for another.  Other
        consumers wait meanwhile.  Leaving the block while an array or slice of
        the view lives raises BufferError; the message stays, and the lease
        ends when the export dies.

        Args:
            block, timeout, peers: as for `get`; `timeout` in seconds.

        Raises:
            RuntimeError: on entering, this thread is inside another peek of this ring.
            ShmringError: on entering, what `get` raises.
        """
        return FrameView(self, False, 0, block, timeout if peers is None else with_peers(peers, timeout))

    def _adopt(self):
        """In a child right after fork: the blocks of the parent are not ours."""
        blocks.clear()
        MessageRing._adopt(self)

    cdef int end_lease_later(self, uint64_t position) except -1:
        """The lock is held: a thread waits for it, since a destructor must not."""
        fetch_add64(&self.inside, 1)  # close() does not unmap before it is done
        try:
            start_new_thread(self._end_lease, (position,))
        except Exception:  # mostly the interpreter ends, and the lease with its process
            self.leave()
        return 0

    def _end_lease(self, uint64_t position):
        cdef int result = BUSY
        with nogil:
            while result == BUSY:
                result = self.finish_lease(position, 0, False, MAY_WAIT)
        self.leave()

    cdef object check_reentry(self, bint writable, str what):
        """The name of a block that this thread may enter now."""
        self.enter()
        self.token = self.header.token
        self.leave()
        block = (self.token, writable, threading.get_ident())
        if block in blocks:
            raise RuntimeError(f"{what} in the same thread on the same ring: leave the outer block first")
        return block


@cython.binding(False)
@cython.no_gc_clear  # __dealloc__ needs the ring
cdef class FrameView:
    """The payload of one frame, as a buffer; what reserve() and peek() return.

    Exports are counted.  While one lives, the frame is neither published nor
    given back, so that no view ever shows recycled memory.  They may end in any
    thread: without a GIL, the count and what follows from it have a lock.
    """

    def __init__(self, BytesRing ring, bint writable, Py_ssize_t length, block, timeout):
        self.ring = ring
        self.writable = writable
        self.length = length
        self.block = block
        self.timeout = timeout

    def __enter__(self):
        cdef BytesRing ring = self.ring
        entered = ring.check_reentry(
            self.writable, "reserve() inside reserve()" if self.writable else "peek() inside peek()"
        )
        with cython.critical_section(self):
            if self.entered is not None:
                raise RuntimeError("this block has been entered already: call reserve() or peek() anew")
            self.entered = entered  # before it waits: another thread may enter the same block
        ring.enter()  # to the end, so that no close unmaps between the taking and the counting of the view
        try:
            self.take_up()
        except BaseException:
            self.entered = None
            raise
        finally:
            ring.leave()
        blocks.add(entered)
        self.window = memoryview(self)
        return self.window

    cdef int take_up(self) except -1:
        """Reserve or lease the frame, and count the view."""
        cdef BytesRing ring = self.ring
        cdef Take take
        cdef Item item
        cdef Py_ssize_t done
        cdef int result
        if self.writable:
            item.segments = NULL
            item.count = 0
            item.kind = 0
            item.length = <uint64_t>self.length
            item.owner = ring.myself()
            item.lending = NULL
            if put_or_wait(ring, &item, 1, &done, &self.position, self.block, self.timeout) == 0:
                raise Full
            self.mapping = item.mapping
            self.payload = item.payload
        else:
            take.room = NULL
            take.room_bytes = 0
            take.leaser = ring.myself()
            result = take_or_wait(ring, &take, self.block, self.timeout)
            if result != DONE:
                raise Empty
            self.mapping = take.mapping
            self.payload = take.payload
            self.position = take.position
            self.length = <Py_ssize_t>take.length
        self.epoch = sync_epoch()
        self.live = True
        fetch_add64(&ring.views, 1)
        fence_full()  # either close() sees the view, or we see that it closed
        if ring.closed:
            self.finish(False)
            ring.check_open()
        return 0

    def __exit__(self, kind, error, traceback):
        window, self.window = self.window, None
        blocks.discard(self.entered)
        if self.epoch != sync_epoch():
            self.forget()
            if kind is None:
                raise RuntimeError(
                    "this block was entered before a fork: it belongs to the parent process, and nothing was"
                    " published or consumed here"
                )
            return False
        try:
            window.release()
        except BufferError:
            pass  # an array looks at the window itself: counted in exports
        del window
        with cython.critical_section(self):
            exports = self.exports
            self.abandoned = exports > 0
            if exports == 0:
                self.finish(kind is None)
        if exports > 0 and kind is None:
            raise BufferError(
                f"{exports} array(s) or slice(s) of the view are alive: nothing was"
                f" {'published' if self.writable else 'consumed'}; delete them inside the block"
            )
        return False

    cdef int finish(self, bint keep) except -1:
        """Publish or consume, or not; then the mapping may go."""
        cdef BytesRing ring = self.ring
        cdef int result = BUSY
        if not self.live:
            return 0
        if self.writable:
            result = ring.finish_reservation(self.payload, self.position, keep)
        else:
            while result == BUSY:
                with nogil:
                    result = ring.finish_lease(self.position, <uint64_t>self.length, keep, MAY_WAIT)
                PyErr_CheckSignals()
        self.live = False
        try:
            if result == CHANGED and keep:
                raise RingCorrupted(
                    f"the frame at position {self.position} changed hands inside the block: nothing was"
                    f" {'published' if self.writable else 'consumed'}"
                )
            if result != DONE and result != CHANGED:
                ring.raise_outcome(result)
        finally:
            self.let_go()
        return 0

    cdef int drop(self) except -1:
        """In a destructor: neither publish nor consume, and wait for nothing."""
        cdef BytesRing ring = self.ring
        self.live = False
        if self.writable:
            ring.finish_reservation(self.payload, self.position, False)
        elif ring.finish_lease(self.position, <uint64_t>self.length, False, BRIEFLY) == BUSY:
            ring.end_lease_later(self.position)
        self.let_go()
        return 0

    cdef int let_go(self) except -1:
        area_release(self.mapping)
        self.mapping = NULL
        self.payload = NULL
        fetch_add64(&self.ring.views, -1)
        return 0

    cdef int forget(self) except -1:
        """After a fork: the parent's block, of which nothing is ours to finish."""
        self.live = False
        return 0

    def __getbuffer__(self, Py_buffer *buffer, int flags):
        with cython.critical_section(self):
            if not self.live or self.abandoned:
                raise BufferError("the block of this view has been left")
            if self.epoch != sync_epoch():
                raise BufferError("this view was made before a fork and belongs to the parent process")
            if flags & PyBUF_WRITABLE and not self.writable:
                raise BufferError("peek() gives a read-only view")
            PyBuffer_FillInfo(buffer, self, self.payload, self.length, not self.writable, flags)
            self.exports += 1

    def __releasebuffer__(self, Py_buffer *buffer):
        with cython.critical_section(self):
            self.exports -= 1
            if self.exports == 0 and self.abandoned and self.live and self.epoch == sync_epoch():
                self.drop()

    def __dealloc__(self):
        # a block that was never left: its generator or frame was dropped
        if self.live and self.epoch == sync_epoch() and self.ring.header != NULL:
            blocks.discard(self.entered)
            self.drop()
