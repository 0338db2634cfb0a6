/* What stands in the shared file: the one home of magic, version and offsets.
 *
 * The file (offsets in bytes)
 *
 *        0 +--------------------------------------------------------------+
 *          | identity: magic, version, limits; written once, by the creator|
 *      128 +--------------------------------------------------------------+
 *          | waiting: the two wait words, shutdown, poisoned, the lease    |
 *      256 +--------------------------------------------------------------+
 *          | producers: lock, write_position, write_generation, put_count  |
 *      384 +--------------------------------------------------------------+
 *          | consumers: lock, read_position, read_generation, get_count    |
 *      512 +--------------------------------------------------------------+
 *          | joining: how many messages were reported done; the name       |
 *      896 +--------------------------------------------------------------+
 *          | deaths: the last process that died holding each of 4 things   |
 *     1024 +--------------------------------------------------------------+
 *          | areas: 64 records (base, capacity, offset)                    |
 *     3072 +--------------------------------------------------------------+
 *          | waiters: 32 records (owner, since, what for)                  |
 *     4096 +--------------------------------------------------------------+
 *          | claims: 128 records (owner, low, high, key)                   |
 *     8192 +--------------------------------------------------------------+
 *          | the first area; later ones lie wherever a gap was found       |
 *          +--------------------------------------------------------------+
 *
 * Producers and consumers write to lines of their own, two cache lines apart
 * because the adjacent-line prefetcher fetches pairs.  The words that both
 * sides read and seldom write (line 128) stay shared in both caches.
 *
 * A frame (always contiguous, since every area is mapped twice in a row)
 *
 *        0        8       16     20     24       32            32 + length
 *        +--------+--------+------+------+--------+-------------+--------+
 *        |position| length |state | kind | owner  | payload ... | pad to 8|
 *        +--------+--------+------+------+--------+-------------+--------+
 *
 * A large buffer does not stand in the frame: the frame, in state LENT, names a block (block.h).
 * The records of the blocks are a page of the file, allocated with the first of them.
 *
 * A position is a count of bytes since the ring was made and never wraps; the
 * index into an area is position & (capacity - 1).  The position stands in the
 * frame too: a frame that lies where it does not belong is recognised.
 */
#ifndef SHMRING_LAYOUT_H
#define SHMRING_LAYOUT_H

#include <stddef.h>
#include <stdint.h>

#define SHMRING_MAGIC 0x474e4952204d4853 /* "SHM RING", little-endian */
#define SHMRING_BLOCK_MAGIC 0x4b4e4952204d4853 /* "SHM RINK": in a block of the user's, not ours to remove */
#define SHMRING_VERSION 4
#define SHMRING_HEADER_BYTES 8192
#define SHMRING_WAITING_OFFSET 128
#define SHMRING_PRODUCERS_OFFSET 256
#define SHMRING_CONSUMERS_OFFSET 384
#define SHMRING_JOINING_OFFSET 512
#define SHMRING_DEATHS_OFFSET 896
#define SHMRING_DEATH_COUNT 4
#define SHMRING_AREAS_OFFSET 1024
#define SHMRING_AREA_COUNT 64
#define SHMRING_WAITERS_OFFSET 3072
#define SHMRING_WAITER_COUNT 32
#define SHMRING_CLAIMS_OFFSET 4096
#define SHMRING_CLAIM_COUNT 128
#define SHMRING_FRAME_BYTES 32
#define SHMRING_BLOCK_COUNT 64
#define SHMRING_BLOCKS_BYTES 4096
#define SHMRING_MIN_CAPACITY 4096
#define SHMRING_MAX_CAPACITY 0x400000000000 /* 64 TiB, far from any overflow */

#define SHMRING_NO_CPU 4294967295u /* no process has run on this side yet */

/* Kinds of a message.  shmring.queues.codec repeats those of the codecs, since it also
 * serves the fallback. */
#define SHMRING_KIND_BYTES 0
#define SHMRING_KIND_PICKLE 1 /* of any encoder that returns bytes */
#define SHMRING_KIND_MSGPACK 2
#define SHMRING_KIND_USER 3
#define SHMRING_KIND_BUILTINS 4 /* builtin_codec.h */
#define SHMRING_KIND_MESSAGE 16 /* shmring.ipc.message */
#define SHMRING_KIND_MULTI 0x80000000u /* a flag: several segments, with their table in front */

