"""The compiled half of Queue: one call from the object to the frame.

`ObjectRing` knows two hooks, an encoder and a decoder, and never imports
pickle.  `bytes` travel as they are, trees of builtins as `builtin_codec.h` writes
them; everything else is what the codec made of it: a head, and perhaps large
buffers that travel beside it, out of band.
"""

cimport cython
from cpython.bytearray cimport PyByteArray_AS_STRING, PyByteArray_FromStringAndSize
from cpython.bytes cimport (
    PyBytes_AS_STRING, PyBytes_CheckExact, PyBytes_FromStringAndSize, PyBytes_GET_SIZE,
)
from cpython.dict cimport PyDict_Next
from cpython.exc cimport PyErr_Occurred
from cpython.list cimport PyList_GET_ITEM, PyList_GET_SIZE
from cpython.object cimport PyObject
from cpython.ref cimport Py_DECREF
from libc.stdint cimport INT64_MAX, int64_t, uint32_t, uint64_t
from libc.string cimport memcpy

from shmring._core.builtin_codec cimport Writer, codec_decode, codec_encode, codec_free
from shmring._core.bytes_ring cimport MOVED, SMALL, TABLE_MOST, MessageRing, Parcel, fill_item, lent_buffers
from shmring._core.ring cimport BUSY, CHANGED, DONE, EMPTY, IS_WAITING, LENT, MAY_WAIT, Segment, Take
from shmring._core.count cimport count_read
from shmring._core.fast_path cimport put_one
from shmring._core.handle cimport RingHandle, inside
from shmring._core.layout cimport (
    SHMRING_CLAIM_COUNT, SHMRING_KIND_BUILTINS, SHMRING_KIND_BYTES, SHMRING_KIND_MULTI, SHMRING_KIND_PICKLE,
    SHMRING_LENT, SHMRING_SEGMENT_LENT, Claim, Header,
)
from shmring._core.owner cimport owner_pid, owner_start_ticks
from shmring._core.sync cimport (
    SYNC_SLICE_LEAST_NS, compare_exchange32, compare_exchange64, fence_full, handle_enter, handle_leave,
    load_acquire32, load_acquire64, store_release32, store_release64, sync_start, wait_wake_all,
)
from shmring._core.diagnostics cimport CALL_AIO, CALL_JOIN, FOR_MESSAGE, FOR_ROOM, FOR_TASKS
from shmring._core.wait cimport (
    Bell, Waiting, check_name, deadline_of, is_ready, put_or_wait, set_brief, shrink_idle, with_peers,
)

import sys
from queue import Full

from shmring.errors import DecodeError, InvalidArgument, RingCorrupted

sync_start()

# ---- trees of exact builtins -----------------------------------------------------------------------

cdef int raise_current() except -1:
    return -1  # with the exception that is set already


cdef object decode_tree(const char *data, uint64_t length):
    cdef size_t consumed
    cdef PyObject *made = <PyObject *>codec_decode(data, length, &consumed)
    if made == NULL:
        if PyErr_Occurred():
            raise_current()
        raise DecodeError(
            f"a message of {length} bytes was taken and cannot be decoded: its bytes up to {consumed}"
            " are those of no tree of builtins"
        )
    tree = <object>made
    Py_DECREF(tree)
    if consumed != length:
        raise DecodeError(
            f"a message of {length} bytes was taken and cannot be decoded: its object ends at byte {consumed}"
        )
    return tree


def encode_builtins(obj, /):
    """Encode a tree of exact builtins.

    Args:
        obj: any object.

    Returns:
        bytes; None if the object is not such a tree, or holds something twice.
    """
    cdef char room[SMALL]
    cdef Writer writer
    if not codec_encode(&writer, room, SMALL, obj):
        return None
    try:
        return PyBytes_FromStringAndSize(writer.start, writer.at - writer.start)
    finally:
        codec_free(&writer)


