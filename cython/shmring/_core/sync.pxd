"""What Cython sees of sync.h: atomics, the lock word, the wait word."""

from libc.stdint cimport int64_t, uint32_t, uint64_t

cdef extern from "sync.h" nogil:
    # atomics; each name carries its memory order
    uint32_t load_relaxed32(const uint32_t *p) noexcept
    uint64_t load_relaxed64(const uint64_t *p) noexcept
    uint32_t load_acquire32(const uint32_t *p) noexcept
    uint64_t load_acquire64(const uint64_t *p) noexcept
    void store_relaxed32(uint32_t *p, uint32_t value) noexcept
    void store_relaxed64(uint64_t *p, uint64_t value) noexcept
    void store_release32(uint32_t *p, uint32_t value) noexcept
    void store_release64(uint64_t *p, uint64_t value) noexcept
    bint compare_exchange32(uint32_t *p, uint32_t expected, uint32_t desired) noexcept
    bint compare_exchange64(uint64_t *p, uint64_t expected, uint64_t desired) noexcept
    int64_t fetch_add64(int64_t *p, int64_t value) noexcept
    uint32_t fetch_add32(uint32_t *p, uint32_t value) noexcept
    void fence_full() noexcept
    void fence_after_unlock() noexcept
    uint32_t current_cpu() noexcept
    int64_t monotonic_ns() noexcept

    void nap_ns(int64_t nanoseconds) noexcept
    void handle_enter(int64_t *inside) noexcept
    bint handle_leave(int64_t *inside) noexcept

    # the process
    uint32_t sync_epoch() noexcept

    # the lock word
    const int LOCK_TAKEN
    const int LOCK_TAKEN_FROM_DEAD
    const int LOCK_BUSY
    const int LOCK_GARBAGE
    int lock_try(uint32_t *word) noexcept
    bint lock_try_free(uint32_t *word) noexcept
    int lock_wait(uint32_t *word, int64_t nanoseconds) noexcept
    void lock_release(uint32_t *word) noexcept
    uint32_t lock_owner(uint32_t seen) noexcept
    bint lock_is_orphan(uint32_t seen) noexcept

    # the wait word
    const int64_t SYNC_SLICE_NS
    const int64_t SYNC_SLICE_LEAST_NS
    bint wait_wants_wake(const uint32_t *word) noexcept
    void wait_wake_one(uint32_t *word) noexcept
    void wait_wake_all(uint32_t *word) noexcept
    uint32_t wait_announce(uint32_t *word) noexcept

    # many words at once
    const int SYNC_WORDS_MOST
    bint sync_set_waitv_absent(bint absent) noexcept
    void bell_ring(uint32_t *bell) noexcept
    bint bell_heard(uint32_t *bell) noexcept
    void wait_sleep(uint32_t **words, const uint32_t *announced, int count,
                    uint32_t *bell, int64_t nanoseconds, int64_t longest) noexcept

cdef extern from "sync.h":
    # Once a module that takes locks or asks for the epoch; ImportError where the kernel lacks robust lists.
    int sync_start() except -1
