/* Looking for a moment before falling asleep.
 *
 * To sleep and to be woken costs the two sides about as long as SPIN_NS.  Who
 * looks for that long first pays at most twice what the better choice would
 * have cost (Karlin, Li, Manasse and Owicki, SOSP 1991), and an answer that is
 * under way costs no system call.  Not worth it where the other side last ran
 * on this CPU, or where the last sleep was so long that the next will be too.
 */
#ifndef SHMRING_SPIN_H
#define SHMRING_SPIN_H

#include "_sync.h"

#define SPIN_NS 20000
#define SPIN_SLEPT_NS 200000 /* after a longer sleep nothing is expected soon */
/* Between two looks, each of which takes the line away from who writes to it.
 * A pause takes 6 ns on some processors and 60 on others: the clock decides. */
#define SPIN_PAUSES 8

/* Whether the two came to differ. */
SYNC_SLOW int spin_while_equal(const uint64_t *written, const uint64_t *read)
{
    int64_t until = monotonic_ns() + SPIN_NS;
    do {
        if (load_acquire64(written) != load_relaxed64(read))
            return 1;
        for (int i = 0; i < SPIN_PAUSES; i++)
            spin_pause();
    } while (monotonic_ns() < until);
    return 0;
}

#endif
