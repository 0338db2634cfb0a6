/* Areas of the file: where one may lie, growing by one, giving one or all back, and
 * the mapping of one into this process.
 *
 * All of it is called under the producers' lock (place, grow, tidy) or the
 * consumers' (reap), and allocates nothing: the record of a mapping lives in a
 * page in front of the mapping itself.
 *
 * The living areas are those of the generations [reaped .. write_generation].
 * Where the next one lies is a function of their records alone, so a growth
 * that was killed leaves no bookkeeping to repair, only pages, which tidy()
 * punches.
 */
#ifndef SHMRING_AREA_H
#define SHMRING_AREA_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "layout.h"
#include "sync.h"
#include <fcntl.h>
#include <sys/resource.h>
#include <sys/stat.h>

#define AREA_GROW_PIECE ((uint64_t)1 << 20)
#define AREA_ALIGN_LIMIT ((uint64_t)2 << 20)
#define AREA_REGRET_NS ((uint64_t)1000000000) /* growing so soon after shrinking: it was a mistake */
#define AREA_PATIENCE_NS ((uint64_t)250000000) /* after one mistake; doubled by each further one, */
#define AREA_MOST_PATIENCE 4                  /* up to two seconds */
#define AREA_TOUCH_LIMIT ((uint64_t)1 << 18) /* a page fault is 8 us of a round trip; at once they are 10 us for all */
#define AREA_BURST_LIMIT ((uint64_t)256 << 20)
#define AREA_DOUBLING_LIMIT ((uint64_t)64 << 20) /* growing holds the lock: 64 MiB take 25 ms */

typedef struct {
    char *data; /* capacity bytes, and the same again behind them */
    uint64_t capacity;
    uint64_t mask;
    uint64_t base;
    uint64_t generation;
    int64_t references; /* one a side of the handle, and one for each view */
    size_t mapped_bytes;
} area_mapping;

typedef struct {
    uint64_t device;
    uint64_t inode;
    uint64_t bytes;
} area_file;

/* fstat as a plain system call: the libc symbol would spoil a manylinux tag. */
static inline int area_stat(int fd, area_file *file)
{
    struct stat s;
#if defined(SYS_fstat)
    if (syscall(SYS_fstat, fd, &s) != 0)
#else
    if (syscall(SYS_newfstat, fd, &s) != 0)
#endif
        return errno;
    file->device = (uint64_t)s.st_dev;
    file->inode = (uint64_t)s.st_ino;
    file->bytes = (uint64_t)s.st_size;
    return 0;
}

static inline uint64_t area_page(void) { return (uint64_t)sysconf(_SC_PAGESIZE); }

/* What keeps the pages beside an area from being touched: nothing, or, where the
 * sanitizer looks for strays, an inaccessible page (it sees the heap and
 * the stack, not what was mapped). */
#if defined(__SANITIZE_ADDRESS__)
static inline uint64_t area_guard(void) { return area_page(); }
#else
static inline uint64_t area_guard(void) { return 0; }
#endif

static inline uint64_t area_align_up(uint64_t value, uint64_t alignment)
{
    return (value + alignment - 1) & ~(alignment - 1);
}

/* Smallest power of two >= value; value is at most SHMRING_MAX_CAPACITY. */
static inline uint64_t area_power_of_two(uint64_t value)
{
    uint64_t power = SHMRING_MIN_CAPACITY;
    while (power < value)
        power <<= 1;
    return power;
}

static inline int area_size_is_right(uint64_t capacity)
{
    return capacity >= SHMRING_MIN_CAPACITY && capacity <= SHMRING_MAX_CAPACITY && (capacity & (capacity - 1)) == 0;
}

/* One local copy of a record, checked against the file: nothing that stands in
 * shared memory decides alone what is mapped. */
