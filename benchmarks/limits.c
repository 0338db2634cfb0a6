/* What this machine allows, without Python: two processes and memory that both map.
 *
 *     limits [SCALE]     a line a limit: name, value, and the unit within the name
 *
 * Everything is timed with the monotonic clock; SCALE is the share of the full
 * number of turns.  benchmarks/limits.py compiles and runs it.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <linux/futex.h>
#include <malloc.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define LINE 64
#define SLOTS 4
#define RING_BYTES (256u << 10) /* stays in the cache: more is slower */
#define MESSAGE_BYTES 64
#define FRAME_BYTES (8 + MESSAGE_BYTES)
#define FRAMES (RING_BYTES / FRAME_BYTES)
#define DEADLINE_SECONDS 120

/* Each word in a line of its own. */
struct shared {
    _Alignas(LINE) _Atomic uint32_t there;
    _Alignas(LINE) _Atomic uint32_t back;
    _Alignas(LINE) _Atomic uint64_t written;
    _Alignas(LINE) _Atomic uint64_t taken;
    _Alignas(LINE) unsigned char bytes[];
};

static int cpus[2] = {-1, -1}; /* two that this process may use; -1 where there are not two */

static uint64_t now_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

static void fail(const char *what) {
    perror(what);
    exit(1);
}

static void *allocate(size_t bytes) {
    void *memory = malloc(bytes);
    if (memory == NULL)
        fail("malloc");
    return memory;
}

static void find_cpus(void) {
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof set, &set) != 0)
        fail("sched_getaffinity");
    if (CPU_COUNT(&set) < 2)
        return;
    for (int cpu = 0, found = 0; found < 2; cpu++)
        if (CPU_ISSET(cpu, &set))
            cpus[found++] = cpu;
}

static void bind_to(int side) {
    cpu_set_t set;
    if (cpus[side] < 0)
        return;
    CPU_ZERO(&set);
    CPU_SET(cpus[side], &set);
    if (sched_setaffinity(0, sizeof set, &set) != 0)
        fail("sched_setaffinity");
}

/* While the other side is about to move. After about a millisecond it is more likely that it has
 * no CPU, on a machine with one or with other work, than that it copies a block. */
static void pause_briefly(unsigned *spins) {
    struct timespec nap = {0, 20000};
    if (++*spins % (1u << 14) == 0)
        nanosleep(&nap, NULL);
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#endif
}

