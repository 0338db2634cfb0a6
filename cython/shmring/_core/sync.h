/* The only home of atomics, the lock word, and futex wait and wake.
 *
 * The lock word
 *     bits 0..29  TID of the owner, 0 is free
 *     bit  30     OWNER_DIED, set by the kernel
 *     bit  31     WAITERS, a thread may sleep on the word
 *
 * While a thread holds the word (and just before it takes it) the field
 * `list_op_pending` of its robust list head points at it.  When the thread
 * dies, at whatever instruction, the kernel follows that pointer
 * (kernel/futex/core.c, exit_robust_list): a word that carries the dead
 * thread's TID becomes OWNER_DIED and one waiter is woken; a word that is 0,
 * because death came between unlocking and waking, has one waiter woken.
 * That is what glibc builds robust mutexes from; taken alone it needs no
 * pointer in shared memory, so garbage in the word is an error, not a crash.
 *
 * THE ONE-LOCK RULE.  There is one pending field a thread.  A thread never
 * holds two lock words, and while it holds one it runs no Python, allocates
 * nothing, and takes no other robust mutex.  System calls are allowed.
 *
 * FORK.  A child has another TID, and its copy of the parent's thread-local
 * cache is wrong.  A page marked MADV_WIPEONFORK reads zero in the child,
 * raw clone() included, which costs one load where getpid() costs a call.
 *
 * MUSL.  The kernel learns a thread's robust list head only when the thread
 * locks its first robust mutex; so a throwaway one is locked, once a thread
 * and again after fork.
 */
#ifndef SHMRING_SYNC_H
#define SHMRING_SYNC_H

#include <Python.h> /* Py_GIL_DISABLED */

#include <errno.h>
#include <limits.h>
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#ifndef MADV_WIPEONFORK
#define MADV_WIPEONFORK 18
#endif

#define SYNC_UNLIKELY(condition) __builtin_expect(!!(condition), 0)
#define SYNC_SLOW static __attribute__((noinline, unused)) /* kept out of the hot path */
#define SYNC_SLICE_NS 90000000LL /* the longest sleep: a lost wake costs this much */
/* Whole slices end at multiples of this, so that many sleepers share what it costs
 * to start a sleeping CPU: 64 of them took 1.6 % of a core, and take 1.1. */
#define SYNC_GRID_NS 15000000LL
#define SYNC_SLICE_LEAST_NS (SYNC_SLICE_NS - SYNC_GRID_NS)
#define SYNC_LONG_NS (22 * SYNC_SLICE_NS) /* of a consumer while others keep a watch: see watch.h */

/* ---- atomics: each name carries its memory order ------------------------- */

static inline uint32_t load_relaxed32(const uint32_t *p) { return __atomic_load_n(p, __ATOMIC_RELAXED); }
static inline uint64_t load_relaxed64(const uint64_t *p) { return __atomic_load_n(p, __ATOMIC_RELAXED); }
static inline uint32_t load_acquire32(const uint32_t *p) { return __atomic_load_n(p, __ATOMIC_ACQUIRE); }
static inline uint64_t load_acquire64(const uint64_t *p) { return __atomic_load_n(p, __ATOMIC_ACQUIRE); }
static inline void store_relaxed32(uint32_t *p, uint32_t v) { __atomic_store_n(p, v, __ATOMIC_RELAXED); }
static inline void store_relaxed64(uint64_t *p, uint64_t v) { __atomic_store_n(p, v, __ATOMIC_RELAXED); }
static inline void store_release32(uint32_t *p, uint32_t v) { __atomic_store_n(p, v, __ATOMIC_RELEASE); }
static inline void store_release64(uint64_t *p, uint64_t v) { __atomic_store_n(p, v, __ATOMIC_RELEASE); }
static inline void fence_full(void) { __atomic_thread_fence(__ATOMIC_SEQ_CST); }

