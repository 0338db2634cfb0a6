/* Is no wake-up of a consumer lost?
 *
 *   put                                       get
 *   lock; WRITE_POSITION; unlock              nothing there
 *   -- fence --                               announce: SLEEPING
 *   the word: SLEEPING and not WOKEN?         -- fence --
 *   CAS sequence + 1, WOKEN; wake one         look: take; else sleep on the value announced
 *   no waiter woke? CAS both off; wake all       clear WOKEN, then look again
 *                                             baton: took one, something is left: as put does
 *
 * Without kills no sleep may have to end by itself (`timeout`): a lost wake-up is then a deadlock
 * when UNBOUNDED, and a slice too many otherwise.  Each kill may cost every sleeper one slice.
 *
 * A store buffer: what a producer stored (the position, and then the lock word) reaches the
 * memory later, in order, whenever memory() likes; a fence waits until it has.
 *
 * Model                 code
 * producer              put_items, wake_consumers (ring.pyx); fence_after_unlock (sync.h)
 * consumer              take_or_wait, take_slice (handle.pyx), as spin-free as possible
 * take                  take (ring.pyx): under the lock, then pass_baton
 * baton                 pass_baton
 * leaving early         take_or_wait: time-out or signal, then pass_baton
 * looker                wait_rings and leave (wait.pyx): takes nothing, passes the baton on leaving
 * handing_on            wait_wake_to_look (sync.h), as watch_hand_on (watch.h) uses it
 * closer                _shutdown: wake_all, after which every get ends that finds nothing
 * recovery              recover_producers, recover_consumers: wake_all
 */
#ifndef EARLY
#define EARLY 0                 /* so many gets end early, by a time-out or a signal */
#endif
#ifndef LOOKERS
#define LOOKERS 0
#endif
#ifndef CLOSERS
#define CLOSERS 0
#endif
#ifndef PUTS                    /* of the first producer; the second one puts PUTS_TOO */
#define PUTS     2
#define PUTS_TOO 1
#endif
#define PRODUCERS 2
#ifndef CONSUMERS
#define CONSUMERS 2             /* that take one each, the first one what is left */
#endif
#define SLEEPERS  (CONSUMERS + LOOKERS)
#include "robust.inc"
#include "wait.inc"

byte plock, clock;
byte wpos, rpos;
bool shut;
byte buffer[PRODUCERS];         /* of stores: 0 empty, 1 the position, 2 the position and the lock word */

inline drain(p)
{
    if
    :: buffer[p] > 0 -> wpos++
    :: else
    fi;
    if
    :: buffer[p] == 2 -> plock = FREE
    :: else
    fi;
    buffer[p] = 0
}

active proctype memory()
{
end:do
    :: d_step { buffer[0] > 0 -> drain(0) }
    :: d_step { buffer[1] > 0 -> drain(1) }
    od
}

inline recover()
{
    if
    :: dead -> wake_all(); dead = false
    :: !dead
    fi
}

proctype producer(byte p; byte puts)
{
    byte seen;
    bool dead, woke;
    do
    :: puts > 0 ->
        LOCK(plock);
        recover();
        STEP(buffer[p] = 1);
#ifdef NO_FENCE
        STEP(if :: buffer[p] == 1 -> buffer[p] = 2 :: else -> plock = FREE fi; puts--);
#else
        STEP(drain(p); plock = FREE; puts--);      /* fence_after_unlock */
#endif
        wake_one()
    :: puts == 0 -> break
    od;
    goto ended;
died:
    atomic { drain(p); kernel_releases(plock) };        /* what was stored stays stored */
ended:
    skip
}

inline baton()
{
    STEP(woke = WANTS_WAKE(word));
    if
    :: woke ->
        STEP(seen = wpos);
        STEP(woke = (seen != rpos); seen = 0);
        if
        :: woke -> woke = false; wake_one()
        :: !woke
        fi
    :: !woke
    fi
}