static struct shared *map_shared(size_t bytes) {
    struct shared *at = mmap(NULL, sizeof(struct shared) + bytes, PROT_READ | PROT_WRITE,
                             MAP_SHARED | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
    if (at == MAP_FAILED)
        fail("mmap");
    return at;
}

typedef void side(struct shared *shared, uint64_t turns, size_t bytes);

/* Run `other` in a child, `own` here; returns nanoseconds until both have ended. */
static uint64_t both(struct shared *shared, side *other, side *own, uint64_t turns, size_t bytes,
                     int apart) {
    cpu_set_t before;
    if (sched_getaffinity(0, sizeof before, &before) != 0)
        fail("sched_getaffinity");
    uint64_t start = now_ns();
    pid_t child = fork();
    if (child < 0)
        fail("fork");
    if (child == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        alarm(DEADLINE_SECONDS);
        if (apart)
            bind_to(1);
        other(shared, turns, bytes);
        _exit(0);
    }
    if (apart)
        bind_to(0);
    own(shared, turns, bytes);
    int status;
    while (waitpid(child, &status, 0) < 0)
        if (errno != EINTR)
            fail("waitpid");
    uint64_t elapsed = now_ns() - start;
    if (!WIFEXITED(status) || WEXITSTATUS(status) != 0) {
        fprintf(stderr, "the other process ended with status %d\n", status);
        exit(1);
    }
    if (sched_setaffinity(0, sizeof before, &before) != 0)
        fail("sched_setaffinity");
    return elapsed;
}

static const char *asked_for = ""; /* only what has a name that begins with this is measured */

static int is_wanted(const char *name) { return strncmp(name, asked_for, strlen(asked_for)) == 0; }

/* ---- memory: private -> shared -> private, or read in place --------------------------------- */

enum how { COPY, COPY_AND_READ, READ_IN_PLACE };

static enum how how;         /* COPY: the same two private blocks again and again */
static size_t window, piece; /* bytes in the shared memory, and of one copy */

static uint64_t sources(void) { return how == COPY ? 1 : 4; } /* more: not in the cache */

static uint64_t message_word(uint64_t turn) { return turn % sources() + 1; }

static void stream_in(struct shared *shared, uint64_t turns, size_t bytes) {
    uint64_t *own[4], written = 0;
    for (uint64_t i = 0; i < sources(); i++) {
        own[i] = allocate(bytes);
        for (size_t word = 0; word < bytes / 8; word++)
            own[i][word] = message_word(i);
    }
    for (uint64_t turn = 0; turn < turns; turn++)
        for (size_t at = 0; at < bytes; at += piece) {
            unsigned spins = 0;
            while (written + piece - atomic_load_explicit(&shared->taken, memory_order_acquire)
                   > window)
                pause_briefly(&spins);
            memcpy(shared->bytes + written % window, (char *)own[turn % sources()] + at, piece);
            written += piece;
            atomic_store_explicit(&shared->written, written, memory_order_release);
        }
    for (uint64_t i = 0; i < sources(); i++)
        free(own[i]);
}

/* Every word of a message is read, or its ends only where the copy is what is measured. */
static void check(uint64_t turn, const uint64_t *words, size_t count) {
    uint64_t sum = 0, expected = message_word(turn) * (how == COPY ? 2 : count);
    if (how == COPY)
        sum = words[0] + words[count - 1];
    else
        for (size_t word = 0; word < count; word++)
            sum += words[word];
    if (sum != expected) {
        fprintf(stderr, "message %llu is not what was copied\n", (unsigned long long)turn);
        exit(1);
    }
}

static void stream_out(struct shared *shared, uint64_t turns, size_t bytes) {
    uint64_t taken = 0, *message = NULL;
    mallopt(M_MMAP_THRESHOLD, 256 << 20); /* freed memory is used again, as after some time in */
    mallopt(M_TRIM_THRESHOLD, 512 << 20); /* a process that receives such messages */
    for (uint64_t turn = 0; turn < turns; turn++) {
        if (how == COPY_AND_READ || (how == COPY && turn == 0))
            message = allocate(bytes);
        for (size_t at = 0; at < bytes; at += piece) {
            unsigned spins = 0;
            while (atomic_load_explicit(&shared->written, memory_order_acquire) <= taken)
                pause_briefly(&spins);
            unsigned char *from = shared->bytes + taken % window;
            if (how == READ_IN_PLACE)
                check(turn, (uint64_t *)from, piece / 8);
            else
                memcpy((char *)message + at, from, piece);
            taken += piece;
            atomic_store_explicit(&shared->taken, taken, memory_order_release);
        }
        if (how != READ_IN_PLACE)
            check(turn, message, bytes / 8);
        if (how == COPY_AND_READ)
            free(message);
    }
    if (how == COPY)
        free(message);
}

static void streams(const char *what, size_t mib, enum how asked, size_t through, size_t each,
                    uint64_t turns) {
    char name[64];
    snprintf(name, sizeof name, "%s_%zu_mib_bytes_per_second", what, mib);
    if (!is_wanted(name))
        return;
    struct shared *shared = map_shared(through);
    size_t bytes = mib << 20;
    how = asked;
    window = through;
    piece = each;
    uint64_t elapsed = both(shared, stream_in, stream_out, turns, bytes, 1);
    printf("%s %.6g\n", name, (double)turns * (double)bytes / ((double)elapsed / 1e9));
    munmap(shared, sizeof(struct shared) + through);
}

/* ---- round trips ---------------------------------------------------------------------------- */

static uint64_t gap_ns;  /* between two round trips */
static uint64_t *trips;  /* nanoseconds of each */
static int sleeping;     /* by futex; or the other side's word is watched */

static void await(_Atomic uint32_t *word, uint32_t wanted) {
    unsigned spins = 0;
    uint32_t seen;
    while ((seen = atomic_load_explicit(word, memory_order_acquire)) != wanted)
        if (!sleeping)
            pause_briefly(&spins);
        else if (syscall(SYS_futex, word, FUTEX_WAIT, seen, NULL, NULL, 0) != 0
                 && errno != EAGAIN && errno != EINTR)
            fail("futex");
}

static void set(_Atomic uint32_t *word, uint32_t value) {
    atomic_store_explicit(word, value, memory_order_release);
    if (sleeping && syscall(SYS_futex, word, FUTEX_WAKE, 1, NULL, NULL, 0) < 0)
        fail("futex");
}

static void answer(struct shared *shared, uint64_t turns, size_t bytes) {
    (void)bytes;
    for (uint64_t turn = 1; turn <= turns; turn++) {
        await(&shared->there, (uint32_t)turn);
        set(&shared->back, (uint32_t)turn);
    }
}

static void ask(struct shared *shared, uint64_t turns, size_t bytes) {
    (void)bytes;
    struct timespec gap = {0, (long)gap_ns};
    for (uint64_t turn = 1; turn <= turns; turn++) {
        if (gap_ns != 0)
            nanosleep(&gap, NULL);
        uint64_t start = now_ns();
        set(&shared->there, (uint32_t)turn);
        await(&shared->back, (uint32_t)turn);
        trips[turn - 1] = now_ns() - start;
    }
}

static int by_value(const void *left, const void *right) {
    uint64_t one = *(const uint64_t *)left, other = *(const uint64_t *)right;
    return (one > other) - (one < other);
}

static void round_trips(const char *name, uint64_t turns, int apart) {
    if (!is_wanted(name))
        return;
    struct shared *shared = map_shared(0);
    trips = allocate(turns * sizeof *trips);
    both(shared, answer, ask, turns, 0, apart);
    qsort(trips, turns, sizeof *trips, by_value);
    printf("%s_median_ns %llu\n", name, (unsigned long long)trips[turns / 2]);
    printf("%s_p99_ns %llu\n", name, (unsigned long long)trips[turns * 99 / 100]);
    free(trips);
    munmap(shared, sizeof(struct shared));
}

/* ---- a ring with one producer and one consumer, and no guard -------------------------------- */

static void ring_put(struct shared *shared, uint64_t turns, size_t bytes) {
    (void)bytes;
    unsigned char message[MESSAGE_BYTES] = {0};
    uint64_t taken = 0; /* the other side's position, as last seen */
    for (uint64_t turn = 0; turn < turns; turn++) {
        unsigned spins = 0;
        while (turn - taken >= FRAMES) {
            taken = atomic_load_explicit(&shared->taken, memory_order_acquire);
            if (turn - taken >= FRAMES)
                pause_briefly(&spins);
        }
        unsigned char *frame = shared->bytes + turn % FRAMES * FRAME_BYTES;
        uint64_t length = MESSAGE_BYTES;
        memcpy(message, &turn, sizeof turn);
        memcpy(frame, &length, sizeof length);
        memcpy(frame + sizeof length, message, MESSAGE_BYTES);
        atomic_store_explicit(&shared->written, turn + 1, memory_order_release);
    }
}

static void ring_get(struct shared *shared, uint64_t turns, size_t bytes) {
    (void)bytes;
    unsigned char message[MESSAGE_BYTES];
    uint64_t written = 0, number;
    for (uint64_t turn = 0; turn < turns; turn++) {
        unsigned spins = 0;
        while (written <= turn) {
            written = atomic_load_explicit(&shared->written, memory_order_acquire);
            if (written <= turn)
                pause_briefly(&spins);
        }
        memcpy(message, shared->bytes + turn % FRAMES * FRAME_BYTES + 8, MESSAGE_BYTES);
        memcpy(&number, message, sizeof number);
        if (number != turn) {
            fprintf(stderr, "message %llu is not what was put\n", (unsigned long long)turn);
            exit(1);
        }
        atomic_store_explicit(&shared->taken, turn + 1, memory_order_release);
    }
}

static void rings(const char *name, uint64_t turns) {
    if (!is_wanted(name))
        return;
    struct shared *shared = map_shared((size_t)FRAMES * FRAME_BYTES);
    uint64_t elapsed = both(shared, ring_put, ring_get, turns, 0, 1);
    printf("%s %.6g\n", name, (double)turns / ((double)elapsed / 1e9));
    munmap(shared, sizeof(struct shared) + (size_t)FRAMES * FRAME_BYTES);
}

static uint64_t at_least(uint64_t least, double turns) {
    return turns > (double)least ? (uint64_t)turns : least;
}

int main(int argc, char **argv) {
    double scale = argc > 1 ? strtod(argv[1], NULL) : 1.0;
    if (argc > 3 || !(scale > 0) || scale > 100) {
        fprintf(stderr, "usage: limits [SCALE [START OF A NAME]]\n");
        return 2;
    }
    if (argc > 2)
        asked_for = argv[2];
    alarm(DEADLINE_SECONDS);
    find_cpus();
    printf("cpus_apart %d\n", cpus[1] >= 0);

    streams("memcpy", 1, COPY, SLOTS << 20, 1u << 20, at_least(8, 4000 * scale));
    streams("memcpy", 8, COPY, SLOTS << 23, 8u << 20, at_least(8, 400 * scale));
    for (size_t mib = 1; mib <= 8; mib *= 8) {
        size_t bytes = mib << 20;
        uint64_t turns = at_least(8, 3200 * scale / (double)mib);
        streams("whole", mib, COPY_AND_READ, SLOTS * bytes, bytes, turns);
        streams("pieces", mib, COPY_AND_READ, 1u << 20, 128u << 10, turns);
        streams("in_place", mib, READ_IN_PLACE, SLOTS * bytes, bytes, turns);
    }

    round_trips("cache_line", at_least(100, 1000000 * scale), 1);
    uint64_t often = at_least(100, 50000 * scale), rare = at_least(20, 2000 * scale);
    sleeping = 1;
    round_trips("futex_apart", often, 1);
    round_trips("futex_free", often, 0);
    gap_ns = 1000000;
    round_trips("futex_apart_idle_1_ms", rare, 1);
    round_trips("futex_free_idle_1_ms", rare, 0);

    rings("ring_64_b_messages_per_second", at_least(10000, 20000000 * scale));
    return 0;
}