def decode_builtins(bytes data not None, /):
    """Decode what :func:`encode_builtins` returned.

    Args:
        data: bytes, which may come from anywhere: no code is run.

    Raises:
        DecodeError: they are not those of a tree.
    """
    return decode_tree(PyBytes_AS_STRING(data), PyBytes_GET_SIZE(data))


# ---- the pickler's table ---------------------------------------------------------------------------

cdef class Watched:
    """Some dicts as they were when this was made, and a module that is still to be imported.

    Args:
        dicts: each a dict; few entries, since all are compared.
        awaited: the name of a module whose import counts as a change, or None.
    """

    def __init__(self, dicts, awaited=None):
        self.dicts = list(dicts)
        self.awaited = awaited
        self.seen = [part for each in self.dicts for entry in each.items() for part in entry]

    cpdef bint changed(self) except? True:
        """Whether an entry was added, replaced or removed, or the module imported."""
        cdef Py_ssize_t at = 0
        cdef Py_ssize_t i
        cdef dict each
        for i in range(PyList_GET_SIZE(self.dicts)):
            each = <dict>PyList_GET_ITEM(self.dicts, i)
            at = self.compared(each, at)
            if at < 0:
                return True
        if at != PyList_GET_SIZE(self.seen):
            return True
        return self.awaited is not None and self.awaited in sys.modules

    cdef Py_ssize_t compared(self, dict entries, Py_ssize_t at) except? -2:
        """How many of `seen` are accounted for after `entries`; -1 where one differs."""
        cdef Py_ssize_t place = 0
        cdef PyObject *key
        cdef PyObject *value
        with cython.critical_section(entries):
            while PyDict_Next(entries, &place, &key, &value):
                if (at + 2 > PyList_GET_SIZE(self.seen)
                        or <PyObject *>PyList_GET_ITEM(self.seen, at) != key
                        or <PyObject *>PyList_GET_ITEM(self.seen, at + 1) != value):
                    return -1
                at += 2
        return at


# ---- messages --------------------------------------------------------------------------------------
cdef bint is_long(object timeout):
    """Whether a put has time to wait for a block."""
    return timeout is None or (type(timeout) in (int, float) and timeout >= 1)


