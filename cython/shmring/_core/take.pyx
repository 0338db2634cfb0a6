"""Taking: one message or many, as bytes.

A message of up to SMALL bytes is copied to the stack under the lock and becomes
an object afterwards; a larger one is measured first, and its destination is
allocated between two visits, because nothing is allocated while a lock word is
held.  `ObjectRing` makes other objects of it.
"""

cimport cython
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from cpython.pyport cimport PY_SSIZE_T_MAX
from libc.stdint cimport uint32_t, uint64_t

from shmring._core.ring cimport BRIEFLY, CHANGED, DONE, MAY_WAIT, PARTIAL, POISON_FRAME, Segment, Take
from shmring._core.deadline cimport is_brief, watching
from shmring._core.fast_path cimport take_one
from shmring._core.handle cimport GIL_BYTES, RingHandle, ends_wait
from shmring._core.layout cimport SHMRING_FRAME_BYTES, Frame, shmring_frame_span
from shmring._core.sync cimport (
    fence_full, fetch_add64, handle_enter, handle_leave, load_acquire64, load_relaxed64, sync_start,
)

import operator
from queue import Empty

from shmring.errors import DecodeError, InvalidArgument, RingClosed, ShutDown

cdef enum: SPAN_BYTES = 16384  # what one visit of get_many takes at most, over the stack

sync_start()  # _core has checked that the kernel can do it


@cython.binding(False)
cdef class TakingRing(RingHandle):
    """What Ring and Queue share of taking."""

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
                return PyBytes_FromStringAndSize(room, <Py_ssize_t>take.length)
            if result != PARTIAL:
                raise Empty
            message = self.take_whole(&take)
            if message is not None:
                return message

    cdef object take_whole(self, Take *take):
        """A message that was measured, as bytes; None if it is not in front any more."""
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
            if result != DONE and result != CHANGED:
                self.raise_outcome(result)
            if load_relaxed64(&self.oversized) != 0:
                self.give_back()
            return result
        finally:
            if handle_leave(&self.inside):
                self.last_out()

    def get_many(self, max_items=None, block=True, timeout=None, *, peers=None):
        """Wait for one message, then take what is there, in order.

        Args:
            max_items: how many at most, None for all that are there.
            block, timeout, peers: as for `get`, for the first one.

        Returns:
            A list of what `get` returns, at least one.

        Raises: as `get`.  An exception of any kind that is raised after messages
            were taken carries all other objects of the batch in its attribute
            `items`: only a message that could not be decoded is lost.
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
            timeout = watching(peers, timeout)
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
