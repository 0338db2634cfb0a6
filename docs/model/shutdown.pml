/* After a shutdown: is everything that was put taken, and does nothing move after the immediate one?
 *
 *   put: under plock, not when shut down          shutdown: under plock 1 (drain);
 *   get: under clock, not when 2;                            under clock 2 (immediate)
 *        `shutdown`, THEN write_position;
 *        nothing there, and it was not 0: ShutDown
 *
 * The other way round a put and a shutdown fit in between: ShutDown, and a message is left.
 *
 * Model               code
 * producer            put_locked
 * consumer            front, look_further: known is known_limit
 * closer              _shutdown, refuse (handle.pyx)
 */
#include "robust.inc"

#define MESSAGES 2              /* of each of two producers */

byte plock, clock, wpos, rpos, shut;
bool told;                      /* a process got ShutDown: not in the code, */
byte frozen = 255;              /* nor this: what was put and taken when 2 was stored */

proctype producer()
{
    byte n;
    bool dead, refused;
    do
    :: n < MESSAGES ->
        LOCK(plock);
        dead = false;
        STEP(refused = (shut != 0));
        if
        :: refused -> UNLOCK(plock); break
        :: !refused ->
            STEP(assert(!told && frozen == 255); wpos++);
            UNLOCK(plock);
            n++
        fi
    :: n == MESSAGES -> break
    od;
    goto ended;
died:
    atomic { kernel_releases(plock) };
ended:
    skip
}

proctype consumer()
{
    byte known, seen;
    bool dead;
    do
    :: rpos != wpos || shut != 0 ->
        LOCK(clock);
        dead = false;
        STEP(seen = shut);
        if
        :: seen == 2 -> UNLOCK(clock); break
        :: seen != 2 ->
            if
            :: rpos >= known ->
                STEP(known = wpos);
#ifdef SHUTDOWN_AFTER_POSITION
                STEP(seen = shut);
#endif
                if
                :: rpos >= known && seen != 0 ->
                    STEP(told = true; assert(rpos == wpos));    /* nothing is left, and nothing will come */
                    UNLOCK(clock);
                    break
                :: rpos >= known && seen == 0 -> UNLOCK(clock)
                :: rpos < known
                fi
            :: rpos < known
            fi;
            if
            :: rpos < known ->
                STEP(assert(frozen == 255 || rpos < frozen); rpos++);
                UNLOCK(clock)
            :: rpos >= known
            fi
        fi;
        seen = 0
    od;
    goto ended;
died:
    atomic { kernel_releases(clock) };
ended:
    skip
}

proctype closer(bool immediate)
{
    bool dead;
again:
    LOCK(plock);
    dead = false;
    STEP(if :: shut < 1 -> shut = 1 :: else fi);
    UNLOCK(plock);
    if
    :: immediate ->
        LOCK(clock);
        dead = false;
        STEP(shut = 2; frozen = rpos);
        UNLOCK(clock)
    :: !immediate
    fi;
    goto ended;
died:
    atomic { kernel_releases(plock); kernel_releases(clock) };
    goto again;                 /* another process does it */
ended:
    skip
}

init
{
    atomic { run producer(); run producer(); run consumer(); run consumer(); run closer(IMMEDIATE) }
}
