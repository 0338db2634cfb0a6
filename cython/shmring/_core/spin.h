/* Looking for a moment before falling asleep.
 *
 * To sleep and to be woken costs the two sides about as long as SPIN_NS.  A process
 * that looks for that long first pays at most twice what the better choice would
 * have cost (Karlin, Li, Manasse and Owicki, SOSP 1991), and an answer that is
 * under way costs no system call.  Not worth it where the other side last ran
 * on this CPU, or where the last sleep was so long that the next will be too.
 */
#ifndef SHMRING_SPIN_H
#define SHMRING_SPIN_H

#include "sync.h"

#define SPIN_NS 20000
#define SPIN_SLEPT_NS 200000 /* after a longer sleep nothing is expected soon */
#define SPIN_BYTES_PER_NS 8
#define LOOK_NS 250 /* the first pause between two looks, where others look as well; and the longest */
#define LOOK_MOST_NS 2000

static inline void spin_between_looks(void)
{
    for (int i = 0; i < 8; i++)
        spin_pause();
}

/* Whether the two came to differ.  With others that look as well the pauses grow: what comes
 * meanwhile is then taken with the lines still warm. */
SYNC_SLOW int spin_while_equal(const uint64_t *written, const uint64_t *read, int others)
{
    int64_t now = monotonic_ns(), until = now + SPIN_NS, pause = LOOK_NS;
    do {
        if (load_acquire64(written) != load_relaxed64(read))
            return 1;
        if (others) {
            now = sync_pause(&pause, LOOK_MOST_NS);
        } else {
            spin_between_looks();
            now = monotonic_ns();
        }
    } while (now < until);
    return 0;
}

/* How long to look at a message of `length` bytes that is being written in place:
 * as long as a copy takes, but not so long that one sleep more is nothing to it. */
static inline int64_t spin_for_writing(uint64_t length)
{
    uint64_t ns = SPIN_NS + length / SPIN_BYTES_PER_NS;
    return (int64_t)(ns < SPIN_SLEPT_NS ? ns : SPIN_SLEPT_NS);
}

#endif