static inline int compare_exchange32(uint32_t *p, uint32_t expected, uint32_t desired)
{
    return __atomic_compare_exchange_n(p, &expected, desired, 0, __ATOMIC_ACQ_REL, __ATOMIC_RELAXED);
}
static inline int compare_exchange64(uint64_t *p, uint64_t expected, uint64_t desired)
{
    return __atomic_compare_exchange_n(p, &expected, desired, 0, __ATOMIC_ACQ_REL, __ATOMIC_RELAXED);
}
static inline int64_t fetch_add64(int64_t *p, int64_t v) { return __atomic_fetch_add(p, v, __ATOMIC_ACQ_REL); }
static inline uint32_t fetch_add32(uint32_t *p, uint32_t v) { return __atomic_fetch_add(p, v, __ATOMIC_RELAXED); }

/* Between the exchange that unlocks and the load of a wait word.  On x86 the
 * locked exchange is the full fence already (7 % of a put was saved). */
static inline void fence_after_unlock(void)
{
#if defined(__x86_64__)
    __asm__ __volatile__("" ::: "memory");
#else
    fence_full();
#endif
}

static inline void spin_pause(void)
{
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ __volatile__("isb" ::: "memory");
#endif
}

static inline uint32_t current_cpu(void) { return (uint32_t)sched_getcpu(); }

static inline int64_t monotonic_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000LL + t.tv_nsec;
}

/* `nanoseconds`, or a slice of `longest`. */
static inline int64_t slice_of(int64_t nanoseconds, int64_t longest)
{
    if (nanoseconds < longest)
        return nanoseconds;
    return longest - (monotonic_ns() + longest) % SYNC_GRID_NS;
}

static inline void nap_ns(int64_t nanoseconds)
{
    struct timespec t = {nanoseconds / 1000000000LL, nanoseconds % 1000000000LL};
    nanosleep(&t, NULL);
}

/* How many calls are inside a handle: the last one that leaves a closed one unmaps;
 * handle_leave() says whether it was the last.
 * With a GIL only the calls that release it need to be counted. */
#ifdef Py_GIL_DISABLED
static inline void handle_enter(int64_t *inside)
{
    __atomic_fetch_add(inside, 1, __ATOMIC_SEQ_CST);
    fence_after_unlock(); /* before `closed` is read: see close() */
}
static inline int handle_leave(int64_t *inside) { return __atomic_fetch_sub(inside, 1, __ATOMIC_SEQ_CST) <= 1; }
#else
static inline void handle_enter(int64_t *inside) { (void)inside; }
static inline int handle_leave(int64_t *inside) { (void)inside; return 0; }
#endif

/* ---- futex: never PRIVATE, the words are shared --------------------------- */

static inline int futex_wait(uint32_t *word, uint32_t expected, int64_t nanoseconds)
{
    struct timespec t = {nanoseconds / 1000000000LL, nanoseconds % 1000000000LL};
    if (nanoseconds <= 0)
        return ETIMEDOUT;
    return syscall(SYS_futex, word, FUTEX_WAIT, expected, &t, NULL, 0) == 0 ? 0 : errno;
}

static inline long futex_wake(uint32_t *word, int count)
{
    return syscall(SYS_futex, word, FUTEX_WAKE, count, NULL, NULL, 0);
}

/* ---- this thread ----------------------------------------------------------- */

typedef struct {
    uint32_t epoch; /* of the process in which the rest was found out */
    uint32_t tid;
    uint32_t pid;
    uint32_t random;
    struct robust_list_head *head;
} sync_thread;

#if defined(__GLIBC__)
/* musl refuses to dlopen() a library with static TLS */
#define SYNC_TLS __attribute__((tls_model("initial-exec")))
#else
#define SYNC_TLS
#endif

static __thread sync_thread sync_self SYNC_TLS;
static uint32_t *sync_epoch_page;
static uint32_t sync_epoch_last;

static void sync_wipe_epoch(void) { *sync_epoch_page = 0; }

/* Once a module, at import: 0, or -1 with an ImportError where the kernel (or an
 * emulator) knows no robust lists, without which nothing here is safe. */
