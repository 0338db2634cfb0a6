/* Does a block hold what its message says, as long as a message or a view needs it, and come back?
 *
 *   sender                                 receiver
 *   free: CAS holder 0 -> me               lock clock; the message in front names a block
 *   or of a dead one: CAS dead -> me       its position is right; holder = me
 *   position = none; write the buffer      READ_POSITION; unlock
 *   lock plock; position = wpos            look at the view
 *   WRITE_POSITION; unlock                 position = none; HOLDER = 0
 *
 * Model               code
 * sender              Parcel.lend (bytes_ring.pyx), put_locked (ring.pyx)
 * take                block_take; reap and take: block_reap (block.h)
 * receiver            adopt_blocks (lending.pxd), take_leave (ring.pyx), block_return (block.h)
 * recover             recover_producers: block_recover
 *
 * Memory that comes and goes, and fork, are not here: a block's memory is dropped only by the one
 * that holds it, under the producers' lock.
 */
#include "robust.inc"

#define BLOCKS   2
#define SENDERS  2
#define MESSAGES 3                      /* a sender puts two at most, and the queue takes so many */
#define NONE     255
#define PROCESSES 4

byte plock, clock, wpos, rpos;
byte frame[MESSAGES];                   /* the block that the message at a position names, */
byte value[MESSAGES];                   /* and what was written there */

byte holder[BLOCKS], position[BLOCKS] = NONE, data[BLOCKS];
bool gone[PROCESSES + 2];               /* by owner word: proven dead */

byte views[BLOCKS];                     /* not in the code: of living receivers */

#define named(b)  ((rpos < wpos && frame[rpos] == b) || (rpos + 1 < wpos && frame[rpos + 1] == b) \
                   || (rpos + 2 < wpos && frame[rpos + 2] == b))

#define CLEAR(b)  if :: position[b] != NONE && position[b] >= wpos -> position[b] = NONE :: else fi

inline recover()
{
    if
    :: dead -> STEP(CLEAR(0)); STEP(CLEAR(1)); dead = false
    :: !dead
    fi
}

#ifdef POSITION_IGNORED
#define IS_LEFT(p)  true
#else
#define IS_LEFT(p)  (p == NONE || p < rpos)
#endif

/* Free block b if its holder is dead: two loads, and a compare-and-exchange. */
inline reap(b)
{
    STEP(was = holder[b]);
#ifdef POSITION_BEFORE_THE_PROOF
    STEP(left = IS_LEFT(position[b]));
#endif
    if
    :: was != 0 && gone[was] ->
#ifndef POSITION_BEFORE_THE_PROOF
        STEP(left = IS_LEFT(position[b]));
#endif
        if
        :: left ->
            STEP(if :: holder[b] == was -> holder[b] = me; mine = b :: else fi);
            if
            :: mine == b -> STEP(position[b] = NONE); STEP(holder[b] = 0); mine = NONE
            :: else
            fi
        :: else
        fi
    :: else
    fi;
    was = 0;
    left = false
}

proctype sender()
{
    byte mine = NONE, was, puts;
    bool dead, left;
    do
    :: puts < 2 && wpos < MESSAGES ->
        reap(0);
        reap(1);
        STEP(
            if
            :: holder[0] == 0 -> holder[0] = me; mine = 0
            :: holder[0] != 0 && holder[1] == 0 -> holder[1] = me; mine = 1
            :: else
            fi);
        if
        :: mine == NONE -> break                        /* none: the buffer is copied */
        :: else
        fi;
        STEP(position[mine] = NONE);
        STEP(
            assert(views[mine] == 0 && !named(mine));   /* not lent anew, nor in a message */
            data[mine] = 10 * me + puts);
        LOCK(plock);
        recover();
        if
        :: wpos < MESSAGES ->
            STEP(frame[wpos] = mine; value[wpos] = 10 * me + puts);
            STEP(position[mine] = wpos);
            STEP(wpos++);
            mine = NONE;
            puts++
        :: else
        fi;
        UNLOCK(plock);
        if
        :: mine != NONE -> STEP(holder[mine] = 0); mine = NONE      /* Full */
        :: else
        fi
    :: puts == 2 || wpos == MESSAGES -> break
    od;
    goto ended;
died:
    atomic {
        kernel_releases(plock);
        mine = NONE; was = 0; left = false; dead = false;
        gone[me] = true };
ended:
    skip
}

proctype receiver()
{
    byte b = NONE, expected;
    bool dead;
    do
    :: rpos < wpos ->
        LOCK(clock);
        dead = false;
        if
        :: rpos < wpos ->
            STEP(b = frame[rpos]; expected = value[rpos]);
            assert(position[b] == rpos);                /* else RingCorrupted */
#ifndef HOLDER_AFTER_COMMIT
            STEP(holder[b] = me);
#endif
            STEP(rpos++; views[b]++);
#ifdef HOLDER_AFTER_COMMIT
            STEP(holder[b] = me);
#endif
            UNLOCK(clock);
            assert(data[b] == expected);
#ifdef HOLDER_FIRST
            STEP(views[b]--; holder[b] = 0);
            STEP(position[b] = NONE);
#else
            STEP(views[b]--; position[b] = NONE);
            STEP(holder[b] = 0);
#endif
            b = NONE
        :: else -> UNLOCK(clock)
        fi
    :: timeout -> break
    od;
    goto ended;
died:
    atomic {
        kernel_releases(clock);
        if
        :: b != NONE && views[b] > 0 && holder[b] == me -> views[b]--
        :: else
        fi;
        b = NONE; dead = false;
        gone[me] = true };
ended:
    skip
}

/* When all is quiet: what is not in a message can be had again. */
proctype judge()
{
    byte b;
    timeout;
    plock == FREE || plock == DIED;
    d_step {
        if
        :: plock == DIED -> CLEAR(0); CLEAR(1)
        :: else
        fi;
        b = 0;
        do
        :: b < BLOCKS ->
            assert(holder[b] == 0 || named(b) || (gone[holder[b]] && (position[b] == NONE || position[b] < rpos)));
            b++
        :: else -> break
        od }
}

init
{
    atomic { run sender(); run sender(); run receiver(); run receiver(); run judge() }
}