/* An entry in the table of segments: its length, or, of a segment that lies in a block,
 * LENT | index of the block << 48 | length. */
#define SHMRING_SEGMENT_LENT 0x8000000000000000
#define SHMRING_SEGMENT_INDEX_SHIFT 48
#define SHMRING_SEGMENT_LENGTH 0xffffffffffff /* the bits below the index */

/* States of a frame. */
#define SHMRING_WHOLE 1
#define SHMRING_RESERVED 2
#define SHMRING_ABORTED 3
#define SHMRING_LENT 4 /* whole, and names blocks */

/* How many messages a side has counted, right after a kill between any two
 * stores: the count is `current` where the side stands at `position`, else
 * `previous`.  Stored in the order previous, position, current, and then the
 * side's own position, which commits. */
typedef struct {
    uint64_t previous;
    uint64_t current;
    uint64_t position;
} shmring_count;

typedef struct {
    uint64_t base;     /* the position at which this area begins */
    uint64_t capacity; /* a power of two, at least a page */
    uint64_t offset;   /* where it lies in the file */
    uint64_t spare;
} shmring_area;

#define SHMRING_NO_POSITION 0xffffffffffffffff

/* A block: memory for one large buffer, a cache line each. */
typedef struct {
    uint64_t holder;   /* 0 is free; an owner, or a state of block.h */
    uint64_t position; /* of the message that names it, or NO_POSITION; counts once committed */
    uint64_t offset;   /* where it lies in the file, */
    uint64_t capacity; /* and its bytes; 0 is an empty slot */
    uint64_t serial;   /* of the memory: tells a mapping that is out of date */
    uint64_t freed_ns; /* advisory: the one that came back last is the warmest */
    uint64_t spare[2];
} shmring_block;

typedef struct {
    uint64_t owner; /* 0 is a free slot */
    uint64_t low;   /* a claim is held while low < high */
    uint64_t high;
    uint64_t key; /* which worker of the owner's process; 0 while the slot is opened or closed */
} shmring_claim;

/* The next two are diagnostics only (diagnostics.h). */
typedef struct {
    uint64_t pid;     /* 0 is unknown */
    uint64_t when_ns; /* the death was found out; 0 while the record is being written */
} shmring_death;

typedef struct {
    uint64_t owner;    /* 0 is a free slot */
    uint64_t since_ns; /* 0 while the record is being written */
    uint32_t thread;
    uint32_t call;   /* CALL_GET, ... */
    uint32_t reason; /* FOR_MESSAGE, ... */
    uint32_t spare;
} shmring_waiter;