@cython.binding(False)
cdef class ObjectRing(MessageRing):
    """The compiled half of shmring.Queue."""

    def __cinit__(self, *args, **kwargs):
        self.adopts = True

    def _set_codec(self, encoder, decoder, bint raw, bint trees=False, pickler_type=None,
                   loader=None, explain_encode=None, explain_decode=None):
        """Install the hooks.

        `encoder(obj)` returns (kind, segments) and `decoder(kind, head, buffers)`
        the object.  With `raw`, exact bytes travel past both, and with `trees`
        what is made of exact builtins alone.  `pickler_type` makes a pickler
        (dump, clear_memo, chunks, buffers, watched) that is used in place of the
        encoder, again and again until what it has `watched` changes;
        `loader(head)` stands in for the decoder where there are no buffers;
        `explain_encode(obj, error)` and `explain_decode(head, buffers, error)`
        make the exceptions of these two.
        """
        self.encoder = encoder
        self.decoder = decoder
        self.raw = raw
        self.trees = trees
        self.pickler_type = pickler_type
        self.loader = loader
        self.explain_encode = explain_encode
        self.explain_decode = explain_decode
        self.renew_pickler()

    cdef int renew_pickler(self) except -1:
        if self.pickler_type is None:
            self.pickler_free = 0
            return 0
        self.make_pickler()
        store_release32(&self.pickler_free, 1)
        return 0

    cdef int make_pickler(self) except -1:
        pickler = self.pickler_type()
        self.dump = pickler.dump
        self.clear_memo = pickler.clear_memo
        self.chunks = pickler.chunks
        self.buffers = pickler.buffers
        self.watched = pickler.watched
        return 0

    cdef object encode(self, object obj):
        """bytes, or (kind, segments)."""
        # Taken by one thread at a time; an object that puts while it is being
        # pickled, and another thread, use the encoder.
        if not compare_exchange32(&self.pickler_free, 1, 0):
            return self.encoder(obj)
        try:
            if self.watched.changed():
                self.make_pickler()
            self.dump(obj)
        except Exception as error:
            self.renew_pickler()  # this one is in an unknown state
            raise self.explain_encode(obj, error) from error
        except BaseException:
            self.renew_pickler()
            raise
        head = self.chunks[0] if len(self.chunks) == 1 else b"".join(self.chunks)
        self.chunks.clear()
        self.clear_memo()
        if self.buffers:
            head = (SHMRING_KIND_PICKLE, [head, *self.buffers])
            self.buffers.clear()
        store_release32(&self.pickler_free, 1)
        return head

    cdef object frame_of(self, object obj, uint32_t *kind):
        if self.raw and PyBytes_CheckExact(obj):
            kind[0] = SHMRING_KIND_BYTES
            return obj
        return self.encoded(obj, kind)

    cdef object encoded(self, object obj, uint32_t *kind):
        """As `frame_of`, for what has to be encoded."""
        cdef Writer writer
        cdef char room[SMALL]
        if self.trees and codec_encode(&writer, room, SMALL, obj):
            kind[0] = SHMRING_KIND_BUILTINS
            try:
                return PyBytes_FromStringAndSize(writer.start, writer.at - writer.start)
            finally:
                codec_free(&writer)
        return self.parcelled(obj, kind, False)

    cdef object parcelled(self, object obj, uint32_t *kind, bint patient):
        """As `frame_of`, for what goes through the codec.  `patient`: may wait for a block."""
        cdef Parcel parcel
        encoded = self.encode(obj)
        kind[0] = SHMRING_KIND_PICKLE
        if PyBytes_CheckExact(encoded):
            return encoded
        parcel = Parcel.__new__(Parcel)
        parcel.pack(encoded)
        parcel.lend(self, patient)
        return parcel

    # ---- put --------------------------------------------------------------------------------

    def put(self, obj, bint block=True, timeout=None, *, peers=None):
        """Put one object.

        Without `maxsize` this never waits for a reader that does not read: the
        queue grows, up to `max_capacity`.

        Args:
            obj: anything the codec can encode.
            block: wait for room; otherwise Full at once.
            timeout: seconds to wait, None for ever.
            peers: processes (anything with a pid, or pids) without which
                waiting is in vain.

        Raises:
            queue.Full: no room in time.
            PeerDied: every one of `peers` is dead, and there is no room.
            EncodeError: the object cannot be encoded; nothing was put.
            MessageTooLarge: it can never fit into max_capacity.
            ShutDown: the queue was shut down.
            RingClosed: this handle was closed.
        """
        if peers is not None:
            return ObjectRing.put(self, obj, block, with_peers(peers, timeout))
        if self.put_object(obj, NULL, block, timeout) == 0:
            raise Full

    cdef Py_ssize_t put_object(self, object obj, uint64_t *position, bint block, object timeout) except -1:
        cdef uint32_t kind
        cdef Py_ssize_t done
        cdef Writer writer
        cdef char room[SMALL]
        # as frame_of(), but a tree that is small never leaves the stack
        if self.raw and PyBytes_CheckExact(obj):
            return put_one(
                self, SHMRING_KIND_BYTES, PyBytes_AS_STRING(obj), PyBytes_GET_SIZE(obj), position, block, timeout)
        if self.trees and codec_encode(&writer, room, SMALL, obj):
            try:
                return put_one(
                    self, SHMRING_KIND_BUILTINS, writer.start, writer.at - writer.start, position, block, timeout)
            finally:
                codec_free(&writer)
        encoded = self.parcelled(obj, &kind, block and is_long(timeout))
        if PyBytes_CheckExact(encoded):
            return put_one(
                self, kind, PyBytes_AS_STRING(encoded), PyBytes_GET_SIZE(encoded), position, block, timeout)
        return put_or_wait(self, &(<Parcel>encoded).item, 1, &done, position, block, timeout)

    def put_nowait(self, obj):
        """As :meth:`put` with block=False."""
        self.put(obj, False)  # which a subclass may have overridden

    def _put_position(self, obj, block=True, timeout=None):
        """Put, and return the position of the message, which a claim names."""
        cdef uint64_t position = 0
        if self.put_object(obj, &position, block, timeout) == 0:
            raise Full
        return position

    def put_many(self, objects, block=True, timeout=None, *, peers=None):
        """Encode each object of an iterable, then put them under one lock a batch.

        Args:
            objects: what the codec can encode.
            block, timeout, peers: as for `put`; `timeout`, in seconds, is for all of them together.

        Raises:
            Full: no room in time.  Its attribute `count`, as that of any exception on
                the way, tells how many went in.
            PeerDied: every one of `peers` is dead, and there is no room.
            ShmringError: what else `put` raises.
        """
        self.put_batch(objects, block, timeout if peers is None else with_peers(peers, timeout))

    # ---- get --------------------------------------------------------------------------------

    cdef object decode_at(self, uint32_t kind, char *payload, uint64_t length):
        """Decode a payload that lies in private memory."""
        if kind == SHMRING_KIND_BYTES and self.raw:
            return PyBytes_FromStringAndSize(payload, <Py_ssize_t>length)
        if kind == SHMRING_KIND_BUILTINS and self.trees:
            return decode_tree(payload, length)
        if kind & SHMRING_KIND_MULTI:
            return self.split(kind, payload, length, [])
        return self.decode(kind, PyBytes_FromStringAndSize(payload, <Py_ssize_t>length), None)

    cdef object decode(self, uint32_t kind, object head, object buffers):
        if buffers is None:
            if self.raw and kind == SHMRING_KIND_BYTES:
                return head
            if kind == SHMRING_KIND_BUILTINS and self.trees:
                return decode_tree(PyBytes_AS_STRING(head), <uint64_t>PyBytes_GET_SIZE(head))
            if kind == SHMRING_KIND_PICKLE and self.loader is not None:
                try:
                    return self.loader(head)
                except Exception as error:
                    raise self.explain_decode(head, (), error) from error
            buffers = ()
        return self.decoder(kind, head, buffers)

    cdef object split(self, uint32_t kind, char *payload, uint64_t length, list lent):
        """Decode a MULTI payload that lies in private memory; lengths are untrusted.

        `lent` are the buffers that came in blocks.
        """
        cdef uint64_t count, at, part, i
        cdef Py_ssize_t next_lent = 0
        cdef list buffers = []
        if length < 8:
            raise RingCorrupted(f"a message of {length} bytes has no table of segments")
        memcpy(&count, payload, 8)
        if count < 1 or count > (length - 8) // 8:
            raise RingCorrupted(f"a message of {length} bytes claims {count} segments")
        at = 8 + 8 * count
        head = None
        for i in range(count):
            memcpy(&part, payload + 8 + 8 * i, 8)
            if part & SHMRING_SEGMENT_LENT and i > 0 and next_lent < len(lent):
                buffers.append(lent[next_lent])
                next_lent += 1
                continue
            if part > length - at:
                raise RingCorrupted(f"segment {i} of {part} bytes reaches past a message of {length} bytes")
            if i == 0:
                head = PyBytes_FromStringAndSize(payload + at, <Py_ssize_t>part)
            else:
                buffers.append(PyByteArray_FromStringAndSize(payload + at, <Py_ssize_t>part))
            at += part
        return self.decode(kind & ~SHMRING_KIND_MULTI, head, buffers)

    def get(self, bint block=True, timeout=None, *, peers=None):
        """Take the next object.

        Args:
            block: wait for one; otherwise Empty at once.
            timeout: seconds to wait, None for ever.
            peers: processes (anything with a pid, or pids) without which
                waiting is in vain.

        Raises:
            queue.Empty: nothing came in time.
            PeerDied: every one of `peers` is dead, and nothing is left to take.
            DecodeError: a message was taken and could not be decoded.
            ShutDown: the queue was shut down and is empty.
            RingClosed: this handle was closed.
        """
        if peers is not None:
            return ObjectRing.get(self, block, with_peers(peers, timeout))
        return self.next_object(block, timeout)

    cdef object take_large(self, Take *take):
        cdef Segment targets[TABLE_MOST + 1]
        cdef uint64_t count, part, total, i
        cdef list buffers = []
        cdef list places = []  # of buffers that lie in blocks
        cdef int result
        if not take.kind & SHMRING_KIND_MULTI:
            head = self.take_whole(take)
            return self.decode(take.kind, head, None) if head is not None else MOVED
        memcpy(&count, take.room, 8)
        if count < 1 or count > TABLE_MOST:
            # a table larger than the stack: take it whole, then split
            if take.state == SHMRING_LENT:
                raise RingCorrupted(f"a message of {count} segments names blocks: at most {TABLE_MOST} do")
            whole = self.take_whole(take)
            if whole is None:
                return MOVED
            return self.split(take.kind, PyBytes_AS_STRING(whole), take.length, [])
        targets[0].data = take.room
        targets[0].length = total = 8 + 8 * count
        head = None
        for i in range(count):
            memcpy(&part, take.room + 8 + 8 * i, 8)
            if part & SHMRING_SEGMENT_LENT and i > 0 and take.state == SHMRING_LENT:
                places.append(len(buffers))
                buffers.append(None)
                targets[i + 1].data = take.room
                targets[i + 1].length = 0
                continue
            if part > take.length - total:
                raise RingCorrupted(f"segment {i} of {part} bytes reaches past a message of {take.length} bytes")
            total += part
            if i == 0:
                head = PyBytes_FromStringAndSize(NULL, <Py_ssize_t>part)
                targets[1].data = PyBytes_AS_STRING(head)
            else:
                buffer = PyByteArray_FromStringAndSize(NULL, <Py_ssize_t>part)
                targets[i + 1].data = PyByteArray_AS_STRING(buffer)
                buffers.append(buffer)
            targets[i + 1].length = part
        if total != take.length:
            raise RingCorrupted(f"segments of {total} bytes in a message of {take.length} bytes")
        take.targets = targets
        take.target_count = <int>count + 1
        result = self.take_into(take)
        if result == LENT:
            lent = lent_buffers(self, take)
            if len(lent) != len(places):
                raise RingCorrupted(f"{len(lent)} blocks came with a message that has {len(places)} buffers in blocks")
            for place, buffer in zip(places, lent):
                buffers[place] = buffer
        return self.decode(take.kind & ~SHMRING_KIND_MULTI, head, buffers) if result != CHANGED else MOVED

    cdef object take_lent(self, Take *take):
        return self.split(take.kind, take.room, take.length, lent_buffers(self, take))

    def get_nowait(self):
        """As :meth:`get` with block=False."""
        return self.get(False)  # which a subclass may have overridden

    # ---- joining ------------------------------------------------------------------------------

    def _task_done(self):
        """One message was worked off; False if there was none left to be."""
        return inside(self, task_done)

    cdef uint64_t due(self) noexcept nogil:
        """How many messages there are or were to be worked off: after an
        immediate shutdown what was taken, since the rest never will be."""
        cdef Header *h = self.header
        if load_acquire32(&h.shutdown) == 2:
            return count_read(&h.get_count, &h.read_position)
        return count_read(&h.put_count, &h.write_position)

    def _unfinished(self):
        return inside(self, unfinished_of)

    cdef uint64_t unfinished(self) noexcept nogil:
        cdef uint64_t done = load_acquire64(&self.header.done_count)
        cdef uint64_t due = self.due()
        return due - done if due > done else 0

    def _join_all(self, timeout=None, peers=None):
        """Wait until every message was worked off; False when time ran out."""
        cdef JoinWait wait = JoinWait.__new__(JoinWait)
        watched = None if peers is None else with_peers(peers, timeout)
        cdef int64_t until = deadline_of(timeout)
        self.enter()
        try:
            wait.start(self, CALL_JOIN, FOR_TASKS, &self.header.done_wait)
            wait.missing = "tasks are unfinished"
            if wait.look(False) == DONE or wait.run(until, watched) == DONE:
                return True
            self.check_open()
            return False
        finally:
            self.leave()

    # ---- claims ---------------------------------------------------------------------------------
    #
    # A claim is the interval of positions that its holder took and has not
    # answered.  It is written under the consumers' lock before read_position,
    # and counts only up to read_position; so it is there whenever the message
    # is gone, whatever instruction the holder died at.
    #
    # `key` tells the workers of one process apart.  It is stored when the slot
    # has been taken and cleared before the slot is given back: a key that stands
    # beside an owner is never that of an earlier holder.

    def _claim_open(self, uint64_t key=0):
        """Claim what this handle takes from now on; returns the slot.

        The claims' page of the file must have been allocated.

        Args:
            key: names the worker within its process; 0 is the process as a whole.
        """
        cdef Claim *claims
        cdef uint64_t i, me
        self.enter()
        try:
            claims = self.header.claims
            me = self.myself()
            for i in range(SHMRING_CLAIM_COUNT):
                if load_acquire64(&claims[i].owner) == 0 and compare_exchange64(&claims[i].owner, 0, me):
                    store_release64(&claims[i].high, 0)
                    store_release64(&claims[i].low, 0)
                    store_release64(&claims[i].key, key)
                    self.claim = &claims[i]
                    return i
        finally:
            self.leave()
        raise RuntimeError(f"all {SHMRING_CLAIM_COUNT} claim slots of this queue are taken")

    def _claim_release(self, uint64_t slot):
        """What was claimed is answered, and the answer is committed."""
        self.end_claim(slot, False)

    def _claim_close(self, uint64_t slot):
        """Claim no more."""
        self.claim = NULL
        self.end_claim(slot, True)

    def _claim_free(self, uint64_t slot):
        """Free the slot of a dead holder, after what it claimed was put back."""
        self.end_claim(slot, True)

    cdef int end_claim(self, uint64_t slot, bint free) except -1:
        cdef Claim *claim
        if slot >= SHMRING_CLAIM_COUNT:
            raise InvalidArgument(f"slot={slot}: a queue has {SHMRING_CLAIM_COUNT} claim slots")
        self.enter()
        claim = &self.header.claims[slot]
        store_release64(&claim.low, claim.high)
        if free:
            store_release64(&claim.key, 0)
            store_release64(&claim.owner, 0)
        self.leave()
        return 0

    def _claims(self):
        """[(slot, pid, start_ticks, key, low, high)] of all holders; low < high is a claim.

        Takes and releases each lock once, the producers' first: that recovers
        them if their owner died, which cancels claims that were not committed.
        """
        return inside(self, claims_of)


