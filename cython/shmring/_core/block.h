/* Blocks: memory of the queue's own for large buffers, each written once and lent to its receiver.
 *
 * A block is, by its record (layout.h),
 *
 *     empty       capacity 0: a slot without memory
 *     free        holder 0
 *     filled      holder is the sender, position NO_POSITION or not committed
 *     in message  position committed and not read; the holder's death means nothing
 *     lent        position read; holder is the receiver, in whose memory a view lives
 *     forked      holder FORKED: views may live in forked children of the last holder
 *     retired     holder RETIRED: as forked, and nothing can prove that they are gone
 *
 *      empty --create--> filled --put--> in message --get--> lent --last view gone--> free
 *                          ^                                                           |
 *                          +------------------------- take ---------------------------+
 *
 * `position` is stored under the producers' lock before write_position, and `holder` under the
 * consumers' lock before read_position, so both are right after a kill at any instruction: what
 * was not committed is put right by the next owner of the lock, or stored anew by the next
 * consumer.  All else is a compare-and-exchange of `holder`.  A block whose holder is proven dead
 * is free if its position is NO_POSITION or was read.
 *
 * A process that forks while it holds a lent block keeps that block mapped through an open file
 * description of its own, which carries a lock.  The kernel drops the lock with the last mapping,
 * in whatever process that is; a block that is `forked` becomes free when no such lock is left.
 *
 * Memory comes and goes under the producers' lock alone.  Nothing here allocates but by mmap.
 */
#ifndef SHMRING_BLOCK_H
#define SHMRING_BLOCK_H

#include "area.h"
#include "owner.h"
#include <pthread.h>

#ifndef F_OFD_GETLK
#define F_OFD_GETLK 36
#define F_OFD_SETLK 37
#endif

#define BLOCK_FORKED ((uint64_t)1 << 63) /* states in the place of an owner: none started so late */
#define BLOCK_RETIRED (((uint64_t)1 << 63) + 1)

#define BLOCK_WARM_BYTES ((uint64_t)4 << 20)     /* from so many bytes of blocks on, one that comes back is */
#define BLOCK_WARM_COUNT 2                       /* waited for, and from so many blocks on */
#define BLOCK_WAKE_BYTES ((uint64_t)1 << 20)
#define BLOCK_BEHIND 2                           /* so many sent and not read: the consumer is behind */
#define BLOCK_LATELY_NS ((uint64_t)200000000)    /* provided that one came back lately */
#define BLOCK_IDLE_NS ((uint64_t)2000000000)     /* not used for so long: its memory goes */
#define BLOCK_REAP_NS ((uint64_t)100000000)      /* between two looks for the dead, */
#define BLOCK_REFUSED_NS ((uint64_t)100000000)   /* and after /dev/shm was full */

typedef struct {
    char *data; /* capacity bytes, or NULL */
    uint64_t capacity;
    uint64_t offset;
    uint64_t serial; /* of the record when it was mapped */
    uint32_t lent;   /* the epoch of the process that has a view of it; 0 is none */
    uint32_t pinned; /* mapped for the sake of that view alone */
} block_mapping;

/* A handle's blocks.  It outlives the handle while a view lives. */
typedef struct block_space {
    shmring_header *header;
    shmring_block *blocks;
    int handle_fd; /* the handle's, while that is open */
    int fd; /* its own, without the lock of the name, which a view does not keep; -1 while none could be had */
    area_file file;
    int64_t references;
    uint64_t reaped_ns; /* atomics: advice */
    uint64_t refused_ns;
    uint64_t vain_ns;
    block_mapping mappings[SHMRING_BLOCK_COUNT];
    struct block_space *following, *previous; /* of this process, under block_mutex */
} block_space;

static inline uint32_t block_slots(const block_space *space)
{
    uint32_t slots = load_acquire32(&space->header->block_slots);
    return slots < SHMRING_BLOCK_COUNT ? slots : SHMRING_BLOCK_COUNT;
}

/* ---- of a process: the spaces, for fork --------------------------------------------------------
 *
 * Each module that includes this has its own of these two: only ring.pyx calls what uses them. */

static block_space *block_spaces;
static pthread_mutex_t block_mutex = PTHREAD_MUTEX_INITIALIZER;

