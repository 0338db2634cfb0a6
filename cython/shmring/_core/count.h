/* How many messages a side has counted: right after a kill at any instruction.
 *
 * A count is `current` where the side stands at `position`, else `previous`.
 */
#ifndef SHMRING_COUNT_H
#define SHMRING_COUNT_H

#include "layout.h"
#include "sync.h"

/* Under the lock of the side, which stands at `position`. */
static inline uint64_t count_at(const shmring_count *count, uint64_t position)
{
    return count->position == position ? count->current : count->previous;
}

/* Right at `position` after each of these stores, and at `following` after the
 * last; the side's own position is stored next and commits. */
static inline void count_on(shmring_count *count, uint64_t position, uint64_t following, uint64_t by)
{
    uint64_t value = count_at(count, position);
    store_release64(&count->previous, value);
    store_release64(&count->position, following);
    store_release64(&count->current, value + by);
}

/* Without the lock. */
SYNC_SLOW uint64_t count_read(const shmring_count *count, const uint64_t *position)
{
    uint64_t value = 0;
    for (int turn = 0; turn < 10000; turn++) { /* bounded: the words may be garbage that never agrees */
        uint64_t stood = load_acquire64(position);
        uint64_t current = load_acquire64(&count->current);
        uint64_t at = load_acquire64(&count->position);
        value = at == stood ? current : load_acquire64(&count->previous);
        fence_full();
        if (load_acquire64(position) == stood && load_acquire64(&count->position) == at)
            return value;
    }
    return value;
}

#endif
