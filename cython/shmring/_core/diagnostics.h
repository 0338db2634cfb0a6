/* Who waits, and who died holding what: written for those who look.
 *
 * Nothing is ever decided by these records, so whatever stands in them, put
 * there by a kill between two stores or by a forger, can only be shown.  They
 * are written where somebody goes to sleep or clears up after the dead, never
 * where a message passes; the one store that every lock costs is the name of
 * its holder, because the kernel erases it from the lock word when he dies.
 */
#ifndef SHMRING_WITNESS_H
#define SHMRING_WITNESS_H

#include "layout.h"
#include "owner.h"
#include "sync.h"

/* What somebody called. */
enum { CALL_GET = 1, CALL_PEEK, CALL_PUT, CALL_RESERVE, CALL_JOIN, CALL_WAIT, CALL_AIO };

/* Why it has not returned. */
enum { FOR_MESSAGE = 1, FOR_ROOM, FOR_LOCK, FOR_LEASE, FOR_RESERVATION, FOR_TASKS };

/* What somebody held. */
enum { HELD_PRODUCER_LOCK, HELD_CONSUMER_LOCK, HELD_RESERVATION, HELD_LEASE };

/* One wait of one thread on one ring: on its stack. */
typedef struct {
    uint32_t call;
    int turn; /* how many slices it has waited */
    int slot; /* its record plus 1, or 0 */
} witness_wait;

#define WITNESS_ASKS 8u /* slices */

/* Shows why the calling thread waits from now on; the first time since when. */
SYNC_SLOW void witness_enter(shmring_header *header, witness_wait *wait, uint64_t owner, uint32_t reason)
{
    if (wait->slot == 0) {
        uint32_t thread = sync_current()->tid;
        for (uint32_t i = 0; i < SHMRING_WAITER_COUNT; i++) {
            uint32_t slot = (thread + i) % SHMRING_WAITER_COUNT;
            shmring_waiter *waiter = &header->waiters[slot];
            if (load_relaxed64(&waiter->owner) != 0 || !compare_exchange64(&waiter->owner, 0, owner))
                continue;
            store_relaxed32(&waiter->thread, thread);
            store_relaxed32(&waiter->call, wait->call);
            store_relaxed32(&waiter->reason, reason);
            store_release64(&waiter->since_ns, (uint64_t)monotonic_ns());
            wait->slot = (int)slot + 1;
            return;
        }
        /* Full: of the dead, or of more who wait than can be shown.  To ask who lives takes system
         * calls: one in so many slices, so that a crowd that is woken now and then makes none. */
        uint32_t turn = (uint32_t)wait->turn, asked = turn / WITNESS_ASKS;
        if (turn % WITNESS_ASKS == WITNESS_ASKS - 1) {
            shmring_waiter *other = &header->waiters[(thread + asked) % SHMRING_WAITER_COUNT];
            uint64_t before = load_relaxed64(&other->owner);
            if (before != 0 && owner_is_dead(before))
                compare_exchange64(&other->owner, before, 0);
        }
        return;
    }
    store_relaxed32(&header->waiters[wait->slot - 1].reason, reason);
}

static inline void witness_leave(shmring_header *header, witness_wait *wait, uint64_t owner)
{
    if (wait->slot != 0) {
        shmring_waiter *waiter = &header->waiters[wait->slot - 1];
        store_relaxed64(&waiter->since_ns, 0);
        compare_exchange64(&waiter->owner, owner, 0); /* fails in a child forked meanwhile */
        wait->slot = 0;
    }
}

/* Under the lock that was recovered, or that clears the way. */
SYNC_SLOW void witness_death(shmring_header *header, int held, uint32_t pid)
{
    shmring_death *death = &header->deaths[held];
    store_release64(&death->when_ns, 0);
    store_release64(&death->pid, pid);
    store_release64(&death->when_ns, (uint64_t)monotonic_ns());
}

/* The holder of a lock shows his pid beside it.  Killed between the lock and
 * the pid, on either side, he dies unnamed; never is another one named. */
static inline void witness_hold(uint32_t *word) { store_relaxed32(word + 1, sync_pid()); }
static inline void witness_release(uint32_t *word) { store_relaxed32(word + 1, 0); }
static inline uint32_t witness_holder(const uint32_t *word) { return load_relaxed32(word + 1); }

#endif