inline take()
{
#if CRASHES
    LOCK(clock);
    recover();
    STEP(if :: rpos != wpos -> rpos++; took = true :: else -> leaving = (leaving || shut) fi);
    UNLOCK(clock);
#else                                           /* no process can tell the difference */
    d_step { if :: rpos != wpos -> rpos++; took = true :: else -> leaving = (leaving || shut) fi };
#endif
#ifndef NO_BATON
    if
    :: took -> baton()
    :: !took
    fi
#endif
}

inline announce()
{
    STEP(word = word | SLEEPING; announced = word)
}

inline clear_woken()
{
    STEP(word = word & (SEQUENCE | SLEEPING))
}

proctype consumer(byte c; byte wanted)
{
    byte seen, announced;
    bool dead, woke, took, leaving;
    do
    :: wanted > 0 ->
        take();
        do
        :: !took && !leaving ->                 /* take_slice */
            announce();
#ifndef NO_SECOND_LOOK
            take();
#endif
            if :: took || leaving -> break :: !took && !leaving fi;
#ifdef WOKEN_CLEARED_BEFORE_SLEEPING
            clear_woken();
            announced = announced & (SEQUENCE | SLEEPING);
#endif
            STEP(asleep[c] = (word == announced));      /* futex_wait compares and sleeps in one */
            if
            :: !asleep[c]
            :: atomic { early > 0 && asleep[c] -> early--; asleep[c] = false; leaving = true }
#ifndef UNBOUNDED
            :: atomic {
                timeout ->
                asleep[c] = false;
                if
                :: rpos != wpos || shut -> slices++; assert(slices <= (CRASHES - crashes) * SLEEPERS)
                :: else -> leaving = true               /* nothing will come any more */
                fi }
#endif
            fi;
#ifndef WOKEN_CLEARED_BEFORE_SLEEPING
            clear_woken();
#endif
            if
            :: take()
            :: atomic { early > 0 -> early--; leaving = true }  /* BUSY, and then a signal: has not looked */
            fi
        :: took || leaving -> break
        od;
        announced = 0;
        if
        :: took -> took = false; wanted--
        :: !took -> break
        fi;
        if
        :: leaving -> break
        :: !leaving
        fi
    :: wanted == 0 -> break
    od;
#ifndef NO_BATON_ON_LEAVING
    if
    :: leaving -> baton()
    :: !leaving
    fi;
#endif
    goto ended;
died:
    atomic { kernel_releases(clock) };
ended:
    skip
}

#if LOOKERS
proctype looker(byte c)
{
    byte seen, announced;
    bool dead, woke, ready;
    do
    :: !ready ->
        announce();
        LOCK(clock); recover(); ready = (rpos != wpos); UNLOCK(clock);
        if
        :: ready -> break
        :: !ready
        fi;
        STEP(asleep[c] = (word == announced));
end:    !asleep[c];
        clear_woken();
        LOCK(clock); recover(); ready = (rpos != wpos); UNLOCK(clock);
        if
#ifndef LOOKER_WITHOUT_BATON
        :: ready -> baton()
#endif
        :: !ready
        fi
    :: ready -> break
    od;
    goto ended;
died:
    atomic { kernel_releases(clock) };
ended:
    skip
}
#endif

#ifdef HANDS_ON
proctype handing_on()
{
    bool woke;
#ifdef HANDED_ON_WITH_WOKEN
    STEP(word = ((word & SEQUENCE) + NEXT) | (word & (SLEEPING | WOKEN)));
#else
    STEP(word = ((word & SEQUENCE) + NEXT) | (word & SLEEPING));
#endif
    FUTEX_WAKE_ONE;
died:
    skip
}
#endif

#if CLOSERS
proctype closer()
{
    bool woke;
    STEP(shut = true);
    wake_all();
died:
    skip
}
#endif

init
{
    atomic {
        run producer(0, PUTS);
        run producer(1, PUTS_TOO);
#if CLOSERS
        run closer();
        run consumer(0, 9);
        run consumer(1, 9);             /* until it is shut */
#else
        run consumer(0, PUTS + PUTS_TOO + 1 - CONSUMERS);
        run consumer(1, 1);
#endif
#if CONSUMERS > 2
        run consumer(2, 1);
#endif
#ifdef HANDS_ON
        run handing_on();
#endif
#if LOOKERS
        run looker(CONSUMERS)
#endif
    }
}
