"""What Cython sees of builtin_codec.h: trees of exact builtins to bytes and back."""

cdef extern from "builtin_codec.h":
    # A tree on its way into bytes, which are start to at.
    ctypedef struct Writer "codec_writer":
        char *start
        char *at

    # False: the object is pickle's, and nothing is left to be freed.
    bint codec_encode(Writer *writer, char *room, size_t room_bytes, object obj) noexcept
    void codec_free(Writer *writer) noexcept
    # NULL, without an exception set for bytes that codec_encode cannot have written.
    void *codec_decode(const char *data, size_t length, size_t *consumed) noexcept