cdef object task_done(RingHandle handle):
    cdef ObjectRing ring = handle
    cdef Header *h = ring.header
    cdef uint64_t done, due
    while True:
        done = load_acquire64(&h.done_count)
        due = ring.due()
        if done >= due:
            return False
        if compare_exchange64(&h.done_count, done, done + 1):
            break
    fence_full()
    if done + 1 >= due:
        wait_wake_all(&h.done_wait)
    return True


cdef object unfinished_of(RingHandle handle):
    return (<ObjectRing>handle).unfinished()


cdef object claims_of(RingHandle ring):
    cdef uint64_t i
    cdef Claim claim
    cdef list found = []
    ring.visit_lock(0, 0)
    ring.visit_lock(1, 0)
    for i in range(SHMRING_CLAIM_COUNT):
        claim = ring.header.claims[i]
        if claim.owner != 0:
            found.append((i, owner_pid(claim.owner), owner_start_ticks(claim.owner), claim.key, claim.low, claim.high))
    return found


@cython.binding(False)
cdef class JoinWait(Waiting):
    """Wait until every message was worked off."""

    cdef int look(self, bint woken) noexcept nogil:
        return DONE if (<ObjectRing>self.ring).unfinished() == 0 else EMPTY


# ---- asyncio -----------------------------------------------------------------------------------