SYNC_SLOW int area_check(const shmring_area *area, uint64_t file_bytes)
{
    uint64_t cap = area->capacity;
    return area_size_is_right(cap)
        && area->offset >= SHMRING_HEADER_BYTES && area->offset % 4096 == 0
        && area->offset <= file_bytes && cap <= file_bytes - area->offset && area->base % 8 == 0;
}

/* Map an area twice, back to back, so that every frame is contiguous. */
SYNC_SLOW int area_map(int fd, const shmring_area *area, uint64_t generation, area_mapping **out)
{
    uint64_t page = area_page(), guard = area_guard(), cap = area->capacity;
    size_t total = (size_t)(page + guard + 2 * cap + guard);
    int touch = cap <= AREA_TOUCH_LIMIT ? MAP_POPULATE : 0;
    if (cap % page != 0 || area->offset % page != 0)
        return EINVAL;
    char *start = mmap(NULL, total, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (start == MAP_FAILED)
        return errno;
    char *data = start + page + guard;
    if (mprotect(start, page, PROT_READ | PROT_WRITE) != 0
        || mmap(data, cap, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED | touch, fd, (off_t)area->offset) == MAP_FAILED
        || mmap(data + cap, cap, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, fd, (off_t)area->offset) == MAP_FAILED) {
        int error = errno;
        munmap(start, total);
        return error;
    }
    (void)madvise(data, 2 * cap, MADV_DONTDUMP);
    area_mapping *m = (area_mapping *)start;
    m->data = data;
    m->capacity = cap;
    m->mask = cap - 1;
    m->base = area->base;
    m->generation = generation;
    m->references = 1;
    m->mapped_bytes = total;
    *out = m;
    return 0;
}

SYNC_SLOW void area_release(area_mapping *m)
{
    if (m != NULL && fetch_add64(&m->references, -1) == 1)
        munmap(m, m->mapped_bytes);
}

SYNC_SLOW int area_punch(int fd, uint64_t offset, uint64_t bytes)
{
    return fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)offset, (off_t)bytes) == 0 ? 0 : errno;
}

static inline int area_share(const shmring_area *one, const shmring_area *other)
{
    return one->offset < other->offset + other->capacity && other->offset < one->offset + one->capacity;
}

/* Does an area lie over a living one of another generation?  Such a record is
 * garbage, and to write or punch there would destroy what others use.  The
 * last generation is read first: areas that lived at that moment share nothing,
 * while an older `reaped` would bring in one whose place a later one has. */
SYNC_SLOW int area_overlaps(shmring_header *header, const shmring_area *area, uint64_t generation)
{
    uint64_t last = load_acquire64(&header->write_generation);
    uint64_t first = load_acquire64(&header->reaped);
    if (last - first >= SHMRING_AREA_COUNT)
        return 1;
    for (uint64_t g = first; g <= last; g++) {
        shmring_area other = *shmring_area_of(header, g);
        if (g != generation && area_share(area, &other))
            return 1;
    }
    return 0;
}

/* Add to those sorted by offset; -1 if it lies over one of them. */
SYNC_SLOW int area_insert(shmring_area *sorted, int count, const shmring_area *area)
{
    int i = count;
    for (; i > 0 && sorted[i - 1].offset > area->offset; i--)
        sorted[i] = sorted[i - 1];
    sorted[i] = *area;
    if ((i > 0 && area_share(&sorted[i - 1], area)) || (i < count && area_share(area, &sorted[i + 1])))
        return -1;
    return count + 1;
}

/* Collect the living areas, sorted by offset.  -1 if the records are garbage. */
SYNC_SLOW int area_living(shmring_header *header, uint64_t file_bytes, shmring_area *living)
{
    uint64_t reaped = load_acquire64(&header->reaped);
    uint64_t last = header->write_generation;
    if (last < reaped || last - reaped >= SHMRING_AREA_COUNT)
        return -1;
    int count = 0;
    for (uint64_t g = reaped; g <= last && count >= 0; g++) {
        shmring_area area = *shmring_area_of(header, g);
        count = area_check(&area, file_bytes) ? area_insert(living, count, &area) : -1;
    }
    return count;
}