SYNC_SLOW int sync_start(void)
{
    struct robust_list_head *head = NULL;
    size_t size = 0;
    int error = 0;
    if (sync_epoch_page != NULL)
        return 0;
    void *page = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (page == MAP_FAILED || syscall(SYS_get_robust_list, 0, &head, &size) != 0)
        error = errno;
    else
        error = pthread_atfork(NULL, NULL, sync_wipe_epoch);
    if (error != 0) {
        PyErr_Format(PyExc_ImportError,
                     "this kernel (or emulator) has no robust futexes, without which a killed process would"
                     " block the others: %s; the fallback works here",
                     strerror(error));
        return -1;
    }
    /* Kernels before 4.14 lack the advice; the handler covers fork() there. */
    (void)madvise(page, 4096, MADV_WIPEONFORK);
    sync_epoch_page = (uint32_t *)page;
    *sync_epoch_page = sync_epoch_last = 1;
    return 0;
}

/* A number that differs between a process and its forked children. */
static inline uint32_t sync_epoch(void)
{
    uint32_t epoch = load_relaxed32(sync_epoch_page);
    if (SYNC_UNLIKELY(epoch == 0)) {
        if (compare_exchange32(sync_epoch_page, 0, sync_epoch_last + 1))
            sync_epoch_last++;
        epoch = load_relaxed32(sync_epoch_page);
    }
    return epoch;
}

#if !defined(__GLIBC__)
static void sync_register_robust_list(void)
{
    pthread_mutexattr_t attributes;
    pthread_mutex_t throwaway;
    pthread_mutexattr_init(&attributes);
    pthread_mutexattr_setrobust(&attributes, PTHREAD_MUTEX_ROBUST);
    /* musl registers the list for those that are shared between processes only */
    pthread_mutexattr_setpshared(&attributes, PTHREAD_PROCESS_SHARED);
    pthread_mutex_init(&throwaway, &attributes);
    pthread_mutex_lock(&throwaway);
    pthread_mutex_unlock(&throwaway);
    pthread_mutex_destroy(&throwaway);
    pthread_mutexattr_destroy(&attributes);
}
#endif

SYNC_SLOW void sync_identify(uint32_t epoch)
{
    size_t size = 0;
    sync_self.tid = (uint32_t)syscall(SYS_gettid);
    sync_self.pid = (uint32_t)getpid();
    sync_self.random = sync_self.tid;
    sync_self.head = NULL;
#if !defined(__GLIBC__)
    sync_register_robust_list();
#endif
    if (syscall(SYS_get_robust_list, 0, &sync_self.head, &size) != 0)
        sync_self.head = NULL;
    sync_self.epoch = epoch;
}

static inline sync_thread *sync_current(void)
{
    uint32_t epoch = sync_epoch();
    if (SYNC_UNLIKELY(sync_self.epoch != epoch))
        sync_identify(epoch);
    return &sync_self;
}

/* Pause between two looks at a word that others write.  Each look takes the cache line away from
 * the thread that writes it, and costs that thread as much as several stores; so the pauses double,
 * up to `most`, and a random part keeps waiters from looking at the same moment.  By the clock: a
 * pause instruction is 6 ns on some processors and 60 on others. */
SYNC_SLOW int64_t sync_pause(int64_t *pause, int64_t most)
{
    uint32_t random = sync_self.random = sync_self.random * 1664525u + 1013904223u;
    int64_t half = *pause / 2;
    int64_t now = monotonic_ns();
    int64_t until = now + half + (int64_t)((uint64_t)random * (uint64_t)half >> 32);
    *pause = 2 * *pause < most ? 2 * *pause : most;
    do {
        spin_pause();
        now = monotonic_ns();
    } while (now < until);
    return now;
}

/* This process; of a thread that has tried for a lock, one load. */
static inline uint32_t sync_pid(void) { return sync_self.pid; }

/* ---- the lock word ----------------------------------------------------------- */

enum {
    LOCK_TAKEN = 0,
    LOCK_TAKEN_FROM_DEAD = 1, /* the caller recovers before anything else */
    LOCK_BUSY = 2,
    LOCK_GARBAGE = 3, /* the word names no living thread */
};

