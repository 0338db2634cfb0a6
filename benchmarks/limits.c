/* Limits of the machine, without Python: two processes and memory that both map.
 *
 *     limits [SCALE [PREFIX]]     a line for each limit: its name (with the unit), its value
 *
 * SCALE is the share of the full number of turns; only limits whose name begins with PREFIX
 * are measured.  benchmarks/limits.py compiles and runs it.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <linux/futex.h>
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
#define FRAME_BYTES (8 + 64) /* a length and a message */
#define DEADLINE_SECONDS 120

/* Each word in its own cache line. */
struct shared {
    _Alignas(LINE) _Atomic uint32_t there;
    _Alignas(LINE) _Atomic uint32_t back;
    _Alignas(LINE) _Atomic uint64_t written;
    _Alignas(LINE) _Atomic uint64_t taken;
    _Alignas(LINE) unsigned char bytes[];
};

static int cpus[2] = {-1, -1}; /* two that this process may use; -1 if there is only one */

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

/* Pause while the other side is about to move. After about a millisecond it probably has no CPU:
 * sleep then. */
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

static const char *prefix = "";

static int is_wanted(const char *name) { return strncmp(name, prefix, strlen(prefix)) == 0; }

/* ---- copies: private -> shared -> private, through slots that are used in turn --------------- */

static uint64_t slots; /* a power of two */

static void copy_in(struct shared *shared, uint64_t turns, size_t bytes) {
    uint64_t *own = allocate(bytes);
    uint64_t taken = 0; /* the cached position of the other side */
    memset(own, 1, bytes);
    for (uint64_t turn = 0; turn < turns; turn++) {
        unsigned spins = 0;
        while (turn - taken >= slots) {
            taken = atomic_load_explicit(&shared->taken, memory_order_acquire);
            if (turn - taken >= slots)
                pause_briefly(&spins);
        }
        own[0] = turn;
        memcpy(shared->bytes + (turn & (slots - 1)) * bytes, own, bytes);
        atomic_store_explicit(&shared->written, turn + 1, memory_order_release);
    }
    free(own);
}

static void copy_out(struct shared *shared, uint64_t turns, size_t bytes) {
    uint64_t *own = allocate(bytes);
    uint64_t written = 0;
    for (uint64_t turn = 0; turn < turns; turn++) {
        unsigned spins = 0;
        while (written <= turn) {
            written = atomic_load_explicit(&shared->written, memory_order_acquire);
            if (written <= turn)
                pause_briefly(&spins);
        }
        memcpy(own, shared->bytes + (turn & (slots - 1)) * bytes, bytes);
        if (own[0] != turn || own[bytes / 8 - 1] != 0x0101010101010101u) {
            fprintf(stderr, "message %llu is not what was sent\n", (unsigned long long)turn);
            exit(1);
        }
        atomic_store_explicit(&shared->taken, turn + 1, memory_order_release);
    }
    free(own);
}

static void copies(const char *name, size_t bytes, uint64_t slot_count, uint64_t turns) {
    if (!is_wanted(name))
        return;
    slots = slot_count;
    struct shared *shared = map_shared(slots * bytes);
    uint64_t elapsed = both(shared, copy_in, copy_out, turns, bytes, 1);
    double moved = strstr(name, "_bytes_") != NULL ? (double)bytes : 1;
    printf("%s %.6g\n", name, (double)turns * moved / ((double)elapsed / 1e9));
    munmap(shared, sizeof(struct shared) + slots * bytes);
}

/* ---- round trips ---------------------------------------------------------------------------- */

static uint64_t gap_ns; /* between two round trips */
static uint64_t *trips; /* nanoseconds of each */
static int sleeping;    /* wait in a futex; else spin */

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

static uint64_t at_least(uint64_t least, double turns) {
    return turns > (double)least ? (uint64_t)turns : least;
}

int main(int argc, char **argv) {
    double scale = argc > 1 ? strtod(argv[1], NULL) : 1.0;
    if (argc > 3 || !(scale > 0) || scale > 100) {
        fprintf(stderr, "usage: limits [SCALE [PREFIX]]\n");
        return 2;
    }
    if (argc > 2)
        prefix = argv[2];
    alarm(DEADLINE_SECONDS);
    find_cpus();
    printf("cpus_apart %d\n", cpus[1] >= 0);

    copies("memcpy_1_mib_bytes_per_second", 1u << 20, 4, at_least(8, 4000 * scale));
    copies("memcpy_8_mib_bytes_per_second", 8u << 20, 4, at_least(8, 400 * scale));
    copies("ring_64_b_messages_per_second", FRAME_BYTES, 4096, at_least(10000, 2e7 * scale));

    round_trips("cache_line", at_least(100, 1000000 * scale), 1);
    uint64_t often = at_least(100, 50000 * scale), rare = at_least(20, 2000 * scale);
    sleeping = 1;
    round_trips("futex_apart", often, 1);
    round_trips("futex_free", often, 0);
    gap_ns = 1000000;
    round_trips("futex_apart_idle_1_ms", rare, 1);
    round_trips("futex_free_idle_1_ms", rare, 0);
    return 0;
}
