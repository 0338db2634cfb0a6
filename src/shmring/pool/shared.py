"""Arrays that are put into shared memory once and read by every task.

The memory is a file without a name. Its handle travels as the path of the owner's
descriptor in /proc, so that nothing has to be removed: the memory is given back when
the last process that maps it has let go, however it ends.
"""

from __future__ import annotations

import mmap
import os
import weakref
from typing import TYPE_CHECKING, Any

from shmring._backend import backend
from shmring.errors import DecodeError, InvalidArgument, NotSupportedByFallback
from shmring.shm.descriptors import close_own, identity_of

if TYPE_CHECKING:
    import numpy as np

__all__ = ["SharedArray", "share"]

# Arrays that came with a task, as long as one of them is in use here.
_received: weakref.WeakValueDictionary[tuple[int, int], Any] = weakref.WeakValueDictionary()


class SharedArray:
    """An array in shared memory; as an argument it arrives as a read-only numpy array.

    Attributes:
        array: a read-only view of the memory.
    """

    def __init__(self, source: np.ndarray[Any, Any]) -> None:
        import numpy as np

        from shmring.shm import segment

        size = max(source.nbytes, 1)
        fd = segment.create_anonymous(size)
        try:
            segment.allocate(fd, 0, size)
            mapped = mmap.mmap(fd, size)
        except BaseException:
            os.close(fd)
            raise
        writable: np.ndarray[Any, Any] = np.frombuffer(mapped, source.dtype, source.size)
        writable = writable.reshape(source.shape)
        writable[...] = source
        self.array = writable.view()
        self.array.flags.writeable = False
        self._identity = identity_of(fd)
        self._fd = fd
        self._pid = os.getpid()
        self._close = weakref.finalize(self, close_own, fd, self._identity)

    @property
    def nbytes(self) -> int:
        """The size of the array in bytes."""
        return self.array.nbytes

    def __reduce__(self) -> tuple[Any, ...]:
        shown = self.array
        path = f"/proc/{os.getpid()}/fd/{self._fd}"
        return _arrived, (path, self._identity, shown.dtype, shown.shape)

    def __repr__(self) -> str:
        return f"<SharedArray shape={self.array.shape} dtype={self.array.dtype}>"


def share(array: np.ndarray[Any, Any]) -> SharedArray:
    """Put an array into shared memory, for tasks of a pool to read without a copy.

    Args:
        array: anything ``numpy.asarray`` takes, without Python objects in it.

    Returns:
        a handle to be passed to tasks, in each of which it is a read-only array. Keep it
        until they have begun; the memory is freed when the handle and all views are gone.

    Raises:
        InvalidArgument: the array holds Python objects.
        SharedMemoryFull: there is no room for it.
        NotSupportedByFallback: there is no shared memory without a name.
    """
    import numpy as np

    if backend != "ring":
        raise NotSupportedByFallback("share(): it needs files without a name in /dev/shm")
    source = np.asarray(array)
    if source.dtype.hasobject:
        raise InvalidArgument(f"share(): dtype={source.dtype} holds Python objects, not bytes")
    return SharedArray(source)


def _arrived(
    path: str, identity: tuple[int, int], dtype: Any, shape: tuple[int, ...]
) -> np.ndarray[Any, Any]:
    import numpy as np

    mapped = _received.get(identity)
    if mapped is None:
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise DecodeError(f"a shared array is gone: {error}; keep the handle") from error
        try:
            if identity_of(fd) != identity:
                raise DecodeError(f"a shared array is gone: {path} is another file by now")
            mapped = _WeakMmap(fd, os.fstat(fd).st_size, prot=mmap.PROT_READ)
        finally:
            os.close(fd)
        _received[identity] = mapped
    count = int(np.prod(shape, dtype=np.int64))
    array: np.ndarray[Any, Any] = np.frombuffer(mapped, dtype, count)
    return array.reshape(shape)


class _WeakMmap(mmap.mmap):
    """mmap has no place for weak references; a subclass has."""