/* Of a word that was read: its owner, and whether that died. */
static inline uint32_t lock_owner(uint32_t seen) { return seen & FUTEX_TID_MASK; }
static inline int lock_is_orphan(uint32_t seen) { return (seen & FUTEX_OWNER_DIED) != 0; }

/* How long a waiter looks before it sleeps, and how long it pauses between two looks.  The owner
 * comes again meanwhile, with its lines still warm: some ten times, where taking turns would move
 * all lines from CPU to CPU for each message. */
#define LOCK_SPIN_NS 40000
#define LOCK_PAUSE_NS 4000
#define LOCK_PAUSE_MOST_NS 16000

#define LOCK_COMPILER_BARRIER() __asm__ __volatile__("" ::: "memory")

/* The kernel reads the field at any instruction: the store is volatile and
 * stays on its side of the exchange that follows or precedes it. */
static inline void lock_set_pending(sync_thread *self, uint32_t *word)
{
    struct robust_list *volatile *pending =
        (struct robust_list *volatile *)&self->head->list_op_pending;
    LOCK_COMPILER_BARRIER();
    *pending = word == NULL ? NULL : (struct robust_list *)((char *)word - self->head->futex_offset);
    LOCK_COMPILER_BARRIER();
}

SYNC_SLOW int lock_try_slow(sync_thread *self, uint32_t *word, uint32_t waiters)
{
    for (;;) {
        uint32_t seen = load_relaxed32(word);
        uint32_t owner = seen & FUTEX_TID_MASK;
        if (owner != 0 || (seen & ~(uint32_t)(FUTEX_WAITERS | FUTEX_OWNER_DIED)) != 0) {
            lock_set_pending(self, NULL);
            /* our own TID: this thread holds no lock word here, so it is forged; and
             * the kernel takes the TID out where it says that the owner died */
            return owner == self->tid || (owner != 0 && seen & FUTEX_OWNER_DIED) ? LOCK_GARBAGE : LOCK_BUSY;
        }
        /* taking clears OWNER_DIED; death during recovery sets it again */
        if (compare_exchange32(word, seen, self->tid | (seen & FUTEX_WAITERS) | waiters))
            return seen & FUTEX_OWNER_DIED ? LOCK_TAKEN_FROM_DEAD : LOCK_TAKEN;
    }
}

static inline int lock_try(uint32_t *word)
{
    sync_thread *self = sync_current();
    if (SYNC_UNLIKELY(self->head == NULL))
        return LOCK_GARBAGE;
    lock_set_pending(self, word);
    /* a load first: an exchange in vain would take the line away from the owner */
    if (__builtin_expect(load_relaxed32(word) == 0 && compare_exchange32(word, 0, self->tid), 1))
        return LOCK_TAKEN;
    return lock_try_slow(self, word, 0);
}

/* Takes a word that is free and has no history; leaves any other as it is. */
static inline int lock_try_free(uint32_t *word)
{
    sync_thread *self = sync_current();
    if (SYNC_UNLIKELY(load_relaxed32(word) != 0 || self->head == NULL))
        return 0;
    lock_set_pending(self, word);
    if (__builtin_expect(compare_exchange32(word, 0, self->tid), 1))
        return 1;
    lock_set_pending(self, NULL);
    return 0;
}

static inline void lock_release(uint32_t *word)
{
    /* a full fence as well: see fence_after_unlock */
    uint32_t seen = __atomic_exchange_n(word, 0, __ATOMIC_SEQ_CST);
    if (SYNC_UNLIKELY(seen & FUTEX_WAITERS))
        futex_wake(word, 1);
    /* cleared last: were we killed before the wake, the kernel would make it */
    lock_set_pending(&sync_self, NULL);
}

/* Wait until the word could be taken or `nanoseconds` have passed; at most one
 * slice, because WAITERS can be lost: A wakes B, C takes the word by the fast
 * path and clears the bit, A is killed: B would sleep for ever. */
