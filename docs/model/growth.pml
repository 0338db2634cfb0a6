/* Is no living area punched, none lost, and every page accounted for, while the ring grows?
 *
 *   generations   [reaped ........ rgen ........ wgen]     the living areas; others' pages are free
 *   areas            drained        read         written
 *   the file      | area 0 | hole | area 1 | ...           a page holds one message
 *
 *   grow (plock)                               move on (clock)
 *   place: the lowest hole, as of `reaped`     write_position, THEN write_generation
 *   fallocate; map                             rgen == last, or base[rgen + 1] ahead: stay
 *   the record; WRITE_GENERATION               map; READ_GENERATION; punch, THEN reaped + 1
 *
 * Model               code
 * put_locked          put_locked: known is known_read, generation the cached mapping's
 * make_room           make_room; how large the next area is to be is left open (area_next_capacity)
 * grow                area_grow, area_living, area_place (area.h); FAILS: mapping it failed
 * look_further        look_further; limit becomes known_limit
 * reap                area_reap
 * shares_none         area_overlaps: else EILSEQ, and the ring is poisoned
 * take                front, take, take_leave
 * tidy                area_tidy, by recover_producers; reap by recover_consumers
 * settle              settle: grow small when empty, then move on
 * attacher            open_areas (handle.pyx), which takes no lock; look_for_overlap is area_overlaps
 * ANY_MAPPING         take without asking whether its mapping is that of read_generation: no error
 *                     comes of it, since known_limit ends with the area; front asks all the same
 * init, at the end    the next process: recovers the locks; no page may then be unaccounted for
 */
#include "robust.inc"

#ifndef MESSAGES
#define MESSAGES 2              /* of each producer */
#endif
#ifndef PRODUCERS
#define PRODUCERS 2
#endif
#ifndef CONSUMERS
#define CONSUMERS 2
#endif
#ifndef GROWTHS
#define GROWTHS  2
#endif
#define LARGEST  2
#define PAGES    ((GROWTHS + 1) * LARGEST)
#define NO_PAGE  0
#define ZEROS    1              /* a page that was never written to */
#define NAME(p, n)  ((p) * 16 + (n) + 1)

typedef Area { byte base, capacity, offset };

byte plock, clock;
byte wpos, rpos, wgen, rgen, reaped;
Area area[GROWTHS + 1];
byte page[PAGES], position[PAGES];              /* the frame: its message, and its position */
byte making = PAGES, made;                      /* a growth under way: offset, end; not in the code */
byte producers = PRODUCERS, consumers = CONSUMERS;
byte sent[PRODUCERS], got[PRODUCERS];

#define CELL(g, pos)     (area[g].offset + (pos) % area[g].capacity)
#define END(g)           (area[g].offset + area[g].capacity)
#define INSIDE(i, g)     (area[g].offset <= (i) && (i) < END(g))
#define SHARE(a, b)      (area[a].offset < END(b) && area[b].offset < END(a))
#define LATER(a, b)      ((a) > (b) -> (a) : (b))
#define USED(g, read)    (wpos - LATER(read, area[g].base))

/* Give pages back; none of them may be of an area that is in use, or will be at once. */
inline punch(from, to)
{
    i = from;
    do
    :: i < to ->
        g = rgen;
        do
        :: g <= wgen -> assert(!INSIDE(i, g)); g++
        :: else -> break
        od;
        assert(i < making || i >= made);
        page[i] = NO_PAGE;
        i++
    :: else -> break
    od;
    i = 0; g = 0
}

/* Does the area of generation `own` lie over none of [low .. high]? */
inline shares_none(own, low, high)
{
    g = low;
    do
    :: g <= high -> assert(g == own || !SHARE(own, g)); g++
    :: else -> break
    od;
    g = 0
}

/* Every page that no area of [low .. wgen] covers. */
inline tidy(low)
{
    making = PAGES; made = 0;
    i = 0;
    do
    :: i < PAGES ->
        g = low;
        do
        :: g <= wgen && !INSIDE(i, g) -> g++
        :: else -> break
        od;
        if
        :: g > wgen ->
            g = rgen;
            do
            :: g <= wgen -> assert(!INSIDE(i, g)); g++
            :: else -> break
            od;
            page[i] = NO_PAGE
        :: else
        fi;
        i++
    :: else -> break
    od;
    i = 0; g = 0
}

inline recover_producers()
{
    if
    :: dead ->
        STEP(low = reaped);
#ifndef NO_TIDY
        STEP(tidy(low));
#endif
        d_step { low = 0; making = PAGES; made = 0; dead = false }
    :: !dead
    fi
}

