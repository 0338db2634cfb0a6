"""Trees of exact builtins, to bytes and back, at a quarter of what pickle costs.

A tree is made of dict, list, tuple, str, bytes, int, float, bool and None, of
exactly these types.  Whatever else there is in an object makes all of it
pickle's: `tree_write` says so and has done nothing.  So does a container (or a
long string) that occurs twice, whose identity pickle keeps and this does not;
one that can occur twice is held by more than one reference, so it is enough to
remember those.

What is read is untrusted: each length is checked against what is left before it
is used, nothing is allocated for more elements than there are bytes, the depth
is bounded, and a string is made only of characters that exist.  No code is run.

    tag        means                          follows
    00 - 3f    str of ASCII, length = tag     the characters
    40 - 7f    int 0 to 63
    80 - 8f    dict of 0 to 15 pairs          key, value, key, value, ...
    90 - 9f    list of 0 to 15                the elements
    a0 - af    tuple of 0 to 15               the elements
    c0 c1 c2   None, False, True
    c3         float                          8 bytes
    c4 - c7    int                            1, 2, 4, 8 bytes, signed
    c8 - cb    str: ASCII, or 1, 2, 4 bytes   u32 length, then the characters
               a character
    cc         bytes                          u32 length, then they
    cd ce cf   dict, list, tuple              u32 count, then as above

All numbers in the byte order of the machine: a ring never leaves it.
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.exc cimport PyErr_Clear, PyErr_ExceptionMatches, PyErr_Occurred
from cpython.mem cimport PyMem_Free, PyMem_Malloc, PyMem_Realloc
from cpython.object cimport PyObject
from libc.stdint cimport int8_t, int16_t, int32_t, int64_t, uint8_t, uint32_t, uint64_t
from libc.string cimport memcmp, memcpy

from shmring.errors import DecodeError

cdef extern from *:
    """
    #ifdef Py_GIL_DISABLED
    /* Containers may change while they are read, and a reference count does not
       tell who else holds them: all is left to pickle, which knows how to lock. */
    #define SHMRING_TREES 0
    #else
    #define SHMRING_TREES 1
    #endif
    #define SHMRING_TYPE_OF(o) ((PyObject *)Py_TYPE(o))
    #define SHMRING_LIST_ITEMS(o) (((PyListObject *)(o))->ob_item)
    #define SHMRING_TUPLE_ITEMS(o) (((PyTupleObject *)(o))->ob_item)
    /* An int of one digit, which most are: its value without a call. */
    #if PY_VERSION_HEX >= 0x030C0000
    #define SHMRING_IS_SHORT(o) PyUnstable_Long_IsCompact((PyLongObject *)(o))
    #define SHMRING_SHORT(o) PyUnstable_Long_CompactValue((PyLongObject *)(o))
    #else
    #define SHMRING_IS_SHORT(o) ((size_t)(Py_SIZE(o) + 1) <= 2)
    #define SHMRING_SHORT(o) (Py_SIZE(o) * (Py_ssize_t)((PyLongObject *)(o))->ob_digit[0])
    #endif
    /* memcpy for a few bytes, whose call costs more than the copy. */
    static inline void shmring_copy_few(char *to, const char *from, size_t size)
    {
        if (size >= 8 && size <= 16) {
            memcpy(to, from, 8);
            memcpy(to + size - 8, from + size - 8, 8);
        } else if (size >= 4 && size < 8) {
            memcpy(to, from, 4);
            memcpy(to + size - 4, from + size - 4, 4);
        } else if (size < 4) {
            if (size > 0)
                to[0] = from[0];
            if (size > 1)
                memcpy(to + size - 2, from + size - 2, 2);
        } else {
            memcpy(to, from, size);
        }
    }
    """
    bint is_short "SHMRING_IS_SHORT"(PyObject *)
    Py_ssize_t short_value "SHMRING_SHORT"(PyObject *)
    void copy_few "shmring_copy_few"(char *, const char *, size_t) noexcept
    const bint SHMRING_TREES
    PyObject *type_of "SHMRING_TYPE_OF"(PyObject *)
    PyObject *str_type "((PyObject *)&PyUnicode_Type)"
    PyObject *int_type "((PyObject *)&PyLong_Type)"
    PyObject *float_type "((PyObject *)&PyFloat_Type)"
    PyObject *dict_type "((PyObject *)&PyDict_Type)"
    PyObject *list_type "((PyObject *)&PyList_Type)"
    PyObject *tuple_type "((PyObject *)&PyTuple_Type)"
    PyObject *bytes_type "((PyObject *)&PyBytes_Type)"
    PyObject **list_items "SHMRING_LIST_ITEMS"(PyObject *)
    PyObject **tuple_items "SHMRING_TUPLE_ITEMS"(PyObject *)
    PyObject *none "Py_None"
    PyObject *true "Py_True"
    PyObject *false "Py_False"

cdef extern from "Python.h":
    enum: PyUnicode_1BYTE_KIND
    enum: PyUnicode_2BYTE_KIND
    enum: PyUnicode_4BYTE_KIND
    bint PyUnicode_IS_COMPACT(PyObject *)
    bint PyUnicode_IS_COMPACT_ASCII(PyObject *)
    Py_ssize_t PyUnicode_GET_LENGTH(PyObject *)
    int PyUnicode_KIND(PyObject *)
    void *PyUnicode_DATA(PyObject *)
    PyObject *PyUnicode_New(Py_ssize_t, uint32_t)
    PyObject *PyUnicode_FromKindAndData(int, const void *, Py_ssize_t)
    long long PyLong_AsLongLongAndOverflow(PyObject *, int *)
    PyObject *PyLong_FromLongLong(long long)
    double PyFloat_AS_DOUBLE(PyObject *)
    PyObject *PyFloat_FromDouble(double)
    char *bytes_data "PyBytes_AS_STRING"(PyObject *)
    Py_ssize_t bytes_size "PyBytes_GET_SIZE"(PyObject *)
    PyObject *bytes_from "PyBytes_FromStringAndSize"(const char *, Py_ssize_t)
    bint PyDict_Next(PyObject *, Py_ssize_t *, PyObject **, PyObject **)
    Py_ssize_t PyDict_GET_SIZE(PyObject *)
    PyObject *PyDict_New()
    int PyDict_SetItem(PyObject *, PyObject *, PyObject *)
    Py_ssize_t PyList_GET_SIZE(PyObject *)
    PyObject *PyList_New(Py_ssize_t)
    Py_ssize_t PyTuple_GET_SIZE(PyObject *)
    PyObject *PyTuple_New(Py_ssize_t)
    Py_ssize_t Py_REFCNT(PyObject *)
    void Py_INCREF(PyObject *)
    void Py_DECREF(PyObject *)
    void Py_XDECREF(PyObject *)

cdef enum:
    FIX_STR = 0x00
    FIX_INT = 0x40
    FIX_DICT = 0x80
    FIX_LIST = 0x90
    FIX_TUPLE = 0xA0
    NONE = 0xC0
    FALSE = 0xC1
    TRUE = 0xC2
    FLOAT = 0xC3
    INT1 = 0xC4
    INT2 = 0xC5
    INT4 = 0xC6
    INT8 = 0xC7
    STR_ASCII = 0xC8
    STR1 = 0xC9
    STR2 = 0xCA
    STR4 = 0xCB
    BYTES = 0xCC
    DICT = 0xCD
    LIST = 0xCE
    TUPLE = 0xCF

cdef enum:
    SCALAR_BYTES = 16  # a tag and what follows it, without characters
    LONG_BYTES = 64  # strings from this length on are worth remembering
    LARGE_BYTES = 65536  # and from this one on are left to pickle, which does not copy them once more
    KEYS = 512
    KEY_BYTES = 32

# The keys of dicts that were read lately: a program sends the same few again
# and again, and a key that exists need not be made, nor hashed.  The GIL guards
# them; a build without one leaves them alone.
cdef PyObject *keys[KEYS]


# ---- writing ----------------------------------------------------------------------------------

cdef bint tree_write(Writer *writer, char *room, uint64_t room_bytes, object obj) noexcept:
    writer.start = writer.at = room
    writer.end = room + room_bytes
    writer.heap = False
    writer.depth = 0
    writer.shared_count = 0
    if SHMRING_TREES and write_root(writer, <PyObject *>obj):
        return True
    tree_free(writer)
    return False


cdef void tree_free(Writer *writer) noexcept:
    if writer.heap:
        PyMem_Free(writer.start)
        writer.heap = False


cdef bint more_room(Writer *w, Py_ssize_t needed) noexcept:
    cdef Py_ssize_t used = w.at - w.start
    cdef Py_ssize_t wanted = 2 * (used + needed)
    cdef char *memory = <char *>(PyMem_Realloc(w.start, wanted) if w.heap else PyMem_Malloc(wanted))
    if memory == NULL:
        return False  # pickle will say that memory is out, or find some
    if not w.heap:
        memcpy(memory, w.start, used)
    w.heap = True
    w.start = memory
    w.at = memory + used
    w.end = memory + wanted
    return True


cdef inline bint room_for(Writer *w, Py_ssize_t needed) noexcept:
    return w.end - w.at >= needed or more_room(w, needed)


cdef bint is_first(Writer *w, PyObject *obj) noexcept:
    """Whether an object that others hold as well occurs for the first time."""
    cdef int i
    for i in range(w.shared_count):
        if w.shared[i] == obj:
            return False
    if w.shared_count == TREE_SHARED:
        return False  # too many to remember
    w.shared[w.shared_count] = obj
    w.shared_count += 1
    return True


cdef inline void write_head(Writer *w, int fixed, int tag, Py_ssize_t count) noexcept:
    if count < 16:
        w.at[0] = <char>(fixed | count)
        w.at += 1
    else:
        write_length(w, tag, count)


cdef inline void write_length(Writer *w, int tag, Py_ssize_t count) noexcept:
    cdef uint32_t short = <uint32_t>count
    w.at[0] = <char>tag
    memcpy(w.at + 1, &short, 4)
    w.at += 5


cdef inline bint write_str(Writer *w, PyObject *obj) noexcept:
    cdef Py_ssize_t length = PyUnicode_GET_LENGTH(obj)
    cdef Py_ssize_t size = length
    if length >= LONG_BYTES and (length >= LARGE_BYTES or (Py_REFCNT(obj) > 1 and not is_first(w, obj))):
        return False
    if PyUnicode_IS_COMPACT_ASCII(obj):
        if not room_for(w, SCALAR_BYTES + size):
            return False
        if length < LONG_BYTES:
            w.at[0] = <char>(FIX_STR | length)
            w.at += 1
        else:
            write_length(w, STR_ASCII, length)
    else:
        if not PyUnicode_IS_COMPACT(obj):
            return False
        size *= PyUnicode_KIND(obj)
        if not room_for(w, SCALAR_BYTES + size):
            return False
        write_length(w, STR1 if size == length else STR2 if size == 2 * length else STR4, length)
    copy_few(w.at, <char *>PyUnicode_DATA(obj), size)
    w.at += size
    return True


cdef inline bint write_int(Writer *w, PyObject *obj) noexcept:
    cdef int overflow = 0
    cdef int64_t value = short_value(obj) if is_short(obj) else PyLong_AsLongLongAndOverflow(obj, &overflow)
    cdef int8_t value1 = <int8_t>value
    cdef int16_t value2 = <int16_t>value
    cdef int32_t value4 = <int32_t>value
    if overflow:
        return False
    if 0 <= value < 64:
        w.at[0] = <char>(FIX_INT | value)
        w.at += 1
    elif value == value4:
        if value == value1:
            w.at[0] = <char>INT1
            w.at[1] = value1
            w.at += 2
        elif value == value2:
            w.at[0] = <char>INT2
            memcpy(w.at + 1, &value2, 2)
            w.at += 3
        else:
            w.at[0] = <char>INT4
            memcpy(w.at + 1, &value4, 4)
            w.at += 5
    else:
        w.at[0] = <char>INT8
        memcpy(w.at + 1, &value, 8)
        w.at += 9
    return True


cdef inline bint write_value(Writer *w, PyObject *obj) noexcept:
    cdef PyObject *kind = type_of(obj)
    cdef double number
    if kind == str_type:
        return write_str(w, obj)
    if not room_for(w, SCALAR_BYTES):
        return False
    if kind == int_type:
        return write_int(w, obj)
    if kind == float_type:
        number = PyFloat_AS_DOUBLE(obj)
        w.at[0] = <char>FLOAT
        memcpy(w.at + 1, &number, 8)
        w.at += 9
        return True
    if obj == none or obj == true or obj == false:
        w.at[0] = <char>(NONE if obj == none else TRUE if obj == true else FALSE)
        w.at += 1
        return True
    return write_longer(w, obj, False)


cdef bint write_longer(Writer *w, PyObject *obj, bint root) noexcept:
    """Bytes or a container, which hold anything but a few bytes."""
    cdef PyObject *kind = type_of(obj)
    cdef PyObject *key
    cdef PyObject *value
    cdef PyObject **items
    cdef Py_ssize_t count, i
    if kind == bytes_type:
        return write_bytes(w, obj)
    if kind == dict_type:
        count = PyDict_GET_SIZE(obj)
    elif kind == list_type:
        count = PyList_GET_SIZE(obj)
    elif kind == tuple_type:
        count = PyTuple_GET_SIZE(obj)
        root = root or count == 0  # there is one empty tuple, and everybody holds it
    else:
        return False
    if w.depth == TREE_DEPTH or count > 0xFFFFFFFF or (Py_REFCNT(obj) > 1 and not root and not is_first(w, obj)):
        return False
    w.depth += 1
    if kind == dict_type:
        write_head(w, FIX_DICT, DICT, count)
        i = 0
        while PyDict_Next(obj, &i, &key, &value):
            if not write_value(w, key) or not write_value(w, value):
                return False
    else:
        if kind == list_type:
            write_head(w, FIX_LIST, LIST, count)
            items = list_items(obj)
        else:
            write_head(w, FIX_TUPLE, TUPLE, count)
            items = tuple_items(obj)
        for i in range(count):
            if not write_value(w, items[i]):
                return False
    w.depth -= 1
    return True


cdef bint write_bytes(Writer *w, PyObject *obj) noexcept:
    cdef Py_ssize_t count = bytes_size(obj)
    if count >= LONG_BYTES and (count >= LARGE_BYTES or (Py_REFCNT(obj) > 1 and not is_first(w, obj))):
        return False
    if not room_for(w, SCALAR_BYTES + count):
        return False
    write_length(w, BYTES, count)
    memcpy(w.at, bytes_data(obj), count)
    w.at += count
    return True


cdef bint write_root(Writer *w, PyObject *obj) noexcept:
    cdef PyObject *kind = type_of(obj)
    if kind == dict_type or kind == list_type or kind == tuple_type:
        return room_for(w, SCALAR_BYTES) and write_longer(w, obj, True)
    return write_value(w, obj)


# ---- reading ----------------------------------------------------------------------------------

cdef struct Reader:
    const char *at
    const char *end


cdef inline bint is_ascii(const char *data, Py_ssize_t length) noexcept:
    cdef uint64_t eight, seen = 0
    cdef uint8_t one
    cdef Py_ssize_t i = 0
    while i + 8 <= length:
        memcpy(&eight, data + i, 8)
        seen |= eight
        i += 8
    while i < length:
        one = <uint8_t>data[i]
        seen |= one
        i += 1
    return seen & 0x8080808080808080ULL == 0


cdef PyObject *read_ascii(Reader *r, Py_ssize_t length) noexcept:
    cdef PyObject *made
    if length > r.end - r.at or not is_ascii(r.at, length):
        return NULL
    made = PyUnicode_New(length, 127)
    if made != NULL:
        copy_few(<char *>PyUnicode_DATA(made), r.at, length)
        r.at += length
    return made


cdef PyObject *read_str(Reader *r, Py_ssize_t length, int width) noexcept:
    """Characters of 1, 2 or 4 bytes."""
    cdef PyObject *made
    cdef const char *data = r.at
    cdef uint32_t character
    cdef Py_ssize_t i
    if length > (r.end - data) // width:
        return NULL
    if width == 4:
        for i in range(length):
            memcpy(&character, data + 4 * i, 4)
            if character > 0x10FFFF:
                return NULL
    # aligned by a copy: what is read may begin at any byte
    if width == 1:
        made = PyUnicode_FromKindAndData(PyUnicode_1BYTE_KIND, data, length)
    else:
        made = read_wide(data, length, width)
    r.at += length * width
    return made


cdef PyObject *read_wide(const char *data, Py_ssize_t length, int width) noexcept:
    cdef void *aligned = PyMem_Malloc(length * width)
    cdef PyObject *made
    if aligned == NULL:
        return NULL
    memcpy(aligned, data, length * width)
    made = PyUnicode_FromKindAndData(PyUnicode_2BYTE_KIND if width == 2 else PyUnicode_4BYTE_KIND, aligned, length)
    PyMem_Free(aligned)
    return made


cdef PyObject *read_key(Reader *r, int depth) noexcept:
    """The key of a dict: usually a short string that was a key before."""
    cdef Py_ssize_t length = <uint8_t>r.at[0]
    cdef uint64_t mixed = 0
    cdef PyObject **cached
    cdef PyObject *made
    if not SHMRING_TREES or not 1 <= length <= KEY_BYTES or length >= r.end - r.at:
        return read_value(r, depth)
    memcpy(&mixed, r.at + 1, length if length < 8 else 8)
    mixed = (mixed ^ <uint64_t>length ^ (<uint64_t><uint8_t>r.at[length] << 40)) * 0x9E3779B97F4A7C15ULL
    cached = &keys[mixed >> 55]
    if (cached[0] != NULL and PyUnicode_GET_LENGTH(cached[0]) == length
            and memcmp(PyUnicode_DATA(cached[0]), r.at + 1, length) == 0):
        r.at += 1 + length
        Py_INCREF(cached[0])
        return cached[0]
    r.at += 1
    made = read_ascii(r, length)
    if made != NULL:
        Py_XDECREF(cached[0])
        Py_INCREF(made)
        cached[0] = made
    return made


cdef PyObject *read_dict(Reader *r, Py_ssize_t count, int depth) noexcept:
    cdef PyObject *made
    cdef PyObject *key
    cdef PyObject *value
    cdef int failed
    if count > (r.end - r.at) // 2 or depth == 0:
        return NULL
    made = PyDict_New()
    while made != NULL and count > 0:
        key = read_key(r, depth - 1) if r.at < r.end else NULL
        value = read_value(r, depth - 1) if key != NULL else NULL
        failed = PyDict_SetItem(made, key, value) if value != NULL else -1
        if failed and value != NULL and PyErr_ExceptionMatches(TypeError):
            PyErr_Clear()  # a key that cannot be one
        Py_XDECREF(key)
        Py_XDECREF(value)
        if failed:
            Py_DECREF(made)
            return NULL
        count -= 1
    return made


cdef PyObject *read_items(Reader *r, PyObject *made, PyObject **items, Py_ssize_t count, int depth) noexcept:
    """Fill a new list or tuple, or give it up."""
    cdef Py_ssize_t i
    for i in range(count):
        items[i] = read_value(r, depth - 1)
        if items[i] == NULL:
            Py_DECREF(made)
            return NULL
    return made


cdef PyObject *read_list(Reader *r, Py_ssize_t count, int depth) noexcept:
    cdef PyObject *made = PyList_New(count) if count <= r.end - r.at and depth > 0 else NULL
    return read_items(r, made, list_items(made), count, depth) if made != NULL else NULL


cdef PyObject *read_tuple(Reader *r, Py_ssize_t count, int depth) noexcept:
    cdef PyObject *made = PyTuple_New(count) if count <= r.end - r.at and depth > 0 else NULL
    return read_items(r, made, tuple_items(made), count, depth) if made != NULL else NULL


cdef PyObject *held(PyObject *obj) noexcept:
    Py_INCREF(obj)
    return obj


cdef PyObject *read_value(Reader *r, int depth) noexcept:
    """A new reference; NULL with no exception set for bytes that mean nothing."""
    cdef int tag
    cdef int8_t value1
    cdef int16_t value2
    cdef int32_t value4
    cdef int64_t value8
    cdef uint32_t length
    cdef double number
    cdef PyObject *made
    if r.at >= r.end:
        return NULL
    tag = <uint8_t>r.at[0]
    r.at += 1
    if tag < FIX_INT:
        return read_ascii(r, tag)
    if tag < FIX_DICT:
        return PyLong_FromLongLong(tag & 0x3F)
    if tag < NONE:
        if tag < FIX_LIST:
            return read_dict(r, tag & 0x0F, depth)
        if tag < FIX_TUPLE:
            return read_list(r, tag & 0x0F, depth)
        return read_tuple(r, tag & 0x0F, depth) if tag < FIX_TUPLE + 16 else NULL
    if tag <= TRUE:
        return held(none if tag == NONE else true if tag == TRUE else false)
    if tag == INT1 and r.end - r.at >= 1:
        memcpy(&value1, r.at, 1)
        r.at += 1
        return PyLong_FromLongLong(value1)
    if tag == INT2 and r.end - r.at >= 2:
        memcpy(&value2, r.at, 2)
        r.at += 2
        return PyLong_FromLongLong(value2)
    if r.end - r.at < 4:
        return NULL
    if tag == INT4:
        memcpy(&value4, r.at, 4)
        r.at += 4
        return PyLong_FromLongLong(value4)
    if tag == FLOAT or tag == INT8:
        if r.end - r.at < 8:
            return NULL
        memcpy(&value8, r.at, 8)
        memcpy(&number, r.at, 8)
        r.at += 8
        return PyFloat_FromDouble(number) if tag == FLOAT else PyLong_FromLongLong(value8)
    memcpy(&length, r.at, 4)
    r.at += 4
    if tag == STR_ASCII:
        return read_ascii(r, length)
    if tag == STR1 or tag == STR2 or tag == STR4:
        return read_str(r, length, 1 if tag == STR1 else 2 if tag == STR2 else 4)
    if tag == BYTES:
        if length > r.end - r.at:
            return NULL
        made = bytes_from(r.at, length)
        r.at += length
        return made
    if tag == DICT:
        return read_dict(r, length, depth)
    if tag == LIST:
        return read_list(r, length, depth)
    if tag == TUPLE:
        return read_tuple(r, length, depth)
    return NULL


cdef int raise_current() except -1:
    return -1  # with the exception that is set already


cdef object tree_read(const char *data, uint64_t length):
    cdef Reader reader
    cdef PyObject *made
    cdef object tree
    reader.at = data
    reader.end = data + length
    made = read_value(&reader, TREE_DEPTH)
    if made == NULL:
        if PyErr_Occurred():
            raise_current()
        raise DecodeError(
            f"a message of {length} bytes was taken and cannot be decoded: its bytes up to {reader.at - data}"
            " are those of no tree of builtins"
        )
    tree = <object>made
    Py_DECREF(made)
    if reader.at != reader.end:
        raise DecodeError(
            f"a message of {length} bytes was taken and cannot be decoded: its object ends at byte"
            f" {reader.at - data}"
        )
    return tree


# ---- from Python --------------------------------------------------------------------------------

def encode(obj, /):
    """Encode a tree of exact builtins.

    Args:
        obj: any object.

    Returns:
        bytes; None if the object is not such a tree, or holds something twice.
    """
    cdef char room[4096]
    cdef Writer writer
    if not tree_write(&writer, room, sizeof(room), obj):
        return None
    try:
        return PyBytes_FromStringAndSize(writer.start, writer.at - writer.start)
    finally:
        tree_free(&writer)


def decode(bytes data not None, /):
    """Decode what :func:`encode` returned.

    Args:
        data: bytes, which may come from anywhere: no code is run.

    Raises:
        DecodeError: they are not those of a tree.
    """
    return tree_read(PyBytes_AS_STRING(data), PyBytes_GET_SIZE(data))