SYNC_SLOW int lock_wait(uint32_t *word, int64_t nanoseconds)
{
    sync_thread *self = sync_current();
    int64_t now = monotonic_ns();
    int64_t until = now + (nanoseconds < SYNC_SLICE_NS ? nanoseconds : SYNC_SLICE_NS);
    int64_t asleep_from = now + LOCK_SPIN_NS;
    int64_t pause = LOCK_PAUSE_NS;
    uint32_t waiters = 0;
    if (self->head == NULL)
        return LOCK_GARBAGE;
    for (;;) {
        lock_set_pending(self, word);
        int result = lock_try_slow(self, word, waiters);
        if (result != LOCK_BUSY)
            return result;
        if (now < asleep_from) {
            now = sync_pause(&pause, LOCK_PAUSE_MOST_NS);
            continue;
        }
        int64_t left = until - monotonic_ns();
        uint32_t seen = load_relaxed32(word);
        if (left <= 0) {
            uint32_t owner = seen & FUTEX_TID_MASK;
            /* A dead owner's word is released before its TID can vanish. */
            if (owner != 0 && kill((pid_t)owner, 0) != 0 && errno == ESRCH && load_relaxed32(word) == seen)
                return LOCK_GARBAGE;
            if (owner == 0 && seen != 0 && (seen & ~(uint32_t)(FUTEX_WAITERS | FUTEX_OWNER_DIED)) != 0)
                return LOCK_GARBAGE;
            return LOCK_BUSY;
        }
        if ((seen & FUTEX_TID_MASK) == 0)
            continue;
        if (!(seen & FUTEX_WAITERS) && !compare_exchange32(word, seen, seen | FUTEX_WAITERS))
            continue;
        waiters = FUTEX_WAITERS; /* others may sleep beside us: pass the bit on */
        if (futex_wait(word, seen | FUTEX_WAITERS, left) == EINTR)
            return LOCK_BUSY;
        now = monotonic_ns();
        asleep_from = now + LOCK_SPIN_NS;
        pause = LOCK_PAUSE_NS;
    }
}

/* ---- the wait word: one wake-up in flight ---------------------------------------
 *
 * bit 0   SLEEPING  a thread sleeps, or did
 * bit 1   WOKEN     a woken one has not arrived yet
 * rest    a sequence, so that a wake between look and sleep is not missed
 *
 * Sleepers are not counted, so a kill leaks no count.  A put that makes no
 * wake-up saw WOKEN, so it precedes the clear-then-look of the woken sleeper.
 * A kill leaves at most WOKEN stuck, and one expired sleep clears it.
 */
#define WAIT_SLEEPING 1u
#define WAIT_WOKEN 2u
#define WAIT_STEP 4u

static inline int wait_wants_wake(const uint32_t *word)
{
    return (load_relaxed32(word) & (WAIT_SLEEPING | WAIT_WOKEN)) == WAIT_SLEEPING;
}

/* After a full fence that follows what the sleeper looks for. */
SYNC_SLOW void wait_wake_one(uint32_t *word)
{
    uint32_t seen = load_relaxed32(word);
    if ((seen & (WAIT_SLEEPING | WAIT_WOKEN)) != WAIT_SLEEPING)
        return;
    uint32_t woken = ((seen & ~3u) + WAIT_STEP) | WAIT_SLEEPING | WAIT_WOKEN;
    if (!compare_exchange32(word, seen, woken))
        return; /* another waker, or a sleeper that is about to look */
    if (futex_wake(word, 1) == 0 && compare_exchange32(word, woken, (woken & ~3u) + WAIT_STEP))
        futex_wake(word, INT_MAX);
}

SYNC_SLOW void wait_wake_all(uint32_t *word)
{
    uint32_t seen = load_relaxed32(word);
    while (!compare_exchange32(word, seen, (seen & ~3u) + WAIT_STEP))
        seen = load_relaxed32(word);
    futex_wake(word, INT_MAX);
}

/* One sleeper looks, and so does one that announced itself and does not sleep yet.  WOKEN goes, as
 * with any that looks: a waker that found none asleep takes it back only from an unchanged word. */
