/* Are messages written and read in place whole, and is what a dead process held given up?
 *
 *   reserve                                   peek
 *   plock: frame, state RESERVED, owner;      clock: lease_low, lease_high, LEASE_OWNER
 *          WRITE_POSITION                     the view is read, with no lock held
 *   the view is written, with no lock held    clock: still mine? READ_POSITION, or not;
 *   CAS the state to WHOLE or ABORTED                lease_owner = 0
 *
 *   the process that meets it waits; is the owner dead, then under clock, looked at anew:
 *   CAS the state to ABORTED                  lease_owner = 0
 *
 * Model               code (ring.pyx)
 * producer            put_locked (whole, or with an owner), finish_reservation
 * consumer            take (to have it, or with a leaser), front (skips what was aborted), finish_lease
 * clear_the_way       clear_the_way; dead_process is what owner_is_dead (owner.h) proves
 * recover_consumers   recover_consumers: a lease that was consumed is dropped
 *
 * Of an exception inside the block: ABORTED, and a peek that leaves the message.
 */
#include "robust.inc"

#ifndef MESSAGES
#define MESSAGES 2              /* of the first producer; the second one has one */
#endif
#define CAPACITY 2
#define RESERVED 1
#define WHOLE    2
#define ABORTED  3
#define EMPTY    4

byte plock, clock, wpos, rpos;
byte state[CAPACITY], owner[CAPACITY], first[CAPACITY], second[CAPACITY];
byte lease_owner, lease_low, lease_high;
bool dead_process[6];           /* by name: me */
byte producers = 2, consumers = 2;

#define NAME(p, n)  ((p) * MESSAGES + (n))
byte fate[2 * MESSAGES];        /* not in the code: 1 published, 2 taken */

proctype producer(byte p; byte messages)
{
    byte n, i;
    bool dead;
    do
    :: n < messages ->
        LOCK(plock);
        dead = false;
        i = wpos % CAPACITY;
        if
        :: wpos - rpos >= CAPACITY ->
            i = 0;
            UNLOCK(plock);
            if
            :: wpos - rpos < CAPACITY
            :: consumers == 0 -> break
            fi
        :: else ->
            if
            :: STEP(state[i] = WHOLE; owner[i] = 0);
               STEP(first[i] = NAME(p, n));
               STEP(second[i] = NAME(p, n));
               STEP(wpos++; fate[NAME(p, n)] = 1);
               UNLOCK(plock)
            :: STEP(state[i] = RESERVED; owner[i] = me);
               STEP(wpos++);
               UNLOCK(plock);
               STEP(first[i] = NAME(p, n));
#ifdef PUBLISHED_BEFORE_THE_PAYLOAD
               STEP(assert(state[i] == RESERVED); state[i] = WHOLE; fate[NAME(p, n)] = 1);
               STEP(second[i] = NAME(p, n))
#else
               STEP(second[i] = NAME(p, n));
               if
               :: STEP(assert(state[i] == RESERVED); state[i] = WHOLE; fate[NAME(p, n)] = 1)
               :: STEP(assert(state[i] == RESERVED); state[i] = ABORTED)
               fi
#endif
            fi;
            i = 0;
            n++
        fi
    :: n == messages -> break
    od;
    producers--;
    goto ended;
died:
    atomic { kernel_releases(plock); dead_process[me] = true; producers-- };
ended:
    skip
}

inline recover_consumers()
{
    if
    :: dead -> STEP(if :: lease_owner != 0 && lease_high <= rpos -> lease_owner = 0 :: else fi; dead = false)
    :: !dead
    fi
}

inline commit_read()
{
    STEP(
        assert(one == other);                           /* whole */
        assert(fate[one] == 1);                         /* published, and not taken yet */
        assert(one % MESSAGES == 0 || fate[one - 1] != 1);      /* in order */
        fate[one] = 2;
        rpos++)
}

/* The state of the frame in front, loaded once; EMPTY if there is none. */
inline front()
{
    do
    :: true ->
        STEP(found = (rpos == wpos -> EMPTY : state[rpos % CAPACITY]));
        if
        :: found == ABORTED -> STEP(rpos++)
        :: found != ABORTED -> break
        fi
    od;
    skip
}

/* The frame in front, and its holder; by `pos` and `holder` is it known again. */
inline clear_the_way()
{
    if
#ifdef DEATH_NOT_PROVEN
    :: true
#else
    :: dead_process[holder]
#endif
    :: leased && (lease_owner != holder || lease_low != pos)
    :: !leased && (rpos != pos || state[pos % CAPACITY] != RESERVED)
    fi;
    LOCK(clock);
    recover_consumers();
    if
    :: leased ->
        STEP(
            if
#ifdef CLEARED_UNSEEN
            :: true -> lease_owner = 0
#else
            :: lease_owner == holder && lease_low == pos && dead_process[holder] -> lease_owner = 0
            :: else
#endif
            fi)
    :: !leased && lease_owner == 0 ->
        front();
        STEP(
            if
            :: found == RESERVED && rpos == pos && owner[pos % CAPACITY] == holder
               && state[pos % CAPACITY] == RESERVED -> state[pos % CAPACITY] = ABORTED
            :: else
            fi;
            found = 0)
    :: else
    fi;
    UNLOCK(clock)
}

proctype consumer()
{
    byte one, other, pos, holder, found;
    bool dead, leased;
    do
    :: rpos != wpos ->
        LOCK(clock);
        recover_consumers();
#ifdef LEASE_NOT_LOOKED_AT
        holder = 0;
#else
        holder = lease_owner;
        pos = lease_low;
#endif
        if
        :: holder != 0 ->                               /* BEHIND_LEASE */
            UNLOCK(clock);
            leased = true;
            clear_the_way();
            leased = false
        :: else ->
            front();
            pos = rpos;
            if
            :: found == EMPTY -> UNLOCK(clock)
            :: found == RESERVED ->
                holder = owner[rpos % CAPACITY];        /* BEHIND_RESERVATION */
                UNLOCK(clock);
                clear_the_way()
            :: found == WHOLE ->                        /* take */
                STEP(one = first[rpos % CAPACITY]);
                STEP(other = second[rpos % CAPACITY]);
                commit_read();
                UNLOCK(clock)
            :: found == WHOLE ->                        /* peek */
                STEP(lease_low = pos);
                STEP(lease_high = pos + 1);
                STEP(lease_owner = me);
                UNLOCK(clock);
                STEP(one = first[pos % CAPACITY]);
                STEP(other = second[pos % CAPACITY]);
                LOCK(clock);
                recover_consumers();
                assert(lease_owner == me && lease_low == pos && rpos == pos);   /* else CHANGED */
                if
                :: commit_read()
                :: assert(one == other)                 /* left for another */
                fi;
                STEP(lease_owner = 0);
                UNLOCK(clock)
            fi
        fi;
        d_step { one = 0; other = 0; pos = 0; holder = 0; found = 0 }
    :: rpos == wpos && producers == 0 -> break
    od;
    consumers--;
    goto ended;
died:
    atomic { kernel_releases(clock); dead_process[me] = true; consumers-- };
ended:
    skip
}

init
{
    byte i;
    atomic { run producer(0, MESSAGES); run producer(1, 1); run consumer(); run consumer() };
    _nr_pr == 1;
    d_step {
        do
        :: i < 2 * MESSAGES -> assert(fate[i] != 1 || consumers == 0); i++
        :: else -> break
        od
    }
}
