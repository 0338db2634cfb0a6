/* Builtin codec: trees of exact builtins to bytes and back, at a quarter of pickle's cost.
 *
 * A tree is made of dict, list, tuple, str, bytes, int, float, bool and None, of
 * exactly these types.  Any other object, and a container or long string that occurs
 * twice (pickle keeps its identity, this codec does not), leaves the whole to pickle.
 * Only an object with more than one reference can occur twice; only those are remembered.
 *
 * What is read is untrusted: each length is checked against what is left before it
 * is used, nothing is allocated for more elements than there are bytes, the depth
 * is bounded, and a string is made only of characters that exist.  No code is run.
 *
 *     tag        means                          follows
 *     00 - 3f    str of ASCII, length = tag     the characters
 *     40 - 7f    int 0 to 63
 *     80 - 8f    dict of 0 to 15 pairs          key, value, key, value, ...
 *     90 - 9f    list of 0 to 15                the elements
 *     a0 - af    tuple of 0 to 15               the elements
 *     c0 c1 c2   None, False, True
 *     c3         float                          8 bytes
 *     c4 - c7    int                            1, 2, 4, 8 bytes, signed
 *     c8 - cb    str: ASCII, or 1, 2, 4 bytes   u32 length, then the characters
 *                a character
 *     cc         bytes                          u32 length, then they
 *     cd ce cf   dict, list, tuple              u32 count, then as above
 *
 * Numbers are in the machine's byte order: a ring never leaves it.
 */
#ifndef SHMRING_BUILTIN_CODEC_H
#define SHMRING_BUILTIN_CODEC_H

#include <Python.h>

#include <stdint.h>
#include <string.h>

/* Without a GIL a container may change while it is read: each element is held while it is
 * written, a dict is locked, and one that changed meanwhile is left to pickle. */
#ifdef Py_GIL_DISABLED
#define CODEC_HELD 1 /* a reference of our own to what is written */
#define CODEC_HOLD(o) Py_INCREF(o)
#define CODEC_LET_GO(o) Py_DECREF(o)
#define CODEC_LOCK(o) Py_BEGIN_CRITICAL_SECTION(o)
#define CODEC_UNLOCK() Py_END_CRITICAL_SECTION()
#else
#define CODEC_HELD 0
#define CODEC_HOLD(o) ((void)(o))
#define CODEC_LET_GO(o) ((void)(o))
#define CODEC_LOCK(o) {
#define CODEC_UNLOCK() }
#endif

#define CODEC_SHARED 16 /* objects of one tree that have other references */
#define CODEC_DEPTH 32  /* containers within containers */
#define CODEC_SCALAR_BYTES 16 /* a tag and what follows it, without characters */
#define CODEC_LONG_BYTES 64 /* strings from this length on are remembered, */
#define CODEC_LARGE_BYTES 65536 /* and from this one on left to pickle, which copies them once less */
#define CODEC_KEYS 512
#define CODEC_KEY_BYTES 32

enum {
    FIX_STR = 0x00, FIX_INT = 0x40, FIX_DICT = 0x80, FIX_LIST = 0x90, FIX_TUPLE = 0xA0,
    TAG_NONE = 0xC0, TAG_FALSE, TAG_TRUE, TAG_FLOAT,
    TAG_INT1, TAG_INT2, TAG_INT4, TAG_INT8,
    TAG_ASCII, TAG_STR1, TAG_STR2, TAG_STR4,
    TAG_BYTES, TAG_DICT, TAG_LIST, TAG_TUPLE,
};

/* An int of one digit, which most are: its value without a call. */
#if PY_VERSION_HEX >= 0x030C0000
#define CODEC_IS_SHORT(o) PyUnstable_Long_IsCompact((PyLongObject *)(o))
#define CODEC_SHORT(o) PyUnstable_Long_CompactValue((PyLongObject *)(o))
#else
#define CODEC_IS_SHORT(o) ((size_t)(Py_SIZE(o) + 1) <= 2)
#define CODEC_SHORT(o) (Py_SIZE(o) * (Py_ssize_t)((PyLongObject *)(o))->ob_digit[0])
#endif

typedef struct {
    char *start; /* the room that was given, */
    char *at;
    char *end;
    int heap; /* or memory of its own, when that was too small */
    int depth;
    int shared_count;
    PyObject *shared[CODEC_SHARED];
} codec_writer;

typedef struct {
    const char *at;
    const char *end;
} codec_reader;