/* Another description of the file: it shares no lock with `fd`. */
SYNC_SLOW int block_reopen(int fd)
{
    char path[32];
    snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
    return open(path, O_RDWR | O_CLOEXEC);
}

/* Map a lent block anew through a description that carries a lock of its range. */
SYNC_SLOW int block_pin(const block_space *space, const block_mapping *m)
{
    area_file file = {0, 0, 0};
    struct flock range = {.l_type = F_RDLCK, .l_whence = SEEK_SET, .l_start = (off_t)m->offset,
                          .l_len = (off_t)m->capacity};
    int fd = block_reopen(space->fd);
    if (fd < 0)
        return errno;
    int error = area_is_ours(fd, &space->file, &file);
    if (error == 0 && fcntl(fd, F_OFD_SETLK, &range) != 0)
        error = errno;
    if (error == 0 && mmap(m->data, m->capacity, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, fd,
                           (off_t)m->offset) == MAP_FAILED)
        error = errno;
    else if (error == 0)
        (void)madvise(m->data, m->capacity, MADV_DONTDUMP);
    close(fd);
    return error;
}

static void block_before_fork(void)
{
    pthread_mutex_lock(&block_mutex);
    for (block_space *space = block_spaces; space != NULL; space = space->following)
        for (int i = 0; i < SHMRING_BLOCK_COUNT; i++) {
            block_mapping *m = &space->mappings[i];
            if (load_acquire32(&m->lent) != sync_epoch() || m->pinned)
                continue;
            if (block_pin(space, m) != 0)
                store_release64(&space->blocks[i].holder, BLOCK_RETIRED);
            m->pinned = 1;
        }
}

static void block_after_fork(void) { pthread_mutex_unlock(&block_mutex); }

SYNC_SLOW int block_start(void)
{
    int error = pthread_atfork(block_before_fork, block_after_fork, block_after_fork);
    if (error != 0)
        PyErr_Format(PyExc_ImportError, "pthread_atfork failed: %s", strerror(error));
    return error == 0 ? 0 : -1;
}

/* ---- opened and left ------------------------------------------------------------------------------ */

static inline uint64_t block_space_bytes(void) { return area_align_up(sizeof(block_space), area_page()); }

