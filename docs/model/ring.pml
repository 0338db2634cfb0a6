/* Are messages whole, in order, taken once, and counted, whichever process is killed where?
 *
 *   producer                            consumer
 *   lock plock                          lock clock
 *   room? (read_position)               something there? (write_position)
 *   frame, first half   +---+---+       copy first half
 *   frame, second half  | 3 | 2 |       copy second half
 *   put_count triple    +---+---+       get_count triple
 *   WRITE_POSITION      capacity 2      READ_POSITION
 *   unlock                              unlock
 *
 * Two halves stand for any payload: torn is what has two different ones.
 * Sleeping is the question of wake.pml: here a process that finds nothing waits for a change.
 *
 * Model               code (ring.pyx)
 * producer            put_items, put_locked; known is known_read; BATCH > 1: put_many
 * the room            make_room without growth (growth.pml)
 * COUNT_ON            count_on (count.h); counts_right() is what count_at answers
 * consumer            take, front, look_further (one area); known is known_limit; BATCH > 1: take_span
 * commit_read         take_leave, commit_read
 * recover             recover_producers, recover_consumers (claims: claim.pml, areas: growth.pml)
 */
#include "robust.inc"

#ifndef MESSAGES
#define MESSAGES 2              /* of the first producer; the second one has MESSAGES_TOO */
#endif
#ifndef MESSAGES_TOO
#define MESSAGES_TOO MESSAGES
#endif
#ifndef BATCH
#define BATCH 1                 /* messages under one lock and one commit, at most */
#endif
#define CAPACITY  2
#define CONSUMERS 2

byte plock, clock;
byte wpos, rpos;                /* write_position, read_position: a message is one step */
byte first[CAPACITY], second[CAPACITY];

typedef Count { byte previous, current, position };
Count puts, gets;               /* put_count, get_count */

byte producers = 2, consumers = CONSUMERS;      /* that live */
byte sent[2], got[2];                           /* committed, by producer: not in the code */

#define NAME(p, n)    ((p) * 16 + (n))
#define COUNTED(c, p) ((c.position == p) -> c.current : c.previous)

inline counts_right()
{
    assert(COUNTED(puts, wpos) == sent[0] + sent[1]);
    assert(COUNTED(gets, rpos) == got[0] + got[1])
}

inline COUNT_ON(count, side, following, by)
{
    value = COUNTED(count, side);
#ifdef COUNT_OUT_OF_ORDER
    STEP(count.position = following; counts_right());
    STEP(count.previous = value; counts_right());
#else
    STEP(count.previous = value; counts_right());
    STEP(count.position = following; counts_right());
#endif
    STEP(count.current = value + by; value = 0; counts_right())
}

inline recover()
{
    if
    :: dead -> STEP(assert(rpos <= wpos && wpos - rpos <= CAPACITY); dead = false)
    :: !dead
    fi
}

#define PUT(half)  STEP(half[(wpos + batch) % CAPACITY] = NAME(p, n + batch))

proctype producer(byte p; byte messages)
{
    byte n = 1, known, value, batch;
    bool dead;
    do
    :: n <= messages ->
        LOCK(plock);
        recover();
        if
        :: wpos - known >= CAPACITY -> STEP(known = rpos)
        :: else
        fi;
        do
        :: n + batch <= messages && wpos + batch - known < CAPACITY && batch < BATCH ->
            PUT(first);
#ifndef COMMIT_BEFORE_PAYLOAD
            PUT(second);
#endif
            batch++
        :: batch > 0 || wpos - known >= CAPACITY -> break
        od;
        if
        :: batch == 0 ->                                        /* FULL */
            UNLOCK(plock);
            if
            :: wpos - rpos < CAPACITY
            :: consumers == 0 -> break
            fi
        :: batch > 0 ->
#ifndef COUNT_AFTER_COMMIT
            COUNT_ON(puts, wpos, wpos + batch, batch);
#endif
#ifdef COMMIT_AFTER_UNLOCK
            UNLOCK(plock);
#endif
            STEP(
                wpos = wpos + batch;                            /* the commit */
                n = n + batch;
                sent[p] = n - 1;
                counts_right());
#ifdef COMMIT_BEFORE_PAYLOAD
            STEP(second[(wpos - 1) % CAPACITY] = NAME(p, n - 1));
#endif
#ifdef COUNT_AFTER_COMMIT
            COUNT_ON(puts, wpos - batch, wpos, batch);
#endif
            batch = 0;
#ifndef COMMIT_AFTER_UNLOCK
            UNLOCK(plock)
#endif
        fi
    :: n > messages -> break
    od;
    producers--;
    goto ended;
died:
    atomic { kernel_releases(plock); producers-- };
ended:
    skip
}

inline commit_read()
{
    COUNT_ON(gets, rpos, rpos + span, span);
    STEP(
        other = 0;
        do
        :: other < span ->
            one = copied[other];
            assert(got[one / 16] + 1 == one % 16);              /* once, and in order */
            got[one / 16] = one % 16;
            copied[other] = 0;
            other++
        :: else -> break
        od;
        one = 0; other = 0;
        rpos = rpos + span;                                     /* the commit */
        counts_right())
}

proctype consumer()
{
    byte known, one, other, value, span, copied[BATCH];
    bool dead;
    do
    :: rpos != wpos ->
        LOCK(clock);
        recover();
        if
        :: rpos >= known -> STEP(known = wpos)                  /* look_further */
        :: else
        fi;
        do
        :: rpos + span < known && span < BATCH ->
            STEP(one = first[(rpos + span) % CAPACITY]);
#ifndef COPY_AFTER_COMMIT
            STEP(other = second[(rpos + span) % CAPACITY]);
            assert(one == other);                               /* whole */
#endif
            d_step { copied[span] = one; one = 0; other = 0; span++ }
        :: span > 0 || rpos >= known -> break
        od;
        if
        :: span > 0 ->
#ifdef COPY_AFTER_COMMIT
            value = copied[0];
            commit_read();
            STEP(assert(second[(rpos - 1) % CAPACITY] == NAME(0, got[0]) || second[(rpos - 1) % CAPACITY] == NAME(1, got[1])));
#else
            commit_read();
#endif
            span = 0
        :: span == 0                                            /* EMPTY */
        fi;
        UNLOCK(clock)
    :: rpos == wpos && producers == 0 -> break
    od;
    consumers--;
    goto ended;
died:
    atomic { kernel_releases(clock); consumers-- };
ended:
    skip
}

init
{
    atomic { run producer(0, MESSAGES); run producer(1, MESSAGES_TOO); run consumer(); run consumer() };
    _nr_pr == 1;
    /* what a dead consumer had committed counts as taken */
    assert(consumers == 0 || (rpos == wpos && got[0] == sent[0] && got[1] == sent[1]))
}