@cython.binding(False)
cdef class HelperWait(Waiting):
    """Wait until a get, or another attempt to put, is due on one ring."""

    cdef int look(self, bint woken) noexcept nogil:
        cdef Header *h = self.ring.header
        cdef int locked
        if self.outgoing is not None:
            if self.outgoing.busy:  # no room is missing: the lock is waited for here and not on the loop
                locked = self.ring.lock_producers(MAY_WAIT)
                if locked == DONE:
                    self.ring.unlock_producers()
                self.may_put = locked != BUSY
            # a producer that is not woken looks by itself each slice
            if (load_acquire64(&h.read_position) != self.outgoing.seen or load_acquire32(&h.shutdown) != 0
                    or load_acquire32(&h.poisoned) != 0 or (woken and self.slept_ns >= SYNC_SLICE_LEAST_NS)):
                self.may_put = True
        with gil:
            self.may_get = self.data and is_ready(self.ring)
        if self.may_get or self.may_put or self.ring.closed:
            return DONE
        if woken:
            shrink_idle(self.ring, self)
        return EMPTY

    cdef int between(self, int result) except -1:
        return check_name(self.ring) if self.data else 0

    cdef void end(self, int result) noexcept:
        if not self.may_get and self.ring.header != NULL:
            self.ring.wake_next()


