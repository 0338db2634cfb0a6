/* Is a task put back exactly if it was claimed and not answered, and does each get its one answer?
 *
 *   coordinator                            worker
 *   put: its POSITION is noted             lock clock; own claim is empty
 *   take answers                           copy out; low = read_position; high = next
 *   a worker is proven dead:               READ_POSITION; unlock
 *     lock and unlock (recovers)           run the task
 *     read its claim                       ANSWER (a put that commits)
 *     take the answers that are there      low = high: the claim is released
 *     put back what is claimed, unanswered
 *     low = high; free the slot            claims:  | owner | low | high |  a slot a worker
 *
 * Model               code
 * worker              _claim_open, _claim_release (object_ring.pyx); Worker.run, _answer (worker.py)
 * take                take, take_leave (ring.pyx); the triple of counts: ring.pml
 * recover             recover_consumers: claims with high > read_position are cancelled
 * coordinator         _Run._hand_out, _take_in, _settle (coordinator.py)
 * settle              visit_locks, _claims, _claim_free (object_ring.pyx); Ledger.lost (ledger.py)
 * ANSWER              the commit of a put into the result queue
 *
 * Only the coordinator puts tasks, and does not die: of the two locks that visit_locks visits it
 * is the consumers' that claims are written under.
 */
#include "robust.inc"

#ifndef TASKS
#define TASKS   2
#endif
#define WORKERS 2
#define PLACES  (TASKS + CRASHES + 2)   /* each death puts one task back at most */

byte clock, wpos, rpos;
byte task[PLACES];                      /* the message at a position */

typedef Claim { bool owned; byte low, high };
Claim claim[WORKERS];

byte answers[TASKS];                    /* committed to the result queue, not taken yet */
bool answered[TASKS];                   /* the ledger */
byte at[TASKS];                         /* the ledger: at which position it was put */
bool ready[WORKERS], dead_worker[WORKERS], finished;

byte holder[TASKS];                     /* which living worker runs it: not in the code, */
bool committed[TASKS];                  /* nor this: its answer was */

#ifdef CLAIMS_NOT_CANCELLED
#define CANCEL(c)  skip
#else
#define CANCEL(c)  if :: claim[c].high > rpos -> claim[c].high = claim[c].low :: else fi
#endif

inline recover()
{
    if
    :: dead -> STEP(CANCEL(0)); STEP(CANCEL(1)); dead = false
    :: !dead
    fi
}

inline commit_read()
{
    STEP(
        assert(!committed[one] && holder[one] == 0);    /* never run again, nor by two at a time */
        holder[one] = w + 1;
        rpos++)
}

proctype worker(byte w)
{
    byte one = TASKS;
    bool dead;
start:
    STEP(claim[w].owned = true);                        /* _claim_open */
#ifdef OPENED_LOW_FIRST
    STEP(claim[w].low = 0);
    STEP(claim[w].high = 0);
#else
    STEP(claim[w].high = 0);
    STEP(claim[w].low = 0);
#endif
    do
    :: rpos != wpos && !finished ->
        LOCK(clock);
        recover();
        assert(claim[w].low >= claim[w].high);          /* else CLAIM_HELD */
        STEP(if :: rpos != wpos -> one = task[rpos] :: else fi);
        if
        :: one < TASKS ->
#ifdef CLAIM_AFTER_COMMIT
            commit_read();
            STEP(claim[w].low = rpos - 1);
            STEP(claim[w].high = rpos);
#else
            STEP(claim[w].low = rpos);
            STEP(claim[w].high = rpos + 1);
            commit_read();
#endif
            UNLOCK(clock);
#ifdef RELEASED_BEFORE_THE_ANSWER
            STEP(claim[w].low = claim[w].high);
#endif
            STEP(answers[one]++; committed[one] = true; holder[one] = 0);      /* ANSWER */
            STEP(claim[w].low = claim[w].high);
            one = TASKS
        :: one == TASKS -> UNLOCK(clock)
        fi
    :: finished -> break
    od;
    goto ended;
died:
    atomic {
        kernel_releases(clock);
        if
        :: one < TASKS && holder[one] == w + 1 -> holder[one] = 0
        :: else
        fi;
        one = TASKS;
        dead = false;
        dead_worker[w] = true };
    if
    :: atomic { ready[w] -> ready[w] = false; goto start }      /* another one, started in its place */
    :: finished
    fi;
ended:
    skip
}

inline put(t)
{
    assert(wpos < PLACES);
    task[wpos] = t;
    at[t] = wpos;
    wpos++
}

inline take_answers()
{
    t = 0;
    do
    :: t < TASKS && answers[t] > 0 ->
        assert(!answered[t]);
        answers[t]--;
        answered[t] = true
    :: t < TASKS && answers[t] == 0 -> t++
    :: else -> break
    od;
    t = 0
}

/* The coordinator is not killed: no STEP here. */
inline settle(w)
{
#ifndef LOCKS_NOT_VISITED
    LOCK(clock);
    if
    :: dead -> d_step { CANCEL(0) }; d_step { CANCEL(1) }; dead = false
    :: !dead
    fi;
    clock = FREE;
#endif
    d_step { low = claim[w].low; high = claim[w].high };
#ifndef ANSWERS_NOT_TAKEN
    d_step { take_answers() };
#endif
    d_step {
        t = 0;
        do
        :: t < TASKS ->
            if
            :: claim[w].owned && low < high && at[t] == low && !answered[t] ->
                assert(low < rpos && holder[t] == 0);   /* claimed, and by no living process, */
                assert(!committed[t]);                  /* and not answered */
                put(t);
                break
            :: else
            fi;
            t++
        :: else -> break
        od;
        t = 0; low = 0; high = 0;
        claim[w].low = claim[w].high };
    claim[w].owned = false;
    d_step { dead_worker[w] = false; ready[w] = true }
}

proctype coordinator()
{
    byte t, low, high;
    bool dead;
    d_step { put(0) };
    d_step { put(1) };
#if TASKS > 2
    d_step { put(2) };
#endif
    do
    :: d_step { answers[0] > 0 || answers[1] > 0 || answers[TASKS - 1] > 0 -> take_answers() }
    :: dead_worker[0] -> settle(0)
    :: dead_worker[1] -> settle(1)
#ifdef DEATH_NOT_PROVEN
    :: !dead_worker[0] && claim[0].owned && claim[0].low < claim[0].high -> settle(0)
#endif
    :: answered[0] && answered[1] && answered[TASKS - 1] -> break
    od;
    finished = true
}

init
{
    atomic { run coordinator(); run worker(0); run worker(1) }
}