inline place(wanted)
{
    offset = 0; i = low;
    do
    :: i <= wgen ->
        if
        :: offset < END(i) && area[i].offset < offset + wanted ->
            offset = offset + wanted; i = low
        :: else -> i++
        fi
    :: else -> break
    od;
    i = 0;
    assert(offset + wanted <= PAGES)
}

inline allocate(from, to)
{
    making = from; made = to;
    i = from;
    do
    :: i < to -> if :: page[i] == NO_PAGE -> page[i] = ZEROS :: else fi; i++
    :: else -> break
    od;
    i = 0
}

inline grow(wanted)
{
#ifdef PLACED_OVER_DRAINED
    STEP(low = rgen);
#else
    STEP(low = reaped);
#endif
    STEP(place(wanted); allocate(offset, offset + wanted));
    low = 0;
    if
#ifdef FAILS
    :: STEP(making = PAGES; made = 0; punch(offset, offset + wanted))
#endif
#ifdef RECORD_AFTER_GENERATION
    :: STEP(wgen++);
       STEP(area[wgen].base = wpos; area[wgen].capacity = wanted; area[wgen].offset = offset;
            making = PAGES; made = 0)
#else
    :: STEP(area[wgen + 1].base = wpos; area[wgen + 1].capacity = wanted; area[wgen + 1].offset = offset);
       STEP(wgen++; making = PAGES; made = 0)
#endif
    fi;
    offset = 0
}

proctype producer(byte p)
{
    byte n = 1, known, generation, low, offset, i, g;
    bool dead, no_room;
    do
    :: n <= MESSAGES ->
        LOCK(plock);
        recover_producers();
#ifndef STALE_PRODUCER_MAPPING
        if
        :: generation != wgen ->
            STEP(low = reaped);
            d_step { shares_none(wgen, low, wgen); generation = wgen; low = 0 }
        :: generation == wgen
        fi;
#endif
        if
        :: USED(generation, known) >= area[generation].capacity ->
            STEP(known = rpos; no_room = (USED(generation, known) >= area[generation].capacity))
        :: else
        fi;
        if
        :: no_room && wgen < GROWTHS -> grow(1); no_room = false
        :: no_room && wgen < GROWTHS -> grow(LARGEST); no_room = false
        :: no_room -> skip
        :: !no_room -> skip
        fi;
        d_step {
#ifndef STALE_PRODUCER_MAPPING
            generation = wgen;
#endif
            no_room = (USED(generation, known) >= area[generation].capacity) };
        if
        :: no_room ->
            no_room = false;
            UNLOCK(plock);
            if
            :: USED(wgen, rpos) < area[wgen].capacity
            :: consumers == 0 -> break
            fi
        :: !no_room ->
            STEP(
                i = CELL(generation, wpos);
                assert(page[i] != NO_PAGE);             /* else a page that is never given back */
                page[i] = NAME(p, n);
                position[i] = wpos;
                i = 0);
            STEP(wpos++; sent[p] = n);                  /* the commit */
            UNLOCK(plock);
            n++
        fi
    :: n > MESSAGES -> break
    od;
    producers--;
    goto ended;
died:
    atomic { kernel_releases(plock); producers-- };
ended:
    skip
}

inline reap()
{
    do
    :: reaped < rgen ->
#ifdef REAPED_BEFORE_THE_PUNCH
        STEP(reaped++);
        STEP(punch(area[reaped - 1].offset, END(reaped - 1)))
#else
        STEP(shares_none(reaped, reaped, wgen));
        STEP(punch(area[reaped].offset, END(reaped)));
        STEP(reaped++)
#endif
    :: reaped == rgen -> break
    od;
    skip
}

inline recover_consumers()
{
    if
    :: dead ->
        assert(rpos <= wpos);
#ifndef NO_REAP_AT_RECOVERY
        reap();
#endif
        dead = false
    :: !dead
    fi
}

