/* What does a producer that waits for room depend on?
 *
 *   get                                       put
 *   READ_POSITION; unlock                     no room
 *   -- fence --                               announce: SLEEPING
 *   the word: SLEEPING and not WOKEN?         -- fence --
 *   at most half full: wake one               look: put; else sleep on the value announced
 *                                             clear WOKEN, then look again; no baton
 *
 * As long as consumers go on and no producer gives up, no sleep has to end by itself.  A producer
 * that was woken and leaves without putting passes nothing on: the others may then sleep to the end
 * of their slice, on purpose (the next get wakes one anyway).  So each that leaves may cost one
 * slice, and each kill one slice of every sleeper: killed in wait_wake_one after SLEEPING was
 * cleared, and before waking all, a waker leaves them asleep with nothing that says so.
 *
 * Model               code
 * producer            put_or_wait, put_slice (handle.pyx), put_items, make_room
 * consumer            take, wake_producers (ring.pyx)
 * the store buffer    as in wake.pml, of the consumer
 * recovery            recover_producers, recover_consumers: wake_all
 *
 * Consumers do not sleep here: that is wake.pml.
 */
#ifndef EARLY
#define EARLY 0                 /* so many puts are given up: a time-out or a signal */
#endif
#ifndef CAPACITY
#define CAPACITY 2
#endif
#ifndef PUTS
#define PUTS 3                  /* of the first producer, which fills the ring; the second one puts PUTS_TOO */
#endif
#ifndef PUTS_TOO
#define PUTS_TOO 2
#endif
#define SLEEPERS 2
#include "robust.inc"
#include "wait.inc"

byte plock, clock, wpos, rpos;
byte producers = 2;
byte buffer;                    /* of the consumer: 0 empty, 1 read_position, 2 and the lock word */

inline drain()
{
    if
    :: buffer > 0 -> rpos++
    :: else
    fi;
    if
    :: buffer == 2 -> clock = FREE
    :: else
    fi;
    buffer = 0
}

active proctype memory()
{
end:do
    :: d_step { buffer > 0 -> drain() }
    od
}

inline recover()
{
    if
    :: dead -> wake_all(); dead = false
    :: !dead
    fi
}

inline put()
{
    LOCK(plock);
    recover();
    STEP(if :: wpos - rpos < CAPACITY -> wpos++; done = true :: else fi);
    UNLOCK(plock)
}

proctype producer(byte p; byte puts)
{
    byte seen, announced;
    bool dead, woke, done, leaving;
    do
    :: puts > 0 && !leaving ->
        put();
        do
        :: !done && !leaving ->                 /* put_slice */
            STEP(word = word | SLEEPING; announced = word);
#ifndef NO_SECOND_LOOK
            put();
#endif
            if :: done -> break :: !done fi;
            STEP(asleep[p] = (word == announced));
            if
            :: !asleep[p]
            :: atomic { early > 0 && asleep[p] -> early--; asleep[p] = false; leaving = true }
#ifndef UNBOUNDED
            :: atomic {
                timeout ->
                asleep[p] = false;
                slices++;
                assert(slices <= (CRASHES - crashes) * SLEEPERS + (EARLY - early)) }
#endif
            fi;
            STEP(word = word & (SEQUENCE | SLEEPING));
            if
            :: put()
            :: atomic { early > 0 -> early--; leaving = true }  /* BUSY, and then a signal: has not looked */
            fi
        :: done || leaving -> break
        od;
        announced = 0;
        if
        :: done -> done = false; puts--
        :: !done
        fi
    :: puts == 0 || leaving -> break
    od;
    producers--;
    goto ended;
died:
    atomic { kernel_releases(plock); producers-- };
ended:
    skip
}

proctype consumer()
{
    byte seen;
    bool dead, woke, some;
again:
    do
    :: rpos != wpos ->
        LOCK(clock);
        recover();
        STEP(some = (rpos != wpos));
        if
        :: some ->
            STEP(buffer = 1);
#ifdef NO_FENCE
            STEP(if :: buffer == 1 -> buffer = 2 :: else -> clock = FREE fi);
#else
            STEP(drain(); clock = FREE);        /* fence_after_unlock */
#endif
            some = false;
            STEP(seen = word);
            if
            :: WANTS_WAKE(seen) ->
                STEP(woke = (wpos - rpos <= CAPACITY / 2); seen = 0);
                if
                :: woke -> woke = false; wake_one()
                :: !woke
                fi
            :: !WANTS_WAKE(seen) -> seen = 0
            fi
        :: !some -> UNLOCK(clock)
        fi
    :: rpos == wpos && producers == 0 -> break
    od;
    goto ended;
died:
    atomic { drain(); kernel_releases(clock) };
    atomic { seen = 0; woke = false; dead = false; some = false; goto again };      /* another one goes on */
ended:
    skip
}

init
{
    atomic { run producer(0, PUTS); run producer(1, PUTS_TOO); run consumer() }
}
