/* A child is killed while it holds a lock word: the kernel must have been told of it.
 *
 * Built against each C library that is there; exits with 0 if every lock was
 * released, by the first thread of a child and by a second one.
 */
#define _GNU_SOURCE
#include "sync.h"

#include <stdio.h>
#include <stdlib.h>
#include <sys/wait.h>

static uint32_t *word;

static void *die_holding_it(void *unused)
{
    if (lock_try(word) != LOCK_TAKEN)
        exit(3);
    kill(getpid(), SIGKILL);
    return unused;
}

int main(void)
{
    word = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (word == MAP_FAILED || sync_start() != 0)
        return 2;
    if (lock_try(word) != LOCK_TAKEN) /* this thread is registered before the fork */
        return 4;
    lock_release(word);
    for (int turn = 0; turn < 200; turn++) {
        pid_t child = fork();
        if (child == 0) {
            pthread_t second;
            if (turn % 2 == 0)
                die_holding_it(NULL);
            if (pthread_create(&second, NULL, die_holding_it, NULL) == 0)
                pthread_join(second, NULL);
            exit(5);
        }
        int status;
        if (waitpid(child, &status, 0) != child || !WIFSIGNALED(status))
            return 6;
        int result = lock_wait(word, SYNC_SLICE_NS);
        if (result != LOCK_TAKEN_FROM_DEAD) {
            printf("turn %d: %d instead of %d, the word is %#x\n", turn, result, LOCK_TAKEN_FROM_DEAD, *word);
            return 1;
        }
        lock_release(word);
    }
    return 0;
}