/* memcpy for a few bytes, whose call costs more than the copy. */
static inline void codec_copy(char *to, const char *from, size_t size)
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

/* ---- writing: 0 means that the object is pickle's ----------------------------- */

static void codec_free(codec_writer *w)
{
    if (w->heap)
        PyMem_Free(w->start);
    w->heap = 0;
}

static int codec_enlarge(codec_writer *w, Py_ssize_t needed)
{
    Py_ssize_t used = w->at - w->start, wanted = 2 * (used + needed);
    char *memory = w->heap ? PyMem_Realloc(w->start, wanted) : PyMem_Malloc(wanted);
    if (memory == NULL)
        return 0; /* pickle reports that memory is out, or finds some */
    if (!w->heap)
        memcpy(memory, w->start, used);
    w->heap = 1;
    w->start = memory;
    w->at = memory + used;
    w->end = memory + wanted;
    return 1;
}

static inline int codec_room(codec_writer *w, Py_ssize_t needed)
{
    return w->end - w->at >= needed || codec_enlarge(w, needed);
}

/* Whether only the container that holds an object refers to it: it cannot occur twice. */
static inline int codec_is_alone(PyObject *obj)
{
#ifdef Py_GIL_DISABLED
    /* the count of another thread's object may move between its two halves while they are read */
    return obj->ob_tid == _Py_ThreadId() && Py_REFCNT(obj) == 1 + CODEC_HELD;
#else
    return Py_REFCNT(obj) == 1;
#endif
}

/* Whether an object with other references occurs for the first time. */
static int codec_is_first(codec_writer *w, PyObject *obj)
{
    for (int i = 0; i < w->shared_count; i++)
        if (w->shared[i] == obj)
            return 0;
    if (w->shared_count == CODEC_SHARED)
        return 0; /* too many to remember */
    w->shared[w->shared_count++] = obj;
    return 1;
}

static inline void codec_put(codec_writer *w, int tag, const void *value, size_t size)
{
    *w->at = (char)tag;
    memcpy(w->at + 1, value, size);
    w->at += 1 + size;
}

static inline void codec_put_length(codec_writer *w, int tag, Py_ssize_t count)
{
    uint32_t length = (uint32_t)count;
    codec_put(w, tag, &length, 4);
}

static inline void codec_put_head(codec_writer *w, int fixed, int tag, Py_ssize_t count)
{
    if (count < 16)
        *w->at++ = (char)(fixed | count);
    else
        codec_put_length(w, tag, count);
}

/* Whether a string of that length is short, or occurs for the first time. */
static inline int codec_takes(codec_writer *w, PyObject *obj, Py_ssize_t length)
{
    return length < CODEC_LONG_BYTES
        || (length < CODEC_LARGE_BYTES && (codec_is_alone(obj) || codec_is_first(w, obj)));
}

static inline int codec_write_str(codec_writer *w, PyObject *obj)
{
    Py_ssize_t length = PyUnicode_GET_LENGTH(obj), size = length;
    if (!codec_takes(w, obj, length))
        return 0;
    if (PyUnicode_IS_COMPACT_ASCII(obj)) {
        if (!codec_room(w, CODEC_SCALAR_BYTES + size))
            return 0;
        if (length < CODEC_LONG_BYTES)
            *w->at++ = (char)(FIX_STR | length);
        else
            codec_put_length(w, TAG_ASCII, length);
    } else {
        int width = (int)PyUnicode_KIND(obj);
        size *= width;
        if (!PyUnicode_IS_COMPACT(obj) || !codec_room(w, CODEC_SCALAR_BYTES + size))
            return 0;
        codec_put_length(w, width == 1 ? TAG_STR1 : width == 2 ? TAG_STR2 : TAG_STR4, length);
    }
    codec_copy(w->at, (const char *)PyUnicode_DATA(obj), (size_t)size);
    w->at += size;
    return 1;
}

static inline int codec_write_int(codec_writer *w, PyObject *obj)
{
    int overflow = 0;
    int64_t value = CODEC_IS_SHORT(obj) ? CODEC_SHORT(obj) : PyLong_AsLongLongAndOverflow(obj, &overflow);
    int8_t value1 = (int8_t)value;
    int16_t value2 = (int16_t)value;
    int32_t value4 = (int32_t)value;
    if (overflow)
        return 0;
    if (value >= 0 && value < 64)
        *w->at++ = (char)(FIX_INT | value);
    else if (value == value1)
        codec_put(w, TAG_INT1, &value1, 1);
    else if (value == value2)
        codec_put(w, TAG_INT2, &value2, 2);
    else if (value == value4)
        codec_put(w, TAG_INT4, &value4, 4);
    else
        codec_put(w, TAG_INT8, &value, 8);
    return 1;
}

