/* Two threads do what depends on the order of memory, by the product's own functions.
 *
 *     published   a payload is whole where its position is seen, and not
 *                 written over before the reader's position is
 *     counted     a count read without a lock belongs to a position that stood meanwhile
 *     locked      what one holder of a lock word wrote the next one sees
 *     asleep      a waker sees the sleeper, or the sleeper sees the message
 *     unfenced    the same without the fences: must go wrong, or this processor
 *                 (or emulator) shows nothing about them
 *
 * Prints how often each went wrong.  Exit status: 0 as it must be, 1 not.
 */
#define _GNU_SOURCE
#include "count.h"
#include "sync.h"

#include <stdio.h>
#include <stdlib.h>

#define WORDS 8
#define STEP 64
#define BATCH 500

static struct {
    uint64_t payload[WORDS]; /* each group in cache lines of its own */
    uint64_t write_position __attribute__((aligned(128)));
    uint64_t read_position __attribute__((aligned(128)));
    shmring_count count __attribute__((aligned(128)));
    uint32_t lock __attribute__((aligned(128)));
    uint64_t locked;
    uint64_t rounds[2] __attribute__((aligned(128)));
} shared;

typedef struct {
    uint64_t position __attribute__((aligned(128)));
    uint64_t woken __attribute__((aligned(128))); /* what either thread saw */
    uint32_t wait __attribute__((aligned(128)));
    uint64_t slept __attribute__((aligned(128)));
} rendezvous;

static rendezvous meetings[BATCH];

/* Both threads leave it together. */
static void meet(int who, uint64_t round)
{
    store_release64(&shared.rounds[who], round);
    for (int looks = 1; load_acquire64(&shared.rounds[1 - who]) < round; looks++)
        if (looks % 1000 == 0)
            sched_yield(); /* there may be one processor */
}

static uint64_t until(const uint64_t *position, uint64_t least)
{
    uint64_t seen;
    for (int looks = 1; (seen = load_acquire64(position)) < least; looks++)
        if (looks % 1000 == 0)
            sched_yield();
    return seen;
}

static uint64_t published(int who, uint64_t rounds)
{
    uint64_t wrong = 0;
    for (uint64_t round = 1; round <= rounds; round++) {
        if (who == 0) {
            until(&shared.read_position, round - 1);
            for (int word = 0; word < WORDS; word++)
                store_relaxed64(&shared.payload[word], round);
            store_release64(&shared.write_position, round);
        } else {
            until(&shared.write_position, round);
            for (int word = WORDS; word-- > 0;)
                wrong += load_relaxed64(&shared.payload[word]) != round;
            store_release64(&shared.read_position, round);
        }
    }
    return wrong;
}

static uint64_t counted(int who, uint64_t rounds)
{
    uint64_t wrong = 0, position = 0;
    while (position < rounds * STEP) {
        if (who == 0) {
            count_on(&shared.count, position, position + STEP, 1);
            position += STEP;
            store_release64(&shared.write_position, position);
        } else {
            uint64_t before = load_acquire64(&shared.write_position);
            uint64_t count = count_read(&shared.count, &shared.write_position);
            position = load_acquire64(&shared.write_position);
            wrong += count < before / STEP || count > position / STEP;
        }
    }
    return wrong;
}

static uint64_t locked(int who, uint64_t rounds)
{
    (void)who;
    for (uint64_t round = 0; round < rounds; round++) {
        while (lock_try(&shared.lock) != LOCK_TAKEN)
            lock_wait(&shared.lock, 0) == LOCK_TAKEN ? lock_release(&shared.lock) : (void)sched_yield();
        shared.locked++;
        lock_release(&shared.lock);
    }
    return 0;
}

/* Many words in a batch, and none is looked at twice: so stores wait for their cache lines. */
static uint64_t sleeps(int who, uint64_t rounds, int fenced)
{
    uint64_t wrong = 0;
    for (uint64_t batch = 1; batch <= rounds / BATCH; batch++) {
        meet(who, 2 * batch - 1);
        for (int i = 0; i < BATCH; i++) {
            rendezvous *each = &meetings[i];
            if (who == 0 && fenced) {
                if (lock_try(&shared.lock) != LOCK_TAKEN)
                    abort();
                store_release64(&each->position, batch);
                lock_release(&shared.lock);
                fence_after_unlock();
                each->woken = load_relaxed32(&each->wait) & WAIT_SLEEPING;
            } else if (who == 0) {
                store_release64(&each->position, batch);
                each->woken = load_relaxed32(&each->wait) & WAIT_SLEEPING;
            } else if (fenced) {
                wait_announce(&each->wait);
                each->slept = load_acquire64(&each->position) < batch;
            } else {
                store_release32(&each->wait, WAIT_SLEEPING);
                each->slept = load_acquire64(&each->position) < batch;
            }
        }
        meet(who, 2 * batch);
        for (int i = 0; who == 0 && i < BATCH; i++) {
            wrong += meetings[i].slept && !meetings[i].woken;
            store_release32(&meetings[i].wait, 0);
        }
    }
    return wrong;
}

static uint64_t asleep(int who, uint64_t rounds) { return sleeps(who, rounds, 1); }
static uint64_t unfenced(int who, uint64_t rounds) { return sleeps(who, rounds, 0); }

static cpu_set_t allowed;

/* Each thread has a processor of its own, where there are two. */
static void stay(int who)
{
    cpu_set_t own;
    CPU_ZERO(&own);
    for (int cpu = 0; cpu < CPU_SETSIZE; cpu++)
        if (CPU_ISSET(cpu, &allowed) && who-- == 0) {
            CPU_SET(cpu, &own);
            sched_setaffinity(0, sizeof own, &own);
        }
}

typedef struct {
    uint64_t (*shape)(int who, uint64_t rounds);
    uint64_t rounds, wrong;
} trial;

static void *reader(void *argument)
{
    trial *own = argument;
    stay(1);
    own->wrong = own->shape(1, own->rounds);
    return NULL;
}

static uint64_t run(uint64_t (*shape)(int, uint64_t), const char *name, uint64_t rounds)
{
    trial other = {shape, rounds, 0};
    pthread_t thread;
    memset(&shared, 0, sizeof shared);
    if (pthread_create(&thread, NULL, reader, &other) != 0)
        exit(2);
    uint64_t wrong = shape(0, rounds);
    pthread_join(thread, NULL);
    wrong += other.wrong;
    if (shape == locked)
        wrong += shared.locked != 2 * rounds;
    printf("%s: %llu wrong in %llu rounds\n", name, (unsigned long long)wrong, (unsigned long long)rounds);
    return wrong;
}

int main(int argc, char **argv)
{
    uint64_t rounds = argc > 1 ? strtoull(argv[1], NULL, 10) : 100000;
    if (sync_start() != 0 || sched_getaffinity(0, sizeof allowed, &allowed) != 0)
        return 2;
    stay(0);
    uint64_t wrong = run(published, "published", rounds) + run(counted, "counted", rounds)
                     + run(locked, "locked", rounds) + run(asleep, "asleep", rounds);
    return wrong == 0 && run(unfenced, "unfenced", rounds) > 0 ? 0 : 1;
}