inline look_further()
{
#ifdef GENERATION_BEFORE_POSITION
    STEP(last = wgen);
    STEP(limit = wpos);
#else
    STEP(limit = wpos);
    STEP(last = wgen);
#endif
    d_step {
        i = generation;                                 /* that of the mapping */
        generation = rgen;
        do
        :: generation < last && area[generation + 1].base == rpos -> generation++
        :: else -> break
        od;
        if
        :: generation < last ->
            assert(area[generation + 1].base > rpos);   /* else POISON_AREA */
            if
#ifndef LIMIT_IGNORES_THE_NEXT_AREA
            :: area[generation + 1].base < limit -> limit = area[generation + 1].base
#endif
            :: else
            fi
        :: else
        fi;
        last = 0 };
    if
    :: i != generation -> STEP(shares_none(generation, reaped, wgen); i = 0)
    :: i == generation -> i = 0
    fi;
    if
    :: rgen != generation -> STEP(rgen = generation); reap()
    :: rgen == generation
    fi;
    d_step {
        assert(limit - rpos <= area[generation].capacity);      /* else POISON_POSITIONS */
        known = limit;
        limit = 0 }
}

inline take()
{
    LOCK(clock);
    recover_consumers();
    if
#ifdef ANY_MAPPING
    :: rpos >= known -> look_further()
    :: rpos < known
#else
    :: generation != rgen || rpos >= known -> look_further()
    :: generation == rgen && rpos < known
#endif
    fi;
    if
    :: rpos < known ->
        STEP(
            i = CELL(generation, rpos);
            assert(position[i] == rpos);                        /* else POISON_FRAME */
            assert(page[i] > ZEROS);
            one = page[i] - 1;
            i = 0);
        STEP(
            assert(got[one / 16] + 1 == one % 16);              /* once, and in order */
            got[one / 16] = one % 16;
            rpos++;                                             /* the commit */
            one = 0);
        UNLOCK(clock)
    :: rpos >= known -> UNLOCK(clock)                           /* EMPTY */
    fi
}

#ifdef SETTLE
/* `low` is reused for what is loaded. */
inline settle()
{
    LOCK(plock);
    recover_producers();
    STEP(low = rpos);
    if
    :: low == wpos && wgen < GROWTHS ->
        STEP(low = rgen);
        if
        :: low == wgen && area[wgen].capacity > 1 -> grow(1)
        :: else
        fi
    :: else
    fi;
    low = 0;
    UNLOCK(plock);
    LOCK(clock);
    recover_consumers();
    look_further();
    UNLOCK(clock)
}
#endif

proctype consumer()
{
    byte known, generation, limit, last, one, i, g;
#ifdef SETTLE
    byte low, offset;
#endif
    bool dead;
    do
    :: rpos != wpos -> take()
#ifdef SETTLE
    :: rpos == wpos && area[rgen].capacity > 1 && wgen < GROWTHS -> settle()
#endif
    :: rpos == wpos && producers == 0 -> break
    od;
    consumers--;
    goto ended;
died:
    atomic { kernel_releases(plock); kernel_releases(clock); consumers-- };
ended:
    skip
}

#ifdef ATTACH
/* Records are not overwritten here, so the two words decide. */
inline look_for_overlap(own)
{
    last = wgen;
    g = reaped;
    d_step {
        do
        :: g <= last -> overlap = (overlap || (g != own && SHARE(own, g))); g++
        :: else -> break
        od;
        g = 0; last = 0 }
}

proctype attacher()
{
    byte written, read, last, g;
    bool agree, overlap;
    do
    :: !agree ->
        written = wgen;
        read = rgen;
        look_for_overlap(written);
        look_for_overlap(read);
#ifdef NO_AGREEMENT
        agree = true;
#else
        agree = (written == wgen);
        agree = (agree && read == rgen);
#endif
        assert(!agree || !overlap);                     /* else RingCorrupted */
        overlap = false
    :: agree -> break
    od
}
#endif

init
{
    byte i, g;
    atomic {
        area[0].capacity = 1;
        page[0] = ZEROS;
#if PRODUCERS > 1
        run producer(1);
#endif
#ifdef ATTACH
        run attacher();
#endif
#if CONSUMERS > 1
        run consumer();
#endif
        run consumer();
        run producer(0)
    };
    _nr_pr == 1;
    d_step {
        assert(rpos == wpos || consumers == 0);
        if
        :: clock == DIED ->
            do
            :: reaped < rgen -> punch(area[reaped].offset, END(reaped)); reaped++
            :: else -> break
            od
        :: else
        fi;
        if
        :: plock == DIED -> tidy(reaped)
        :: else
        fi;
        i = 0;
        do
        :: i < PAGES ->
            g = reaped;
            do
            :: g <= wgen && !INSIDE(i, g) -> g++
            :: else -> break
            od;
            assert((page[i] == NO_PAGE) == (g > wgen));         /* accounted for */
            i++
        :: else -> break
        od
    }
}