#define AREA_TAKEN_MOST (SHMRING_AREA_COUNT + SHMRING_BLOCK_COUNT + 1)

/* Does a range lie inside the file, and in whole pages? */
static inline int area_is_inside(const shmring_area *range, uint64_t file_bytes)
{
    return range->offset >= SHMRING_HEADER_BYTES && range->offset % 4096 == 0 && range->capacity % 4096 == 0
        && range->offset <= file_bytes && range->capacity <= file_bytes - range->offset;
}

/* Add the page of the blocks' records, and the blocks: those with memory, or, with
 * `until_read` not 0, only those that a process holds and no message at this position or behind it. */
SYNC_SLOW int area_add_blocks(shmring_header *header, const shmring_block *blocks, uint64_t file_bytes,
                              uint64_t until_read, shmring_area *sorted, int count)
{
    if (blocks == NULL)
        return count;
    shmring_area range = {0, SHMRING_BLOCKS_BYTES, header->blocks_offset, 0};
    for (int i = -1; i < SHMRING_BLOCK_COUNT && count >= 0; i++) {
        if (i >= 0) {
            range.capacity = load_acquire64(&blocks[i].capacity);
            range.offset = load_relaxed64(&blocks[i].offset);
            uint64_t position = load_acquire64(&blocks[i].position);
            if (range.capacity == 0)
                continue;
            if (until_read != 0 && (load_acquire64(&blocks[i].holder) == 0
                                    || (position >= until_read - 1 && position != SHMRING_NO_POSITION)))
                continue;
        }
        count = area_is_inside(&range, file_bytes) ? area_insert(sorted, count, &range) : -1;
    }
    return count;
}

/* Collect all that is in use behind the header; `blocks` are the records, or NULL. */
SYNC_SLOW int area_taken(shmring_header *header, const shmring_block *blocks, uint64_t file_bytes,
                         shmring_area taken[AREA_TAKEN_MOST])
{
    int count = area_living(header, file_bytes, taken);
    return count < 0 ? count : area_add_blocks(header, blocks, file_bytes, 0, taken, count);
}

/* The lowest aligned offset that overlaps nothing that is in use. */
SYNC_SLOW uint64_t area_place(const shmring_area *living, int count, uint64_t capacity)
{
    uint64_t alignment = capacity < AREA_ALIGN_LIMIT ? capacity : AREA_ALIGN_LIMIT;
    uint64_t offset = area_align_up(SHMRING_HEADER_BYTES, alignment);
    for (int i = 0; i < count; i++) {
        if (living[i].offset >= offset + capacity)
            break;
        uint64_t end = living[i].offset + living[i].capacity;
        if (end > offset)
            offset = area_align_up(end, alignment);
    }
    return offset;
}

/* Is the descriptor still our file?  It may have been closed behind us, and
 * the number may name another file by now: nothing may be punched into that. */
SYNC_SLOW int area_is_ours(int fd, const area_file *own, area_file *file)
{
    int error = area_stat(fd, file);
    if (error != 0)
        return error;
    return file->device == own->device && file->inode == own->inode ? 0 : EBADF;
}

/* Give back every page behind the header but those of `kept`, which is sorted. */
SYNC_SLOW void area_punch_gaps(int fd, uint64_t file_bytes, const shmring_area *kept, int count)
{
    uint64_t from = SHMRING_HEADER_BYTES;
    for (int i = 0; i < count; i++) {
        if (kept[i].offset > from)
            (void)area_punch(fd, from, kept[i].offset - from);
        from = kept[i].offset + kept[i].capacity;
    }
    if (file_bytes > from)
        (void)area_punch(fd, from, file_bytes - from);
}

