"""What Cython sees of area.h: areas of the file and their mappings."""

from libc.stdint cimport int64_t, uint64_t

from shmring._core.layout cimport Area, Block, Header

cdef extern from "area.h" nogil:
    ctypedef struct Mapping "area_mapping":
        char *data  # capacity bytes, and the same again behind them
        uint64_t capacity
        uint64_t mask
        uint64_t base  # the position at which the area begins
        uint64_t generation
        int64_t references  # one a side of the handle, and one for each view

    ctypedef struct File "area_file":
        uint64_t device
        uint64_t inode
        uint64_t bytes

    const uint64_t AREA_GARBAGE  # what area_next_capacity returns when the records are none

    int area_stat(int fd, File *file) noexcept
    int area_is_ours(int fd, const File *own, File *file) noexcept
    uint64_t area_page() noexcept
    uint64_t area_power_of_two(uint64_t value) noexcept
    void area_release(Mapping *mapping) noexcept
    int area_tidy(Header *header, const Block *blocks, int fd, const File *own) noexcept
    uint64_t area_next_capacity(Header *header, uint64_t current, uint64_t need, uint64_t wish) noexcept
    bint area_may_shrink(Header *header) noexcept
    int area_grow(Header *header, const Block *blocks, int fd, const File *own, uint64_t capacity,
                  Mapping **out) noexcept
    int area_open(Header *header, int fd, const File *own, uint64_t generation, Mapping **out) noexcept
    int area_reap(Header *header, int fd, const File *own) noexcept
    void area_forget(Header *header, const Block *blocks, int fd, const File *own) noexcept