typedef struct {
    /* identity */
    uint64_t magic;
    uint32_t version;
    uint32_t header_bytes;
    uint64_t min_capacity;  /* of the first area, and what shrinking returns to */
    uint64_t max_capacity;  /* of all living areas together */
    uint64_t max_messages;  /* 0 is no limit */
    uint64_t pid_namespace; /* inode of the creator's; owners are named by pid */
    uint32_t ready;         /* stored last; an attacher waits for it */
    uint32_t user_kind;     /* which class laid it out, so that attach refuses another */
    uint64_t created_ns;    /* these two are diagnostics only; 0 is unknown */
    uint64_t creator;       /* an owner, see owner.h */
    char pad_identity[SHMRING_WAITING_OFFSET - 72];
    /* waiting: mostly read */
    uint32_t data_wait;  /* consumers sleep here */
    uint32_t space_wait; /* producers sleep here */
    uint32_t shutdown;   /* 0 open, 1 drain, 2 immediate */
    uint32_t poisoned;
    uint64_t lease_owner; /* 0 is no lease */
    uint64_t lease_low;
    uint64_t lease_high;
    uint64_t watches[2];    /* see watch.h; advisory, as the next */
    uint64_t long_until_ns; /* some consumer may sleep for long until then */
    char pad_waiting[128 - 64];
    /* producers */
    uint32_t producer_lock;
    uint32_t producer_holder; /* pid, or 0; see diagnostics.h */
    uint64_t write_position;
    uint64_t write_generation;
    shmring_count put_count;
    uint64_t starved_producer; /* advisory: the producer that waits for much space */
    uint64_t reserved_space;
    uint64_t reserved_until_ns;
    uint64_t shrunk_ns; /* advisory, as patience and needed_ns: 0, or nothing has grown since */
    uint32_t patience;  /* how often shrinking proved wrong lately */
    uint32_t producer_cpu; /* where the last producer ran, for spinning */
    uint32_t last_producer; /* its pid; diagnostics only, as last_consumer: 0 is unknown */
    char pad_producers[128 - 92];
    /* consumers */
    uint32_t consumer_lock;
    uint32_t consumer_holder; /* as producer_holder */
    uint64_t read_position;
    uint64_t read_generation;
    uint64_t reaped; /* areas below this generation were given back */
    shmring_count get_count;
    uint64_t empty_position; /* where consumers last found nothing more */
    uint64_t needed_ns;      /* when the area was last of use, or made */
    uint32_t last_consumer;
    char pad_consumers[128 - 76];
    /* joining */
    uint64_t done_count;
    uint32_t done_wait;
    uint32_t recoveries; /* owners found dead, both sides */
    uint64_t token; /* random; an anonymous ring's name is made of it on demand */
    uint32_t named; /* stored before the name appears in the file system */
    uint32_t block_slots; /* records that were ever used */
    uint64_t blocks_offset; /* where they lie in the file; 0 while there is none */
    char pad_joining[128 - 40];
    char name[256]; /* as given at creation, or empty; only ever used to look it up */
    shmring_death deaths[SHMRING_DEATH_COUNT];
    char pad_deaths[SHMRING_AREAS_OFFSET - SHMRING_DEATHS_OFFSET - SHMRING_DEATH_COUNT * 16];
    shmring_area areas[SHMRING_AREA_COUNT];
    shmring_waiter waiters[SHMRING_WAITER_COUNT];
    shmring_claim claims[SHMRING_CLAIM_COUNT];
} shmring_header;

typedef struct {
    uint64_t position;
    uint64_t length;
    uint32_t state;
    uint32_t kind;
    uint64_t owner; /* of the reservation; 0 in a frame put whole */
} shmring_frame;

_Static_assert(offsetof(shmring_header, data_wait) == SHMRING_WAITING_OFFSET, "layout");
_Static_assert(offsetof(shmring_header, producer_lock) == SHMRING_PRODUCERS_OFFSET, "layout");
_Static_assert(offsetof(shmring_header, consumer_lock) == SHMRING_CONSUMERS_OFFSET, "layout");
_Static_assert(offsetof(shmring_header, done_count) == SHMRING_JOINING_OFFSET, "layout");
_Static_assert(offsetof(shmring_header, deaths) == SHMRING_DEATHS_OFFSET, "layout");
_Static_assert(offsetof(shmring_header, waiters) == SHMRING_WAITERS_OFFSET, "layout");
_Static_assert(offsetof(shmring_header, producer_holder) == SHMRING_PRODUCERS_OFFSET + 4, "beside the lock");
_Static_assert(offsetof(shmring_header, consumer_holder) == SHMRING_CONSUMERS_OFFSET + 4, "beside the lock");
_Static_assert(offsetof(shmring_header, areas) == SHMRING_AREAS_OFFSET, "layout");
_Static_assert(offsetof(shmring_header, claims) == SHMRING_CLAIMS_OFFSET, "layout");
_Static_assert(sizeof(shmring_header) == SHMRING_HEADER_BYTES, "layout");
_Static_assert(sizeof(shmring_block) * SHMRING_BLOCK_COUNT == SHMRING_BLOCKS_BYTES, "layout");
_Static_assert(sizeof(shmring_frame) == SHMRING_FRAME_BYTES, "layout");

/* Bytes that a message takes in the ring.  The caller has bounded length. */
static inline uint64_t shmring_frame_span(uint64_t length)
{
    return (SHMRING_FRAME_BYTES + length + 7) & ~(uint64_t)7;
}

static inline shmring_area *shmring_area_of(shmring_header *header, uint64_t generation)
{
    return &header->areas[generation % SHMRING_AREA_COUNT];
}

#endif