/* Give back every page that is not in use; EILSEQ if the records are garbage. */
SYNC_SLOW int area_tidy(shmring_header *header, const shmring_block *blocks, int fd, const area_file *own)
{
    shmring_area taken[AREA_TAKEN_MOST];
    area_file file = {0, 0, 0};
    int error = area_is_ours(fd, own, &file);
    if (error != 0)
        return error;
    int count = area_taken(header, blocks, file.bytes, taken);
    if (count < 0)
        return EILSEQ;
    area_punch_gaps(fd, file.bytes, taken, count);
    return 0;
}

/* Back a range with pages; on any error it has none. */
SYNC_SLOW int area_fill(int fd, uint64_t offset, uint64_t bytes)
{
    struct rlimit size_limit;
    /* past this limit the kernel would send SIGXFSZ instead of an error */
    if (getrlimit(RLIMIT_FSIZE, &size_limit) == 0 && size_limit.rlim_cur != RLIM_INFINITY
        && offset + bytes > size_limit.rlim_cur)
        return EFBIG;
    for (uint64_t done = 0; done < bytes; done += AREA_GROW_PIECE) {
        uint64_t piece = bytes - done < AREA_GROW_PIECE ? bytes - done : AREA_GROW_PIECE;
        while (fallocate(fd, 0, (off_t)(offset + done), (off_t)piece) != 0) {
            if (errno == EINTR)
                continue;
            int error = errno;
            (void)area_punch(fd, offset, bytes);
            return error;
        }
    }
    return 0;
}

#define AREA_GARBAGE UINT64_MAX /* instead of a capacity: the records are none */

/* How large the next area may be for a frame of `need` bytes: 0 if not at all.
 * `wish` is what would serve well. */
SYNC_SLOW uint64_t area_next_capacity(shmring_header *header, uint64_t current, uint64_t need, uint64_t wish)
{
    shmring_area living[SHMRING_AREA_COUNT];
    int count = area_living(header, UINT64_MAX >> 1, living); /* area_grow looks at the file */
    uint64_t limit = header->max_capacity, sum = 0;
    if (count < 0)
        return AREA_GARBAGE;
    if (count >= SHMRING_AREA_COUNT - 1 || limit > SHMRING_MAX_CAPACITY || need > limit)
        return 0;
    for (int i = 0; i < count; i++)
        sum += living[i].capacity;
    /* One area, and it is too small for what came since: the burst will come again. */
    uint64_t doubling = count == 1 ? AREA_BURST_LIMIT : AREA_DOUBLING_LIMIT;
    uint64_t wanted = current < AREA_BURST_LIMIT ? current : AREA_BURST_LIMIT;
    if (current < doubling || count > SHMRING_AREA_COUNT / 2)
        wanted = 2 * current;
    uint64_t least = area_power_of_two(need);
    if (wanted < wish)
        wanted = area_power_of_two(wish < limit ? wish : limit);
    while (wanted > least && (sum + wanted > limit || wanted > limit))
        wanted >>= 1;
    if (sum + wanted <= limit)
        return wanted;
    /* A message larger than the area it would go to has nowhere else: while
     * its area is made the old one still lives, at most twice the limit. */
    return need > current && sum + wanted <= 2 * limit ? wanted : 0;
}

/* A flow that needs its room again and again is not to pay for fresh pages each
 * time: the first shrinking comes at once, the next ones later and later.  These
 * words are advice, and may be garbage. */
static inline void area_learn(shmring_header *header, uint64_t capacity)
{
    uint64_t now = (uint64_t)monotonic_ns();
    if (capacity < shmring_area_of(header, header->write_generation)->capacity)
        header->shrunk_ns = now;
    else if (header->shrunk_ns != 0) {
        uint32_t patience = now - header->shrunk_ns > AREA_REGRET_NS ? 0 : header->patience + 1;
        store_relaxed32(&header->patience, patience > AREA_MOST_PATIENCE ? AREA_MOST_PATIENCE : patience);
        header->shrunk_ns = 0;
    }
    store_relaxed64(&header->needed_ns, now);
}