def watch(RingHandle ring, Bell bell, bint data, Outgoing outgoing):
    """What the helper thread of aget and aput does: sleep on one ring.

    Args:
        data: wait until the message in front can be taken.
        outgoing: None, or the `Outgoing` to wait with until another attempt is due.

    Returns:
        (ready to get, due to put); both False when the bell was rung.

    Raises:
        RingClosed: the handle was closed.
    """
    cdef HelperWait wait = HelperWait.__new__(HelperWait)
    ring.enter()
    try:
        wait.start(ring, CALL_AIO, FOR_MESSAGE if data else FOR_ROOM, &ring.header.data_wait)
        if outgoing is not None:
            wait.count = 2 if data else 1
            wait.own_words[wait.count - 1] = &ring.header.space_wait
        wait.bell = &bell.word
        wait.data = data
        wait.outgoing = outgoing
        wait.run(INT64_MAX, None)
        ring.check_open()
        return wait.may_get, wait.may_put
    finally:
        ring.leave()


cdef class Outgoing:
    """An encoded object that is put as often as it takes."""

    def __init__(self, ObjectRing ring not None, obj):
        self.ring = ring
        self.encoded = ring.frame_of(obj, &self.item.kind)
        fill_item(&self.item, &self.segment, self.encoded)

    def put(self):
        """One attempt, on the loop: whether it went in.  Raises as Queue.put does."""
        cdef Py_ssize_t done = 0
        cdef bint before = set_brief(True)
        cdef int result
        cdef RingHandle ring = self.ring
        handle_enter(&ring.inside)
        try:
            ring.check_open()
            self.seen = load_acquire64(&ring.header.read_position)
            if put_or_wait(ring, &self.item, 1, &done, NULL, False, None) != 0:
                return True
            ring.check_open()
            # once more, so that smaller messages of others do not take the room for ever
            result = ring.put_items(&self.item, 1, &done, NULL, IS_WAITING)
            self.busy = result == BUSY
            return result == DONE
        finally:
            set_brief(before)
            if handle_leave(&ring.inside):
                ring.last_out()
