"""Whether what others register has changed since it was copied.

Pickle asks a table of reducers for the class of each object.  A table of our
own that looks the classes up in what is registered elsewhere costs a call of
Python an object; a plain dict with a copy of it costs next to nothing, as long
as somebody notices that the copy is old.
"""

cimport cython
from cpython.dict cimport PyDict_Next
from cpython.object cimport PyObject
from cpython.list cimport PyList_GET_ITEM, PyList_GET_SIZE

import sys


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