/* May the area become smaller, as far as the past tells? */
SYNC_SLOW int area_may_shrink(shmring_header *header)
{
    uint32_t patience = load_relaxed32(&header->patience);
    if (patience == 0)
        return 1;
    if (patience > AREA_MOST_PATIENCE)
        patience = AREA_MOST_PATIENCE;
    return (uint64_t)monotonic_ns() - load_relaxed64(&header->needed_ns) > AREA_PATIENCE_NS << (patience - 1);
}

/* Under the producers' lock: allocate, map, record and publish the next area.
 * On any error nothing has changed; EILSEQ if the header is garbage. */
SYNC_SLOW int area_grow(shmring_header *header, const shmring_block *blocks, int fd, const area_file *own,
                        uint64_t capacity, area_mapping **out)
{
    shmring_area taken[AREA_TAKEN_MOST], area;
    area_file file = {0, 0, 0};
    int error = area_is_ours(fd, own, &file);
    if (error != 0)
        return error;
    int count = area_taken(header, blocks, file.bytes, taken);
    /* the capacity was made of words of the header, and indices are masked with it */
    if (count < 0 || header->write_generation - header->reaped >= SHMRING_AREA_COUNT - 1
        || !area_size_is_right(capacity))
        return EILSEQ;
    area.base = header->write_position;
    area.capacity = capacity;
    area.offset = area_place(taken, count, capacity);
    area.spare = 0;
    error = area_fill(fd, area.offset, capacity);
    if (error != 0)
        return error;
    uint64_t generation = header->write_generation + 1;
    error = area_map(fd, &area, generation, out);
    if (error != 0) {
        (void)area_punch(fd, area.offset, capacity);
        return error;
    }
    *shmring_area_of(header, generation) = area;
    area_learn(header, capacity);
    store_release64(&header->write_generation, generation);
    return 0;
}

/* Map the area of a generation that another process published. */
SYNC_SLOW int area_open(shmring_header *header, int fd, const area_file *own, uint64_t generation, area_mapping **out)
{
    shmring_area area = *shmring_area_of(header, generation);
    area_file file = {0, 0, 0};
    int error = area_is_ours(fd, own, &file);
    if (error != 0)
        return error;
    if (!area_check(&area, file.bytes) || area_overlaps(header, &area, generation))
        return EILSEQ; /* the caller says RingCorrupted */
    return area_map(fd, &area, generation, out);
}

/* Under the consumers' lock: give drained areas back.  Punch, then count: the
 * other way round a producer could place a new area under the punch. */
SYNC_SLOW int area_reap(shmring_header *header, int fd, const area_file *own)
{
    area_file file = {0, 0, 0};
    int ours = header->reaped < header->read_generation ? area_is_ours(fd, own, &file) : 0;
    if (ours != 0)
        return ours;
    while (header->reaped < header->read_generation) {
        shmring_area area = *shmring_area_of(header, header->reaped);
        if (!area_check(&area, UINT64_MAX >> 1) || area_overlaps(header, &area, header->reaped))
            return EILSEQ;
        int error = area_punch(fd, area.offset, area.capacity);
        if (error != 0)
            return error; /* the next one tries again */
        store_release64(&header->reaped, header->reaped + 1);
    }
    return 0;
}

/* Give back every page behind the header but those of blocks that a process holds, when no
 * process looks at a frame any more, or takes a free block: nothing is stored, so being killed
 * here costs nothing but the memory.  On an error it stays until the last handle goes. */
SYNC_SLOW void area_forget(shmring_header *header, const shmring_block *blocks, int fd, const area_file *own)
{
    shmring_area kept[AREA_TAKEN_MOST];
    area_file file = {0, 0, 0};
    if (area_is_ours(fd, own, &file) != 0)
        return;
    int count = area_add_blocks(header, blocks, file.bytes, load_acquire64(&header->read_position) + 1, kept, 0);
    if (count >= 0)
        area_punch_gaps(fd, file.bytes, kept, count);
}

#endif