static int codec_write_bytes(codec_writer *w, PyObject *obj)
{
    Py_ssize_t count = PyBytes_GET_SIZE(obj);
    if (!codec_takes(w, obj, count) || !codec_room(w, CODEC_SCALAR_BYTES + count))
        return 0;
    codec_put_length(w, TAG_BYTES, count);
    memcpy(w->at, PyBytes_AS_STRING(obj), count);
    w->at += count;
    return 1;
}

static int codec_write_longer(codec_writer *w, PyObject *obj, int root);

static inline int codec_write(codec_writer *w, PyObject *obj)
{
    if (PyUnicode_CheckExact(obj))
        return codec_write_str(w, obj);
    if (!codec_room(w, CODEC_SCALAR_BYTES))
        return 0;
    if (PyLong_CheckExact(obj))
        return codec_write_int(w, obj);
    if (PyFloat_CheckExact(obj)) {
        double number = PyFloat_AS_DOUBLE(obj);
        codec_put(w, TAG_FLOAT, &number, 8);
        return 1;
    }
    if (obj == Py_None || obj == Py_True || obj == Py_False) {
        *w->at++ = (char)(obj == Py_None ? TAG_NONE : obj == Py_True ? TAG_TRUE : TAG_FALSE);
        return 1;
    }
    return codec_write_longer(w, obj, 0);
}

static int codec_write_pairs(codec_writer *w, PyObject *dict, Py_ssize_t count)
{
    PyObject *key, *value;
    Py_ssize_t place = 0, left = count;
    int taken = 1;
    codec_put_head(w, FIX_DICT, TAG_DICT, count);
    CODEC_LOCK(dict);
    while (taken && PyDict_Next(dict, &place, &key, &value)) {
        CODEC_HOLD(key);
        CODEC_HOLD(value);
        taken = left-- > 0 && codec_write(w, key) && codec_write(w, value);
        CODEC_LET_GO(key);
        CODEC_LET_GO(value);
    }
    CODEC_UNLOCK();
    return taken && left == 0;
}

static int codec_write_list(codec_writer *w, PyObject *list, Py_ssize_t count)
{
    int taken = 1;
    codec_put_head(w, FIX_LIST, TAG_LIST, count);
    for (Py_ssize_t i = 0; taken && i < count; i++) {
#ifdef Py_GIL_DISABLED
        PyObject *item = PyList_GetItemRef(list, i);
        if (item == NULL) {
            PyErr_Clear(); /* it became shorter */
            return 0;
        }
#else
        PyObject *item = ((PyListObject *)list)->ob_item[i];
#endif
        taken = codec_write(w, item);
        CODEC_LET_GO(item);
    }
    return taken;
}

static int codec_write_tuple(codec_writer *w, PyObject *tuple, Py_ssize_t count)
{
    int taken = 1;
    codec_put_head(w, FIX_TUPLE, TAG_TUPLE, count);
    for (Py_ssize_t i = 0; taken && i < count; i++) {
        PyObject *item = PyTuple_GET_ITEM(tuple, i);
        CODEC_HOLD(item);
        taken = codec_write(w, item);
        CODEC_LET_GO(item);
    }
    return taken;
}

/* Bytes or a container; of the root it does not matter what else refers to it. */
static int codec_write_longer(codec_writer *w, PyObject *obj, int root)
{
    Py_ssize_t count;
    int is_dict = PyDict_CheckExact(obj), is_list = PyList_CheckExact(obj);
    if (PyBytes_CheckExact(obj))
        return codec_write_bytes(w, obj);
    if (is_dict)
        count = PyDict_GET_SIZE(obj);
    else if (is_list)
        count = PyList_GET_SIZE(obj);
    else if (PyTuple_CheckExact(obj))
        count = PyTuple_GET_SIZE(obj);
    else
        return 0;
    /* there is one empty tuple, and everything refers to it */
    int once = root || codec_is_alone(obj) || (count == 0 && !is_dict && !is_list);
    if (w->depth == CODEC_DEPTH || count > UINT32_MAX || !(once || codec_is_first(w, obj)))
        return 0;
    w->depth++;
    int taken = is_dict ? codec_write_pairs(w, obj, count)
        : is_list       ? codec_write_list(w, obj, count)
                        : codec_write_tuple(w, obj, count);
    w->depth--;
    return taken;
}

