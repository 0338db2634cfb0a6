"""The map of watching what others register."""

cdef class Watched:
    cdef list dicts
    cdef list seen  # their keys and values, in turn; held, so that no address is used again
    cdef object awaited

    cpdef bint changed(self) except? True
    cdef Py_ssize_t compared(self, dict entries, Py_ssize_t at) except? -2
