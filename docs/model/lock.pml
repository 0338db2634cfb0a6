/* Does every living process get the lock, one at a time, whichever is killed where?
 *
 *      word:  [ WAITERS | OWNER_DIED | tid ]         pending: one field a thread
 *
 *      lock_try   pending = word;  CAS 0 -> tid                    else slow
 *      slow       load; an owner? pending = 0, BUSY                else CAS, keep WAITERS
 *      lock_wait  pending = word;  slow;  CAS set WAITERS;  futex_wait a slice at most;  again
 *      release    exchange 0;  WAITERS: futex_wake 1;  pending = 0
 *      death      the kernel: pending and the word is mine: OWNER_DIED, wake 1
 *                             pending and the word is 0:    wake 1
 *
 * A slice ends by itself when no other process can move (`timeout`), and EARLY times at any moment;
 * the first kind is counted.  Without a kill none may be needed; each kill may cost one.
 *
 * Model                   code (sync.h)
 * try, slow, wait, sleep  lock_try, lock_try_slow, lock_wait, futex_wait
 * release                 lock_release
 * died                    the kernel: exit_robust_list, handle_futex_death
 * dirty                   what the owner has half done; the one that finds it has to be told (LOCK_TAKEN_FROM_DEAD)
 */
#ifndef PROCESSES
#define PROCESSES 3
#endif
#ifndef ROUNDS
#define ROUNDS 2
#endif
#ifndef EARLY
#define EARLY 0
#endif
#define WAITERS    64
#define OWNER_DIED 128
#define OWNER(w)   ((w) & 63)

byte word;
bool pending[PROCESSES + 1], asleep[PROCESSES + 1], gone[PROCESSES + 1], dirty;
byte crashes = CRASHES, early = EARLY, slices, inside;

#define DEATH  atomic { crashes > 0 -> crashes--; goto died }
#define STEP(...)  if :: d_step { __VA_ARGS__ } :: DEATH fi

inline wake_one()               /* any sleeper: the order of the kernel's queue is not relied on */
{
    if
    :: asleep[1] -> asleep[1] = false
    :: asleep[2] -> asleep[2] = false
#if PROCESSES > 2
    :: asleep[3] -> asleep[3] = false
#endif
    :: else
    fi
}

#ifdef LOCK_NOT_ROBUST
#define set_pending()  skip
#else
#define set_pending()  STEP(pending[me] = true)
#endif

proctype process(byte me)
{
    byte round, seen, passed_on;
    bool from_dead;
    do
    :: round < ROUNDS ->
again:                                                  /* lock_producers and the like: lock_try, */
        passed_on = 0;
#ifndef PENDING_AFTER_TAKING
        set_pending();
#endif
        if
        :: atomic { word == 0 -> word = me; goto taken }
        :: atomic { word != 0 -> goto slow }
        :: DEATH
        fi;
wait:                                                   /* then lock_wait, */
#ifndef PENDING_AFTER_TAKING
        set_pending();
#endif
slow:                                                   /* both by lock_try_slow */
        STEP(seen = word);
        if
        :: OWNER(seen) == 0 ->
            if
            :: atomic {
                word == seen ->
                word = me | (seen & WAITERS) | passed_on;
                from_dead = (seen & OWNER_DIED) != 0;
                goto taken }
            :: atomic { word != seen -> goto slow }
            :: DEATH
            fi
        :: else -> STEP(pending[me] = false)            /* BUSY */
        fi;
        STEP(seen = word);                              /* 20 turns of spinning are turns like others */
        if
        :: OWNER(seen) == 0 -> goto wait
#ifdef STEAL_AFTER_A_SLICE
        :: OWNER(seen) != 0 && early > 0 -> early--; word = me; goto taken
#endif
        :: else
        fi;
        if
        :: (seen & WAITERS) == 0 ->
            if
            :: atomic { word == seen -> word = seen | WAITERS }
            :: atomic { word != seen -> goto wait }
            :: DEATH
            fi
        :: else
        fi;
#ifndef WAITERS_NOT_PASSED_ON
        passed_on = WAITERS;
#endif
        STEP(asleep[me] = (word == (seen | WAITERS)));  /* futex_wait compares and sleeps in one */
        if
        :: !asleep[me] -> goto wait
        :: atomic { asleep[me] && early > 0 -> early--; asleep[me] = false }
#ifndef UNBOUNDED
        :: atomic {
            timeout ->
            slices++;
            assert(slices <= CRASHES - crashes);
            asleep[me] = false }
#endif
        fi;
        STEP(seen = word);                              /* the slice has ended; does the owner exist? */
        if
        :: gone[OWNER(seen)] ->
#ifndef GARBAGE_AT_THE_FIRST_LOOK
            STEP(assert(word != seen))                  /* else LOCK_GARBAGE, of which there is none here */
#else
            assert(false)
#endif
        :: else
        fi;
        goto again;                                     /* BUSY: the caller comes again */
taken:
#ifdef PENDING_AFTER_TAKING
        set_pending();
#endif
        atomic {
            seen = 0;
            inside++;
            assert(inside == 1);                        /* one at a time */
            assert(from_dead || !dirty);
            from_dead = false };
        STEP(dirty = true);                             /* recovery, if from_dead, then the work */
        STEP(dirty = false);
        round++;
        STEP(inside--; seen = word; word = 0);          /* lock_release: the exchange, */
#ifdef PENDING_CLEARED_BEFORE_THE_WAKE
        STEP(pending[me] = false);
#endif
        if
        :: seen & WAITERS -> if :: atomic { true -> wake_one() } :: DEATH fi     /* the wake, */
        :: else
        fi;
        STEP(pending[me] = false; seen = 0)             /* and then this */
    :: else -> break
    od;
    goto ended;
died:
    atomic {                                            /* the kernel: first the word, */
        if
        :: pending[me] && OWNER(word) == me -> seen = word; word = (word & WAITERS) | OWNER_DIED; inside--
        :: pending[me] && word == 0 -> seen = WAITERS
        :: else -> seen = 0
        fi;
        pending[me] = false };
    atomic { if :: seen & WAITERS -> wake_one() :: else fi };       /* then the wake, */
ended:
    gone[me] = true                                     /* and at last the TID goes */
}

init
{
    atomic {
        run process(1);
        run process(2);
#if PROCESSES > 2
        run process(3)
#endif
    }
}
