/* Is a count right that is read without the lock, whichever process is killed while storing it?
 *
 *   writer, under its lock                    reader, with no lock
 *   value = what count_at answers             stood = the side's position
 *   previous = value                          current
 *   position = where the side will stand      position: not where it stood? previous instead
 *   current  = value + by                     still there, and position as well: the answer
 *   THE SIDE'S POSITION: the commit           else again
 *
 * Messages have different sizes: one may be as long as two, so a dead writer's triple may name
 * the position that the next writer commits with another count.
 *
 * Model               code (count.h)
 * writer              count_at, count_on, and the commit after it
 * reader              count_read; as many turns as it takes
 */
#include "robust.inc"

#ifndef COMMITS
#define COMMITS 2               /* of each of two writers */
#endif

byte lock, side;                        /* the lock, and the position of this side */
byte previous, current, position;       /* the triple */
byte truth[4 * COMMITS + 1];            /* by position: what was counted there; not in the code */

proctype writer()
{
    byte n, value, span, by;
    bool dead;
    do
    :: n < COMMITS ->
        LOCK(lock);
        dead = false;
        value = (position == side -> current : previous);
        assert(value == truth[side]);
        if
        :: span = 1; by = 1
        :: span = 2; by = 1             /* one message as long as two */
        :: span = 2; by = 2
        fi;
#ifdef POSITION_BEFORE_PREVIOUS
        STEP(position = side + span);
        STEP(previous = value);
        STEP(current = value + by);
#elif defined(CURRENT_BEFORE_POSITION)
        STEP(previous = value);
        STEP(current = value + by);
        STEP(position = side + span);
#else
        STEP(previous = value);
        STEP(position = side + span);
        STEP(current = value + by);
#endif
        STEP(side = side + span; truth[side] = value + by);
        d_step { value = 0; span = 0; by = 0 };
        UNLOCK(lock);
        n++
    :: n == COMMITS -> break
    od;
    goto ended;
died:
    atomic { kernel_releases(lock) };
ended:
    skip
}

proctype reader()
{
    byte stood, value, at;
    bool agree;
    do
    :: !agree ->
        stood = side;
        value = current;
        at = position;
        if
        :: at != stood -> value = previous
        :: at == stood
        fi;
#ifdef NO_SECOND_LOOK
        agree = true
#else
        agree = (side == stood);
        agree = (agree && position == at)
#endif
    :: agree -> break
    od;
    assert(value == truth[stood])
}

init
{
    atomic { run writer(); run writer(); run reader() }
}