SYNC_SLOW void wait_wake_to_look(uint32_t *word)
{
    uint32_t seen = load_relaxed32(word);
    while (!compare_exchange32(word, seen, (seen & ~WAIT_WOKEN) + WAIT_STEP))
        seen = load_relaxed32(word);
    futex_wake(word, 1);
}

/* Announce, then look again (a full fence is in between), then wait_sleep. */
static inline uint32_t wait_announce(uint32_t *word)
{
    uint32_t seen = __atomic_fetch_or(word, WAIT_SLEEPING, __ATOMIC_SEQ_CST) | WAIT_SLEEPING;
    fence_full();
    return seen;
}

/* ---- many words at once ----------------------------------------------------------
 *
 * futex_waitv (Linux 5.16) sleeps on up to 128 words.  A bell is a word of this
 * process that ends such a sleep: 0 is silent, 1 was rung; it has one sleeper.
 */
#define SYNC_WORDS_MOST 127 /* and a bell */
/* Where the kernel watches one word only: the slice for several, and for one and a bell. */
#define SYNC_ABSENT_NS 2000000LL
#define SYNC_ABSENT_BELL_NS 10000000LL

typedef struct {
    uint64_t value;
    uint64_t address;
    uint32_t flags;
    uint32_t reserved;
} sync_watched; /* struct futex_waitv, which old headers lack */

static int sync_waitv_absent; /* found out with the first sleep, or set by a test */

static inline int sync_set_waitv_absent(int absent)
{
    int before = sync_waitv_absent;
    sync_waitv_absent = absent;
    return before;
}

static inline void bell_ring(uint32_t *bell)
{
    if (__atomic_exchange_n(bell, 1, __ATOMIC_SEQ_CST) == 0)
        futex_wake(bell, INT_MAX);
}

/* Silences it; the sleeper then looks at what it was rung for. */
static inline int bell_heard(uint32_t *bell) { return (int)__atomic_exchange_n(bell, 0, __ATOMIC_SEQ_CST); }

/* Sleep a slice of `longest` at most, on all of `words` and on `bell` (which may be NULL).  WOKEN
 * is cleared on any return, and then the caller looks. */
SYNC_SLOW void wait_sleep(uint32_t *const *words, const uint32_t *announced, int count, uint32_t *bell,
                          int64_t nanoseconds, int64_t longest)
{
    sync_watched watched[SYNC_WORDS_MOST + 1];
    int all = 0;
    nanoseconds = slice_of(nanoseconds, longest);
    for (; all < count; all++) {
        watched[all].value = announced[all];
        watched[all].address = (uint64_t)(uintptr_t)words[all];
        watched[all].flags = 2; /* 32 bits, and not PRIVATE */
        watched[all].reserved = 0;
    }
    if (bell != NULL) {
        watched[all].value = 0;
        watched[all].address = (uint64_t)(uintptr_t)bell;
        watched[all].flags = 2;
        watched[all].reserved = 0;
        all++;
    }
    if (nanoseconds > 0 && all > 1 && !sync_waitv_absent) {
        int64_t until = monotonic_ns() + nanoseconds;
        struct timespec t = {until / 1000000000LL, until % 1000000000LL};
        if (syscall(449, watched, all, 0, &t, CLOCK_MONOTONIC) < 0 && (errno == ENOSYS || errno == EPERM))
            sync_waitv_absent = 1; /* EPERM: a container's filter that does not know it */
    } else if (nanoseconds > 0 && all > 0) {
        int64_t absent = count > 1 ? SYNC_ABSENT_NS : SYNC_ABSENT_BELL_NS;
        if (all > 1 && nanoseconds > absent)
            nanoseconds = absent;
        futex_wait((uint32_t *)(uintptr_t)watched[0].address, (uint32_t)watched[0].value, nanoseconds);
    } else if (nanoseconds > 0) {
        nap_ns(nanoseconds);
    }
    for (all = 0; all < count; all++)
        __atomic_fetch_and(words[all], ~WAIT_WOKEN, __ATOMIC_SEQ_CST);
    fence_full();
}

#endif