/* Encode `obj` into `room`, or into memory of its own if it needs more.  0: it is
 * pickle's, and nothing is left to be freed. */
static int codec_encode(codec_writer *w, char *room, size_t room_bytes, PyObject *obj)
{
    int container = PyDict_CheckExact(obj) || PyList_CheckExact(obj) || PyTuple_CheckExact(obj);
    w->start = w->at = room;
    w->end = room + room_bytes;
    w->heap = w->depth = w->shared_count = 0;
    if (container ? codec_room(w, CODEC_SCALAR_BYTES) && codec_write_longer(w, obj, 1) : codec_write(w, obj))
        return 1;
    codec_free(w);
    return 0;
}

/* ---- reading: a new reference; NULL with no exception set for bytes that mean nothing ---- */

static PyObject *codec_read(codec_reader *r, int depth);

static inline Py_ssize_t codec_left(const codec_reader *r) { return r->end - r->at; }

static inline int codec_is_ascii(const char *data, Py_ssize_t length)
{
    uint64_t eight, seen = 0;
    Py_ssize_t i = 0;
    for (; i + 8 <= length; i += 8) {
        memcpy(&eight, data + i, 8);
        seen |= eight;
    }
    for (; i < length; i++)
        seen |= (uint8_t)data[i];
    return (seen & 0x8080808080808080ULL) == 0;
}

static PyObject *codec_read_ascii(codec_reader *r, Py_ssize_t length)
{
    if (length > codec_left(r) || !codec_is_ascii(r->at, length))
        return NULL;
    PyObject *made = PyUnicode_New(length, 127);
    if (made != NULL) {
        codec_copy((char *)PyUnicode_DATA(made), r->at, (size_t)length);
        r->at += length;
    }
    return made;
}

/* Characters of 2 or 4 bytes, which begin at any byte. */
static PyObject *codec_read_wide(const char *data, Py_ssize_t length, int width)
{
    void *aligned = PyMem_Malloc((size_t)(length * width));
    if (aligned == NULL)
        return NULL;
    memcpy(aligned, data, (size_t)(length * width));
    PyObject *made = PyUnicode_FromKindAndData(width == 2 ? PyUnicode_2BYTE_KIND : PyUnicode_4BYTE_KIND, aligned, length);
    PyMem_Free(aligned);
    return made;
}

static PyObject *codec_read_str(codec_reader *r, Py_ssize_t length, int width)
{
    const char *data = r->at;
    if (length > codec_left(r) / width)
        return NULL;
    for (Py_ssize_t i = 0; width == 4 && i < length; i++) {
        uint32_t character;
        memcpy(&character, data + 4 * i, 4);
        if (character > 0x10FFFF)
            return NULL;
    }
    r->at += length * width;
    if (width == 1)
        return PyUnicode_FromKindAndData(PyUnicode_1BYTE_KIND, data, length);
    return codec_read_wide(data, length, width);
}

/* The keys of dicts that were read lately: a program sends the same few again and
 * again, and a key that exists need not be made, nor hashed.  The GIL guards them;
 * without one they are not kept. */
static PyObject *codec_keys[CODEC_KEYS];

static PyObject *codec_read_key(codec_reader *r, int depth)
{
    if (r->at >= r->end)
        return NULL;
    Py_ssize_t length = (uint8_t)r->at[0];
    if (CODEC_HELD || length < 1 || length > CODEC_KEY_BYTES || length >= codec_left(r))
        return codec_read(r, depth);
    uint64_t mixed = 0;
    memcpy(&mixed, r->at + 1, length < 8 ? (size_t)length : 8);
    mixed = (mixed ^ (uint64_t)length ^ ((uint64_t)(uint8_t)r->at[length] << 40)) * 0x9E3779B97F4A7C15ULL;
    PyObject **cached = &codec_keys[mixed >> 55];
    if (*cached != NULL && PyUnicode_GET_LENGTH(*cached) == length
        && memcmp(PyUnicode_DATA(*cached), r->at + 1, (size_t)length) == 0) {
        r->at += 1 + length;
        return Py_NewRef(*cached);
    }
    r->at++;
    PyObject *made = codec_read_ascii(r, length);
    if (made != NULL)
        Py_XSETREF(*cached, Py_NewRef(made));
    return made;
}

