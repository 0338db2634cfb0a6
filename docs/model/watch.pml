/* Does a consumer look within a few slices, as long as one of those that sleep lives?
 *
 * Two consumers keep a watch: their sleep ends by itself (a slice).  The others' does not, here.
 *
 *   before a sleep             announce; keep the watch, or take a free one; else say that some sleep
 *                              for long, -- fence --, and look once more for a free one
 *   a keeper, each slice       the other watch is free: change the word, wake one
 *   a keeper that leaves       free its own watch, -- fence --, then the same
 *   death                      the watch of the dead lapses, some time later
 *
 * A message lies in the ring whose wake-up was lost.  When no process can move and it still lies
 * there, all the living sleep for long.  That takes a kill, and two consumers that died or left
 * since a keeper last came round: once it has, what was before is made good.
 *
 * Model            code (watch.h)
 * take_a_watch     watch_begin
 * hand_on          watch_hand_on, wait_wake_to_look (sync.h)
 * leave            watch_leave
 * unchanged        the sequence of data_wait, which does not come round to the same number
 */
#define SLEEPERS 3
#ifndef LEAVES
#define LEAVES 1                /* so many take a message of their own, and do not come back */
#endif

byte watch[2];                  /* 0 is free, else its keeper */
bool unchanged[SLEEPERS];       /* the word, since this one announced itself */
bool asleep[SLEEPERS], dead[SLEEPERS], some_sleep_long, message;
byte gone;                      /* a bit each: died or left, and no keeper has come round since */
byte crashes = CRASHES, leaves = LEAVES;

#define OTHER      watch[2 - place]
#define OTHER_IS_OF_THE_DEAD (OTHER == 0 -> false : dead[OTHER - 1])
#define ONE_AT_MOST (gone == 0 || gone == 1 || gone == 2 || gone == 4)
#define DEATH      atomic { crashes > 0 -> crashes--; goto died }
#define STEP(...)  if :: d_step { __VA_ARGS__ } :: DEATH fi

inline wake_one()
{
    if
    :: asleep[0] -> asleep[0] = false
    :: asleep[1] -> asleep[1] = false
    :: asleep[2] -> asleep[2] = false
    :: else
    fi
}

inline take_a_watch()
{
    STEP(if :: watch[0] == 0 -> watch[0] = c + 1; place = 1 :: else fi);
    if
    :: place == 0 -> STEP(if :: watch[1] == 0 -> watch[1] = c + 1; place = 2 :: else fi)
    :: else
    fi
}

inline hand_on()
{
    STEP(other_is_free = (some_sleep_long && OTHER == 0));
    if
    :: other_is_free ->
#ifndef WORD_NOT_CHANGED
        STEP(unchanged[0] = false; unchanged[1] = false; unchanged[2] = false);
#endif
        if :: atomic { true -> wake_one() } :: DEATH fi
    :: else
    fi;
    other_is_free = false
}

proctype consumer(byte c)
{
    byte place, gone_before;
    bool slept, other_is_free, found;
    do
    :: true ->
        STEP(unchanged[c] = true);
        STEP(found = message; message = false);
        if :: found -> break :: else fi;
        if
        :: place == 0 ->
            take_a_watch();
            if
            :: place == 0 ->
                STEP(some_sleep_long = true);
#ifndef NO_SECOND_LOOK
                take_a_watch()
#endif
            :: else
            fi
        :: else
        fi;
        if
        :: place != 0 && slept ->
            /* a promise of the dead is made good after it has lapsed */
            gone_before = (OTHER_IS_OF_THE_DEAD -> 0 : gone);
#ifndef NEVER_HANDED_ON
            hand_on();
#endif
            d_step { gone = gone & ~gone_before; gone_before = 0 }
        :: else
        fi;
        STEP(asleep[c] = unchanged[c]);
        if
        :: !asleep[c]
        :: atomic { asleep[c] && place != 0 -> asleep[c] = false; slept = true }
        :: atomic { asleep[c] && leaves > 0 -> leaves--; asleep[c] = false; found = true }
        :: atomic { timeout -> assert(!message || (crashes < CRASHES && !ONE_AT_MOST)); goto ended }
        :: DEATH
        fi;
        if :: found -> break :: else fi
    od;
    if
    :: place == 0 -> STEP(gone = gone | 1 << c)
    :: else ->
        STEP(gone = gone | 1 << c; watch[place - 1] = 0);
#ifndef LEFT_WITHOUT_HANDING_ON
        hand_on()
#endif
    fi;
    goto ended;
died:
    atomic { dead[c] = true; gone = gone | 1 << c };
ended:
    asleep[c] = false
}

active proctype promises()      /* of the dead lapse */
{
end:do
    :: d_step { watch[0] != 0 && dead[watch[0] - 1] -> watch[0] = 0 }
    :: d_step { watch[1] != 0 && dead[watch[1] - 1] -> watch[1] = 0 }
    od
}

active proctype producer()      /* is killed before it wakes any */
{
    message = true
}

init
{
    atomic {
        run consumer(0);
        run consumer(1);
        run consumer(2)
    }
}
