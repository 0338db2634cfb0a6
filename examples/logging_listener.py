"""Log records of several processes, written by one listener, also those of a killed process.

A record is in shared memory when the logging call returns. With the standard library's
queue it would wait for a feeder thread, and die with the process.
"""

from __future__ import annotations

import logging
import logging.handlers
import multiprocessing
import os
import signal
import sys

import shmring


def work(records: shmring.Queue[logging.LogRecord], number: int) -> None:
    root = logging.getLogger()
    root.handlers[:] = [logging.handlers.QueueHandler(records)]
    root.setLevel(logging.INFO)
    log = logging.getLogger(f"worker-{number}")
    log.info("begins")
    if number == 1:
        log.warning("is about to be killed")
        os.kill(os.getpid(), signal.SIGKILL)
    log.info("ends")


def main() -> None:
    console = logging.StreamHandler(sys.stdout)
    console.setFormatter(logging.Formatter("%(name)s %(levelname)s: %(message)s"))
    with shmring.Queue[logging.LogRecord]() as records:
        listener = logging.handlers.QueueListener(records, console)
        listener.start()
        workers = [multiprocessing.Process(target=work, args=(records, n)) for n in range(3)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        listener.stop()  # after what is in the queue


if __name__ == "__main__":
    main()
