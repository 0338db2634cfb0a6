/* Diagnostics only: records of waiters, lock owners and deaths.
 *
 * No decision depends on these records: a kill between two stores, or a forger,
 * can only spoil what is shown.  They are written before a sleep and at recovery,
 * never where a message passes.  The one store that every lock costs is the pid
 * of its owner, because the kernel erases the owner from the lock word at its death.
 */
#ifndef SHMRING_DIAGNOSTICS_H
#define SHMRING_DIAGNOSTICS_H

#include "layout.h"
#include "owner.h"
#include "sync.h"

/* The call. */
enum { CALL_GET = 1, CALL_PEEK, CALL_PUT, CALL_RESERVE, CALL_JOIN, CALL_WAIT, CALL_AIO };

/* Why it has not returned. */
enum { FOR_MESSAGE = 1, FOR_ROOM, FOR_LOCK, FOR_LEASE, FOR_RESERVATION, FOR_TASKS };

/* What was held. */
enum { HELD_PRODUCER_LOCK, HELD_CONSUMER_LOCK, HELD_RESERVATION, HELD_LEASE };

/* One wait of one thread on one ring: on its stack. */
typedef struct {
    uint32_t call;
    int turn; /* how many slices it has waited */
    int slot; /* its record plus 1, or 0 */
} waiter_wait;

#define DIAGNOSTICS_ASKS 8u /* slices */

/* Shows why the calling thread waits from now on; the first time since when. */
SYNC_SLOW void waiter_show(shmring_header *header, waiter_wait *wait, uint64_t owner, uint32_t reason)
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
        /* Full, of dead waiters or of more than can be shown.  A proof of death takes system calls:
         * one in so many slices, so that many waiters that are woken now and then make none. */
        uint32_t turn = (uint32_t)wait->turn, asked = turn / DIAGNOSTICS_ASKS;
        if (turn % DIAGNOSTICS_ASKS == DIAGNOSTICS_ASKS - 1) {
            shmring_waiter *other = &header->waiters[(thread + asked) % SHMRING_WAITER_COUNT];
            uint64_t before = load_relaxed64(&other->owner);
            if (before != 0 && owner_is_dead(before))
                compare_exchange64(&other->owner, before, 0);
        }
        return;
    }
    store_relaxed32(&header->waiters[wait->slot - 1].reason, reason);
}

static inline void waiter_hide(shmring_header *header, waiter_wait *wait, uint64_t owner)
{
    if (wait->slot != 0) {
        shmring_waiter *waiter = &header->waiters[wait->slot - 1];
        store_relaxed64(&waiter->since_ns, 0);
        compare_exchange64(&waiter->owner, owner, 0); /* fails in a child forked meanwhile */
        wait->slot = 0;
    }
}

/* Under the lock that was recovered, or that clears the way. */
SYNC_SLOW void death_record(shmring_header *header, int held, uint32_t pid)
{
    shmring_death *death = &header->deaths[held];
    store_release64(&death->when_ns, 0);
    store_release64(&death->pid, pid);
    store_release64(&death->when_ns, (uint64_t)monotonic_ns());
}

/* The pid of a lock's owner stands beside the lock word.  After a kill it may be
 * missing; it is never wrong. */
static inline void holder_show(uint32_t *word) { store_relaxed32(word + 1, sync_pid()); }
static inline void holder_hide(uint32_t *word) { store_relaxed32(word + 1, 0); }
static inline uint32_t holder_pid(const uint32_t *word) { return load_relaxed32(word + 1); }

/* Which process used a side last: stored where that costs little, so not at each message. */
static inline void user_show(uint32_t *word) { store_relaxed32(word, sync_pid()); }

#endif
