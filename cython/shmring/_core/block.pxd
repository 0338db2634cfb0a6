"""What Cython sees of block.h: large buffers, lent to their receivers."""

from libc.stdint cimport int64_t, uint32_t, uint64_t

from shmring._core.area cimport File
from shmring._core.layout cimport Block, Header

cdef extern from "block.h" nogil:
    ctypedef struct BlockMapping "block_mapping":
        char *data  # capacity bytes, or NULL
        uint64_t capacity

    ctypedef struct BlockSpace "block_space":
        Header *header
        Block *blocks  # the records
        uint64_t refused_ns  # when /dev/shm was last full
        uint64_t vain_ns  # the last return before a wait in vain
        BlockMapping *mappings

    const uint64_t BLOCK_IDLE_NS
    const uint64_t BLOCK_REFUSED_NS

    int block_start() except -1
    int block_space_open(Header *header, int fd, const File *own, BlockSpace **out) noexcept
    BlockSpace *block_space_keep(BlockSpace *space) noexcept
    void block_space_leave(BlockSpace *space) noexcept
    int block_make_records(Header *header, int fd, const File *own) noexcept
    void block_free(BlockSpace *space, int index, uint64_t freed_ns) noexcept
    int block_take(BlockSpace *space, uint64_t me, uint64_t bytes) noexcept
    uint64_t block_last_return(BlockSpace *space, uint64_t bytes) noexcept
    void block_reap_sometimes(BlockSpace *space, uint64_t me) noexcept
    int block_drop_idle(BlockSpace *space, uint64_t me, uint64_t since_ns) noexcept
    bint block_any_idle(BlockSpace *space, uint64_t since_ns) noexcept
    int block_create(BlockSpace *space, uint64_t me, uint64_t bytes) noexcept
    void block_recover(BlockSpace *space, uint64_t write_position) noexcept
    int block_check(BlockSpace *space, uint64_t index, uint64_t position, uint64_t length) noexcept
    void block_lend(BlockSpace *space, int index, uint64_t me) noexcept
    void block_return(BlockSpace *space, int index, char *data, uint64_t capacity, uint32_t epoch,
                      uint64_t me) noexcept