/* Map the records, which are there; EILSEQ if they cannot be. */
SYNC_SLOW int block_space_open(shmring_header *header, int fd, const area_file *own, block_space **out)
{
    area_file file = {0, 0, 0};
    shmring_area page = {0, SHMRING_BLOCKS_BYTES, load_acquire64(&header->blocks_offset), 0};
    int error = area_is_ours(fd, own, &file);
    if (error != 0)
        return error;
    if (!area_is_inside(&page, file.bytes))
        return EILSEQ;
    block_space *space = mmap(NULL, block_space_bytes(), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (space == MAP_FAILED)
        return errno;
    space->handle_fd = fd;
    space->fd = block_reopen(fd);
    if (space->fd >= 0) /* else what is mapped keeps the name: growing needs the records, and no descriptor */
        fd = space->fd;
    space->header = mmap(NULL, SHMRING_HEADER_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    space->blocks = mmap(NULL, SHMRING_BLOCKS_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, fd, (off_t)page.offset);
    if (space->header == MAP_FAILED || space->blocks == MAP_FAILED) {
        error = errno;
        if (space->header != MAP_FAILED)
            munmap(space->header, SHMRING_HEADER_BYTES);
        if (space->blocks != MAP_FAILED)
            munmap(space->blocks, SHMRING_BLOCKS_BYTES);
        if (space->fd >= 0)
            close(space->fd);
        munmap(space, block_space_bytes());
        return error;
    }
    space->file = *own;
    space->references = 1;
    pthread_mutex_lock(&block_mutex);
    space->following = block_spaces;
    if (block_spaces != NULL)
        block_spaces->previous = space;
    block_spaces = space;
    pthread_mutex_unlock(&block_mutex);
    *out = space;
    return 0;
}

static inline block_space *block_space_keep(block_space *space)
{
    fetch_add64(&space->references, 1);
    return space;
}

SYNC_SLOW void block_space_leave(block_space *space)
{
    area_file file;
    if (fetch_add64(&space->references, -1) != 1)
        return;
    pthread_mutex_lock(&block_mutex);
    if (space->previous != NULL)
        space->previous->following = space->following;
    else
        block_spaces = space->following;
    if (space->following != NULL)
        space->following->previous = space->previous;
    pthread_mutex_unlock(&block_mutex);
    for (int i = 0; i < SHMRING_BLOCK_COUNT; i++)
        if (space->mappings[i].data != NULL)
            munmap(space->mappings[i].data, space->mappings[i].capacity);
    if (area_is_ours(space->fd, &space->file, &file) == 0)
        close(space->fd);
    munmap(space->header, SHMRING_HEADER_BYTES);
    munmap(space->blocks, SHMRING_BLOCKS_BYTES);
    munmap(space, block_space_bytes());
}

/* Under the producers' lock: make the page of the records.  They read as empty. */
SYNC_SLOW int block_make_records(shmring_header *header, int fd, const area_file *own)
{
    shmring_area taken[AREA_TAKEN_MOST];
    area_file file = {0, 0, 0};
    int error = area_is_ours(fd, own, &file);
    if (error != 0)
        return error;
    int count = area_taken(header, NULL, file.bytes, taken);
    if (count < 0)
        return EILSEQ;
    uint64_t offset = area_place(taken, count, SHMRING_BLOCKS_BYTES);
    /* a growth that was killed may have left what it wrote */
    (void)area_punch(fd, offset, SHMRING_BLOCKS_BYTES);
    error = area_fill(fd, offset, SHMRING_BLOCKS_BYTES);
    if (error == 0)
        store_release64(&header->blocks_offset, offset);
    return error;
}

/* Have a descriptor that is the ring's file: 0 or an errno. */
SYNC_SLOW int block_need_file(block_space *space, area_file *file)
{
    if (space->fd < 0) {
        int fd = block_reopen(space->handle_fd);
        if (fd < 0)
            return errno;
        if (!compare_exchange32((uint32_t *)&space->fd, (uint32_t)-1, (uint32_t)fd))
            close(fd); /* another thread was faster */
    }
    return area_is_ours(space->fd, &space->file, file);
}

/* ---- the mapping of a block ----------------------------------------------------------------------- */

/* Map block `i`, which only the caller looks at now: once a process, and again when its memory is
 * another.  EILSEQ if the record is garbage. */
SYNC_SLOW int block_map(block_space *space, int i)
{
    const shmring_block *block = &space->blocks[i];
    block_mapping *m = &space->mappings[i];
    area_file file = {0, 0, 0};
    uint64_t serial = load_relaxed64(&block->serial);
    shmring_area range = {0, load_relaxed64(&block->capacity), load_relaxed64(&block->offset), 0};
    uint32_t lent = load_acquire32(&m->lent);
    if (lent == sync_epoch())
        return EILSEQ; /* a view lives, so the record lies */
    if (lent != 0) { /* before a fork: of the parent's view or, where that is not pinned, of a thread that stayed */
        if (m->pinned)
            m->data = NULL;
        m->pinned = 0;
        store_release32(&m->lent, 0);
    }
    if (m->data != NULL && m->serial == serial && m->offset == range.offset && m->capacity == range.capacity)
        return 0;
    int error = block_need_file(space, &file);
    if (error != 0)
        return error;
    if (range.capacity == 0 || !area_is_inside(&range, file.bytes)
        || area_overlaps(space->header, &range, UINT64_MAX))
        return EILSEQ;
    char *data = mmap(NULL, range.capacity, PROT_READ | PROT_WRITE, MAP_SHARED, space->fd, (off_t)range.offset);
    if (data == MAP_FAILED)
        return errno;
    (void)madvise(data, range.capacity, MADV_DONTDUMP);
    if (m->data != NULL)
        munmap(m->data, m->capacity);
    m->data = data;
    m->capacity = range.capacity;
    m->offset = range.offset;
    m->serial = serial;
    return 0;
}

/* ---- the sender's side ------------------------------------------------------------------------------ */

/* The caller holds it: nothing in it is wanted any more. */
SYNC_SLOW void block_free(block_space *space, int i, uint64_t freed_ns)
{
    shmring_block *block = &space->blocks[i];
    uint64_t capacity = load_relaxed64(&block->capacity);
    store_relaxed64(&block->freed_ns, freed_ns);
    store_release64(&block->position, SHMRING_NO_POSITION);
    store_release64(&block->holder, 0);
    fence_full();
    /* a producer that waits for a smaller one looks by itself: a wake-up for each would cost more */
    if (capacity >= BLOCK_WAKE_BYTES && wait_wants_wake(&space->header->space_wait))
        wait_wake_one(&space->header->space_wait);
}

/* What a block for `bytes` takes: an eighth more than a power of two, at most. */
static inline uint64_t block_capacity(uint64_t bytes)
{
    return area_align_up(bytes, bytes < ((uint64_t)1 << 20) ? 1 << 16 : area_power_of_two(bytes) >> 4);
}

/* Is the memory right for `bytes`: enough, and not far too much? */
static inline int block_fits(uint64_t capacity, uint64_t bytes)
{
    return capacity >= bytes && capacity <= 2 * block_capacity(bytes);
}

/* Take the free block that came back last, and map it: its index, or -1. */
SYNC_SLOW int block_take(block_space *space, uint64_t me, uint64_t bytes)
{
    for (int turn = 0; turn < 8; turn++) {
        int slots = (int)block_slots(space), best = -1;
        uint64_t latest = 0;
        for (int i = 0; i < slots; i++) {
            shmring_block *block = &space->blocks[i];
            if (load_acquire64(&block->holder) != 0 || !block_fits(load_relaxed64(&block->capacity), bytes))
                continue;
            uint64_t freed = load_relaxed64(&block->freed_ns);
            if (best < 0 || freed > latest) {
                best = i;
                latest = freed;
            }
        }
        if (best < 0)
            return -1;
        if (!compare_exchange64(&space->blocks[best].holder, 0, me))
            continue;
        store_release64(&space->blocks[best].position, SHMRING_NO_POSITION);
        fence_full(); /* either we see the shutdown, or it sees that the block is held: area_forget */
        if (load_acquire32(&space->header->shutdown) == 0
            && block_fits(load_relaxed64(&space->blocks[best].capacity), bytes) && block_map(space, best) == 0)
            return best;
        block_free(space, best, latest);
        if (load_acquire32(&space->header->shutdown) != 0)
            return -1;
    }
    return -1;
}

/* When the last block came back, if there are enough and the next one is worth waiting for; else 0.
 * After a wait in vain none is until another has come back, but while the consumer is behind: what
 * is sent ahead of it lies in cold memory, and is copied when all blocks are under way. */
SYNC_SLOW uint64_t block_last_return(block_space *space, uint64_t bytes)
{
    uint64_t now = (uint64_t)monotonic_ns(), read = load_acquire64(&space->header->read_position);
    uint64_t sum = 0, latest = 0;
    int count = 0, unread = 0;
    for (int i = 0, slots = (int)block_slots(space); i < slots; i++) {
        uint64_t capacity = load_relaxed64(&space->blocks[i].capacity);
        uint64_t freed = load_relaxed64(&space->blocks[i].freed_ns);
        uint64_t position = load_relaxed64(&space->blocks[i].position);
        if (!block_fits(capacity, bytes))
            continue;
        count++;
        unread += position != SHMRING_NO_POSITION && position >= read;
        sum += capacity;
        if (freed > latest)
            latest = freed;
    }
    int warm = count >= BLOCK_WARM_COUNT && sum >= BLOCK_WARM_BYTES && now - latest < BLOCK_LATELY_NS;
    return warm && (unread >= BLOCK_BEHIND || latest != load_relaxed64(&space->vain_ns)) ? latest : 0;
}

/* Is there still a mapping that was pinned before a fork? */
static inline int block_is_pinned(const block_space *space, uint64_t offset, uint64_t capacity)
{
    struct flock range = {.l_type = F_WRLCK, .l_whence = SEEK_SET, .l_start = (off_t)offset,
                          .l_len = (off_t)capacity};
    return fcntl(space->fd, F_OFD_GETLK, &range) != 0 || range.l_type != F_UNLCK;
}

/* Free what the dead left, and what no forked child looks at any more. */
SYNC_SLOW void block_reap(block_space *space, uint64_t me)
{
    uint64_t alive = me;
    for (int i = 0, slots = (int)block_slots(space); i < slots; i++) {
        shmring_block *block = &space->blocks[i];
        uint64_t holder = load_acquire64(&block->holder);
        if (holder == 0 || holder == alive || holder == BLOCK_RETIRED)
            continue;
        if (holder != BLOCK_FORKED && !owner_is_dead(holder)) {
            alive = holder;
            continue;
        }
        /* after the proof: it may have put its message, and died, in between */
        uint64_t position = load_acquire64(&block->position);
        uint64_t read = load_acquire64(&space->header->read_position);
        uint64_t capacity = load_relaxed64(&block->capacity);
        if (position != SHMRING_NO_POSITION && position >= read)
            continue;
        if (capacity != 0 && block_is_pinned(space, load_relaxed64(&block->offset), capacity))
            continue;
        if (compare_exchange64(&block->holder, holder, me))
            block_free(space, i, 0);
    }
}

/* As block_reap, but seldom enough to be asked by every put. */
SYNC_SLOW void block_reap_sometimes(block_space *space, uint64_t me)
{
    uint64_t now = (uint64_t)monotonic_ns(), before = load_relaxed64(&space->reaped_ns);
    if (now - before >= BLOCK_REAP_NS && compare_exchange64(&space->reaped_ns, before, now))
        block_reap(space, me);
}

/* Under the producers' lock: the memory of a free block goes.  The record first: what it no longer
 * covers is punched at recovery, were we killed in between. */
SYNC_SLOW int block_drop(block_space *space, int i, uint64_t me)
{
    shmring_block *block = &space->blocks[i];
    if (!compare_exchange64(&block->holder, 0, me))
        return 0;
    shmring_area range = {0, load_relaxed64(&block->capacity), load_relaxed64(&block->offset), 0};
    store_release64(&block->capacity, 0);
    if (range.capacity != 0 && area_is_inside(&range, UINT64_MAX >> 1)
        && !area_overlaps(space->header, &range, UINT64_MAX))
        (void)area_punch(space->fd, range.offset, range.capacity);
    store_release64(&block->holder, 0);
    return range.capacity != 0;
}

/* Under the producers' lock: the memory of blocks goes that were not used since `since_ns`. */
SYNC_SLOW int block_drop_idle(block_space *space, uint64_t me, uint64_t since_ns)
{
    int dropped = 0;
    area_file file = {0, 0, 0};
    if (area_is_ours(space->fd, &space->file, &file) != 0)
        return 0;
    for (int i = 0, slots = (int)block_slots(space); i < slots; i++)
        if (load_relaxed64(&space->blocks[i].capacity) != 0 && load_relaxed64(&space->blocks[i].freed_ns) < since_ns)
            dropped += block_drop(space, i, me);
    return dropped;
}

/* Is there a block whose memory would go? */
SYNC_SLOW int block_any_idle(block_space *space, uint64_t since_ns)
{
    for (int i = 0, slots = (int)block_slots(space); i < slots; i++)
        if (load_acquire64(&space->blocks[i].holder) == 0 && load_relaxed64(&space->blocks[i].capacity) != 0
            && load_relaxed64(&space->blocks[i].freed_ns) < since_ns)
            return 1;
    return 0;
}

/* Under the producers' lock: make a block for `bytes`, which the caller then holds: its index.
 * -1 if there may be no more, -2 if there is no memory, -3 if the records are garbage. */
SYNC_SLOW int block_create(block_space *space, uint64_t me, uint64_t bytes)
{
    shmring_header *header = space->header;
    shmring_area taken[AREA_TAKEN_MOST];
    area_file file = {0, 0, 0};
    uint64_t capacity = block_capacity(bytes), limit = header->max_capacity / 2, sum = 0;
    int slot, oldest, count;
    if (load_acquire32(&header->shutdown) != 0 || capacity > limit || capacity > SHMRING_SEGMENT_LENGTH)
        return -1;
    if (block_need_file(space, &file) != 0)
        return -2;
    for (int i = 0; i < SHMRING_BLOCK_COUNT; i++)
        sum += load_relaxed64(&space->blocks[i].capacity);
    for (;;) { /* of another size, and not in use: theirs are the slot and the share */
        for (slot = 0; slot < SHMRING_BLOCK_COUNT; slot++)
            if (load_relaxed64(&space->blocks[slot].capacity) == 0 && load_acquire64(&space->blocks[slot].holder) == 0)
                break;
        if (slot < SHMRING_BLOCK_COUNT && sum + capacity <= limit)
            break;
        oldest = -1;
        for (int i = 0; i < SHMRING_BLOCK_COUNT; i++)
            if (load_acquire64(&space->blocks[i].holder) == 0 && load_relaxed64(&space->blocks[i].capacity) != 0
                && (oldest < 0 || load_relaxed64(&space->blocks[i].freed_ns)
                                      < load_relaxed64(&space->blocks[oldest].freed_ns)))
                oldest = i;
        if (oldest < 0)
            return -1;
        uint64_t gone = load_relaxed64(&space->blocks[oldest].capacity);
        if (!block_drop(space, oldest, me))
            return -1; /* another sender took it */
        sum -= gone;
    }
    shmring_block *block = &space->blocks[slot];
    if ((count = area_taken(header, space->blocks, file.bytes, taken)) < 0)
        return -3;
    if ((uint32_t)slot >= load_relaxed32(&header->block_slots)) /* before it is held: block_reap looks so far */
        store_release32(&header->block_slots, (uint32_t)slot + 1);
    if (!compare_exchange64(&block->holder, 0, me))
        return -1;
    uint64_t offset = area_place(taken, count, capacity);
    if (area_fill(space->fd, offset, capacity) != 0) {
        store_release64(&block->holder, 0);
        return -2;
    }
    block->position = SHMRING_NO_POSITION;
    block->offset = offset;
    block->serial++;
    block->freed_ns = 0;
    store_release64(&block->capacity, capacity);
    if (block_map(space, slot) == 0)
        return slot;
    block_free(space, slot, 0);
    return -2;
}

/* Under the producers' lock, after its owner died: what was not committed is in no message. */
SYNC_SLOW void block_recover(block_space *space, uint64_t write_position)
{
    for (int i = 0; i < SHMRING_BLOCK_COUNT; i++)
        if (load_relaxed64(&space->blocks[i].position) >= write_position)
            store_release64(&space->blocks[i].position, SHMRING_NO_POSITION);
}

/* ---- the receiver's side ------------------------------------------------------------------------- */

/* Under the consumers' lock: may this process have block `i` of the message at `position`? */
SYNC_SLOW int block_check(block_space *space, uint64_t i, uint64_t position, uint64_t length)
{
    if (i >= SHMRING_BLOCK_COUNT || load_acquire64(&space->blocks[i].position) != position)
        return EILSEQ;
    int error = block_map(space, (int)i);
    return error == 0 && length > space->mappings[i].capacity ? EILSEQ : error;
}

/* Under the consumers' lock, before read_position. */
static inline void block_lend(block_space *space, int i, uint64_t me)
{
    store_release32(&space->mappings[i].lent, sync_epoch());
    store_release64(&space->blocks[i].holder, me);
}

/* The last view is gone, which was made in the process of `epoch`. */
SYNC_SLOW void block_return(block_space *space, int i, char *data, uint64_t capacity, uint32_t epoch, uint64_t me)
{
    block_mapping *m = &space->mappings[i];
    int own = epoch == sync_epoch();
    pthread_mutex_lock(&block_mutex);
    int pinned = !own || m->pinned;
    if (pinned) {
        munmap(data, capacity);
        if (m->data == data) {
            m->data = NULL;
            m->pinned = 0;
        }
    }
    if (own || m->data == NULL)
        store_release32(&m->lent, 0);
    pthread_mutex_unlock(&block_mutex);
    if (!own)
        return; /* the parent's block */
    if (!pinned)
        block_free(space, i, (uint64_t)monotonic_ns());
    else if (load_acquire64(&space->blocks[i].holder) == me) {
        store_release64(&space->blocks[i].position, SHMRING_NO_POSITION);
        store_release64(&space->blocks[i].holder, BLOCK_FORKED);
    }
}

#endif
