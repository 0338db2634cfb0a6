/* The owner of a reservation or a lease, in one word, and the proof of its death.
 *
 * owner = start time of the process (clock ticks since boot) << 22 | pid
 *
 * A pid alone looks alive once it is reused; with the start time it names one
 * incarnation.  22 bits hold the largest pid Linux gives out, 42 bits of ticks
 * last for a thousand years.  Start time 0 means that /proc could not be read.
 */
#ifndef SHMRING_OWNER_H
#define SHMRING_OWNER_H

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#define OWNER_PID_BITS 22

static inline uint64_t owner_of(uint32_t pid, uint64_t start_ticks) { return start_ticks << OWNER_PID_BITS | pid; }
static inline uint32_t owner_pid(uint64_t owner) { return (uint32_t)(owner & ((1u << OWNER_PID_BITS) - 1)); }
static inline uint64_t owner_start_ticks(uint64_t owner) { return owner >> OWNER_PID_BITS; }

/* The stat of a thread from its command's name on, which may contain anything: fields are counted
 * from the last parenthesis, where this points to; NULL if unreadable.  By the thread: qemu-user
 * makes up /proc/PID/stat for the process that reads its own, and others would find it dead. */
static inline char *owner_stat(uint32_t tid, char text[1024])
{
    char path[48];
    snprintf(path, sizeof path, "/proc/%u/task/%u/stat", tid, tid);
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return NULL;
    ssize_t size = read(fd, text, 1023);
    close(fd);
    if (size <= 0)
        return NULL;
    text[size] = 0;
    return strrchr(text, ')');
}

/* Field `number` of such a text, from 4 on; 0 if there is none. */
static inline uint64_t owner_field(const char *field, int number)
{
    for (int passed = 2; field != NULL && passed < number; passed++)
        field = strchr(field + 1, ' ');
    /* by hand: strtoull becomes a symbol of glibc 2.38 where that compiles it */
    uint64_t value = 0;
    if (field != NULL)
        for (field++; *field >= '0' && *field <= '9'; field++)
            value = value * 10 + (uint64_t)(*field - '0');
    return value;
}

/* Field 22; 0 if unreadable. */
static inline uint64_t owner_start_time(uint32_t pid)
{
    char text[1024];
    return owner_field(owner_stat(pid, text), 22);
}

/* Fields 3 and 20: whether a process has ended and was not waited for.  The first thread may
 * have ended before others. */
static inline int owner_is_zombie(uint32_t pid)
{
    char text[1024];
    const char *field = owner_stat(pid, text);
    return field != NULL && strncmp(field, ") Z", 3) == 0 && owner_field(field, 20) <= 1;
}

/* Field 3: whether a thread runs, would if it had a CPU, or is inside the kernel; not if it is
 * stopped, asleep or unknown. */
static inline int owner_goes_on(uint32_t tid)
{
    char text[1024];
    const char *field = owner_stat(tid, text);
    return field != NULL && (strncmp(field, ") R", 3) == 0 || strncmp(field, ") D", 3) == 0);
}

static inline uint64_t owner_self(void)
{
    uint32_t pid = (uint32_t)getpid();
    return owner_of(pid, owner_start_time(pid));
}

/* 1 only when the kernel proves it; unreaped zombies count as dead. */
static inline int owner_is_dead(uint64_t owner)
{
    uint32_t pid = owner_pid(owner);
    uint64_t started = owner_start_ticks(owner);
    int dead = 0;
    int fd = (int)syscall(SYS_pidfd_open, pid, 0);
    if (fd < 0) {
        if (errno == ESRCH || errno == EINVAL) /* EINVAL: the number is a mere thread's now */
            return 1;
        /* no pidfd to be had */
        if ((kill((pid_t)pid, 0) != 0 && errno == ESRCH) || owner_is_zombie(pid))
            return 1;
    }
    /* read after pidfd_open: the number cannot change hands in between unseen */
    uint64_t now = owner_start_time(pid);
    if (now != 0 && started != 0 && now != started)
        dead = 1;
    if (fd >= 0) {
        struct pollfd p = {fd, POLLIN, 0};
        if (poll(&p, 1, 0) == 1 && (p.revents & POLLIN))
            dead = 1;
        close(fd);
    }
    return dead;
}

#endif
