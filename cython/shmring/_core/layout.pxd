"""What Cython sees of layout.h, where the diagrams and the offsets stand."""

from libc.stdint cimport uint32_t, uint64_t

cdef extern from "layout.h" nogil:
    const uint64_t SHMRING_MAGIC
    const uint64_t SHMRING_BLOCK_MAGIC
    const uint64_t SHMRING_VERSION
    const uint64_t SHMRING_HEADER_BYTES
    const uint64_t SHMRING_WAITING_OFFSET
    const uint64_t SHMRING_PRODUCERS_OFFSET
    const uint64_t SHMRING_CONSUMERS_OFFSET
    const uint64_t SHMRING_JOINING_OFFSET
    const uint64_t SHMRING_DEATHS_OFFSET
    const uint64_t SHMRING_DEATH_COUNT
    const uint64_t SHMRING_AREAS_OFFSET
    const uint64_t SHMRING_AREA_COUNT
    const uint64_t SHMRING_WAITERS_OFFSET
    const uint64_t SHMRING_WAITER_COUNT
    const uint64_t SHMRING_CLAIMS_OFFSET
    const uint64_t SHMRING_CLAIM_COUNT
    const uint64_t SHMRING_FRAME_BYTES
    const uint64_t SHMRING_BLOCK_COUNT
    const uint64_t SHMRING_BLOCKS_BYTES
    const uint64_t SHMRING_MIN_CAPACITY
    const uint64_t SHMRING_MAX_CAPACITY
    const uint32_t SHMRING_NO_CPU
    const uint32_t SHMRING_KIND_BYTES
    const uint32_t SHMRING_KIND_PICKLE
    const uint32_t SHMRING_KIND_MSGPACK
    const uint32_t SHMRING_KIND_USER
    const uint32_t SHMRING_KIND_BUILTINS
    const uint32_t SHMRING_KIND_MESSAGE
    const uint32_t SHMRING_KIND_MULTI
    const uint32_t SHMRING_WHOLE
    const uint32_t SHMRING_RESERVED
    const uint32_t SHMRING_ABORTED
    const uint32_t SHMRING_LENT
    const uint64_t SHMRING_NO_POSITION
    const uint64_t SHMRING_SEGMENT_LENT
    const int SHMRING_SEGMENT_INDEX_SHIFT
    const uint64_t SHMRING_SEGMENT_LENGTH

    ctypedef struct Count "shmring_count":
        uint64_t previous
        uint64_t current
        uint64_t position

    ctypedef struct Area "shmring_area":
        uint64_t base  # the position at which it begins
        uint64_t capacity  # a power of two
        uint64_t offset  # where it lies in the file

    ctypedef struct Block "shmring_block":
        uint64_t holder  # 0 is free
        uint64_t position  # of the message that names it
        uint64_t offset
        uint64_t capacity  # 0 is an empty slot
        uint64_t serial
        uint64_t freed_ns

    ctypedef struct Claim "shmring_claim":
        uint64_t owner  # 0 is a free slot
        uint64_t low  # held while low < high
        uint64_t high
        uint64_t key  # which worker of the owner's process

    ctypedef struct Death "shmring_death":
        uint64_t pid
        uint64_t when_ns

    ctypedef struct Waiter "shmring_waiter":
        uint64_t owner  # 0 is a free slot
        uint64_t since_ns
        uint32_t thread
        uint32_t call
        uint32_t reason

    ctypedef struct Header "shmring_header":
        uint64_t magic
        uint32_t version
        uint32_t header_bytes
        uint64_t min_capacity  # of the first area; what shrinking returns to
        uint64_t max_capacity  # of all living areas together
        uint64_t max_messages  # 0 is no limit
        uint64_t pid_namespace
        uint32_t ready  # stored last; an attacher waits for it
        uint32_t user_kind  # which class laid it out
        uint64_t created_ns  # diagnostics only, as creator
        uint64_t creator
        uint32_t data_wait  # consumers sleep here
        uint32_t space_wait  # producers sleep here
        uint32_t shutdown  # 0 open, 1 drain, 2 immediate
        uint32_t poisoned
        uint64_t lease_owner  # 0 is no lease
        uint64_t lease_low
        uint64_t lease_high
        uint32_t producer_lock
        uint32_t producer_cpu
        uint32_t last_producer  # diagnostics only, as last_consumer
        uint64_t write_position
        uint64_t write_generation
        Count put_count
        uint64_t starved_producer  # advisory: the producer that waits for much space
        uint64_t reserved_space
        uint64_t reserved_until_ns
        uint64_t shrunk_ns
        uint32_t patience
        uint32_t consumer_lock
        uint64_t read_position
        uint64_t read_generation
        uint64_t reaped
        Count get_count
        uint64_t empty_position
        uint64_t needed_ns
        uint32_t last_consumer
        uint64_t done_count
        uint32_t done_wait
        uint32_t recoveries
        uint64_t token
        uint32_t named
        uint32_t block_slots  # records that were ever used
        uint64_t blocks_offset  # where they lie in the file; 0 while there is none
        char *name  # 256 bytes
        Death *deaths
        Area *areas
        Waiter *waiters
        Claim *claims

    ctypedef struct Frame "shmring_frame":
        uint64_t position
        uint64_t length
        uint32_t state
        uint32_t kind
        uint64_t owner

    uint64_t shmring_frame_span(uint64_t length) noexcept
    Area *shmring_area_of(Header *header, uint64_t generation) noexcept
