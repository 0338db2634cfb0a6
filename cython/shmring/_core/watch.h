/* Two of the consumers that sleep at a ring keep a watch: they look once a slice.
 *
 * What a kill can leave behind (a message without its wake-up, WOKEN without a thread
 * that arrives) is found by the next consumer that looks.  One that looks is enough for
 * all, and the second is there because the first may be the one that was killed.  Those
 * that keep no watch sleep for SYNC_LONG_NS: 64 sleepers that all look take 3 % of a core.
 *
 * A watch is a promise: the time until which its keeper looks again, plus a grace.  It
 * lapses by itself, so a kill leaves nothing behind.  The thread that keeps the other one
 * then wakes a sleeper, which takes it over; so does a keeper that leaves the last one.
 */
#ifndef SHMRING_WATCH_H
#define SHMRING_WATCH_H

#include "layout.h"
#include "sync.h"

#define WATCH_GRACE_NS 60000000LL

/* Of one wait of one thread. */
typedef struct {
    uint64_t promise; /* as it stands in the header; 0: keeps no watch */
    int place;
} watch_kept;

/* Garbage is no promise either. */
static inline int watch_is_kept(uint64_t promise, int64_t now)
{
    return promise - (uint64_t)now <= (uint64_t)(SYNC_SLICE_NS + WATCH_GRACE_NS);
}

/* Before a sleep that begins now.  Returns how long it may be. */
SYNC_SLOW int64_t watch_begin(shmring_header *header, watch_kept *kept, int64_t now)
{
    uint64_t promise = (uint64_t)(now + SYNC_SLICE_NS + WATCH_GRACE_NS);
    if (kept->promise != 0 && compare_exchange64(&header->watches[kept->place], kept->promise, promise)) {
        kept->promise = promise;
        return SYNC_SLICE_NS;
    }
    kept->promise = 0; /* it had lapsed, and another thread has it */
    for (int turn = 0; turn < 2; turn++) {
        for (int place = 0; place < 2; place++) {
            uint64_t before = load_relaxed64(&header->watches[place]);
            if (!watch_is_kept(before, now) && compare_exchange64(&header->watches[place], before, promise)) {
                kept->promise = promise;
                kept->place = place;
                return SYNC_SLICE_NS;
            }
        }
        /* then look again: a keeper that left meanwhile sees this, or we see that it left */
        store_relaxed64(&header->long_until_ns, (uint64_t)(now + SYNC_LONG_NS));
        fence_full();
    }
    return SYNC_LONG_NS;
}

/* Wake a sleeper that may take the other watch, if it lapsed and there may be such a sleeper. */
SYNC_SLOW void watch_hand_on(shmring_header *header, const watch_kept *kept, int64_t now)
{
    fence_full();
    if ((int64_t)load_relaxed64(&header->long_until_ns) > now
        && !watch_is_kept(load_relaxed64(&header->watches[1 - kept->place]), now))
        wait_wake_to_look(&header->data_wait);
}

SYNC_SLOW void watch_leave(shmring_header *header, watch_kept *kept)
{
    if (kept->promise != 0) {
        compare_exchange64(&header->watches[kept->place], kept->promise, 0);
        kept->promise = 0;
        watch_hand_on(header, kept, monotonic_ns());
    }
}

#endif