static PyObject *codec_read_dict(codec_reader *r, Py_ssize_t count, int depth)
{
    if (count > codec_left(r) / 2 || depth == 0)
        return NULL;
    PyObject *made = PyDict_New();
    for (; made != NULL && count > 0; count--) {
        PyObject *key = codec_read_key(r, depth - 1);
        PyObject *value = key != NULL ? codec_read(r, depth - 1) : NULL;
        int failed = value != NULL ? PyDict_SetItem(made, key, value) : -1;
        if (failed && value != NULL && PyErr_ExceptionMatches(PyExc_TypeError))
            PyErr_Clear(); /* a key that cannot be one */
        Py_XDECREF(key);
        Py_XDECREF(value);
        if (failed)
            Py_CLEAR(made);
    }
    return made;
}

static PyObject *codec_read_items(codec_reader *r, Py_ssize_t count, int depth, int is_list)
{
    if (count > codec_left(r) || depth == 0)
        return NULL;
    PyObject *made = is_list ? PyList_New(count) : PyTuple_New(count);
    if (made == NULL)
        return NULL;
    PyObject **items = is_list ? ((PyListObject *)made)->ob_item : ((PyTupleObject *)made)->ob_item;
    for (Py_ssize_t i = 0; i < count; i++) {
        items[i] = codec_read(r, depth - 1);
        if (items[i] == NULL) {
            Py_DECREF(made);
            return NULL;
        }
    }
    return made;
}

static PyObject *codec_read(codec_reader *r, int depth)
{
    int8_t value1;
    int16_t value2;
    int32_t value4;
    int64_t value8;
    uint32_t length;
    double number;
    if (r->at >= r->end)
        return NULL;
    int tag = (uint8_t)*r->at++;
    if (tag < FIX_INT)
        return codec_read_ascii(r, tag);
    if (tag < FIX_DICT)
        return PyLong_FromLong(tag & 0x3F);
    if (tag < FIX_LIST)
        return codec_read_dict(r, tag & 0x0F, depth);
    if (tag < FIX_TUPLE + 16)
        return codec_read_items(r, tag & 0x0F, depth, tag < FIX_TUPLE);
    if (tag < TAG_NONE)
        return NULL;
    if (tag <= TAG_TRUE)
        return Py_NewRef(tag == TAG_NONE ? Py_None : tag == TAG_TRUE ? Py_True : Py_False);
    if (tag == TAG_INT1 && codec_left(r) >= 1) {
        memcpy(&value1, r->at, 1);
        r->at += 1;
        return PyLong_FromLong(value1);
    }
    if (tag == TAG_INT2 && codec_left(r) >= 2) {
        memcpy(&value2, r->at, 2);
        r->at += 2;
        return PyLong_FromLong(value2);
    }
    if (codec_left(r) < 4)
        return NULL;
    if (tag == TAG_INT4) {
        memcpy(&value4, r->at, 4);
        r->at += 4;
        return PyLong_FromLong(value4);
    }
    if (tag == TAG_FLOAT || tag == TAG_INT8) {
        if (codec_left(r) < 8)
            return NULL;
        memcpy(&value8, r->at, 8);
        memcpy(&number, r->at, 8);
        r->at += 8;
        return tag == TAG_FLOAT ? PyFloat_FromDouble(number) : PyLong_FromLongLong(value8);
    }
    memcpy(&length, r->at, 4);
    r->at += 4;
    switch (tag) {
    case TAG_ASCII:
        return codec_read_ascii(r, length);
    case TAG_STR1:
        return codec_read_str(r, length, 1);
    case TAG_STR2:
        return codec_read_str(r, length, 2);
    case TAG_STR4:
        return codec_read_str(r, length, 4);
    case TAG_BYTES:
        if (length > codec_left(r))
            return NULL;
        r->at += length;
        return PyBytes_FromStringAndSize(r->at - length, length);
    case TAG_DICT:
        return codec_read_dict(r, length, depth);
    case TAG_LIST:
    case TAG_TUPLE:
        return codec_read_items(r, length, depth, tag == TAG_LIST);
    default:
        return NULL;
    }
}

/* The object; `consumed` is how many bytes it is made of, or where they went wrong. */
static PyObject *codec_decode(const char *data, size_t length, size_t *consumed)
{
    codec_reader r = {data, data + length};
    PyObject *made = codec_read(&r, CODEC_DEPTH);
    *consumed = (size_t)(r.at - data);
    return made;
}

#endif
