"""Frames through three stages of processes; one of them is killed and nothing is lost.

    camera ──> frames ──> blur, 2 processes ──> blurred ──> edges ──> counts

A stage reads each frame in place with ``peek()``. The frame leaves the ring only when
the block ends, after the result is in the next ring. So a stage that is killed leaves
its frame to another process. At worst a result comes twice (at least once), so each
frame carries its number, and the results are kept by number. Needs numpy.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from multiprocessing.synchronize import Event

import numpy as np

from shmring import Ring, ShutDown

SHAPE = (240, 320)
FRAMES = 60
KILLED_AT = 20
RECORD = np.dtype([("number", np.int64), ("pixels", np.float32, SHAPE)])


def camera(frames: Ring) -> None:
    """Draw each frame straight into the ring: a bright disc that moves."""
    y, x = np.mgrid[: SHAPE[0], : SHAPE[1]]
    for number in range(FRAMES):
        with frames.reserve(RECORD.itemsize) as view:
            record = np.frombuffer(view, RECORD)
            record["number"] = number
            record["pixels"] = (x - 5 * number) ** 2 + (y - 120) ** 2 < 900
            del record  # no array may outlive the block


def blur(frames: Ring, blurred: Ring, killed: Event) -> None:
    """The mean of each pixel and its four neighbours; killed at one frame, the first time."""
    while True:
        try:
            with frames.peek() as view, blurred.reserve(RECORD.itemsize) as room:
                source, target = np.frombuffer(view, RECORD), np.frombuffer(room, RECORD)
                number, image = int(source["number"][0]), source["pixels"][0]
                if number == KILLED_AT and not killed.is_set():
                    killed.set()
                    os.kill(os.getpid(), signal.SIGKILL)
                shifted = [np.roll(image, step, axis) for axis in (0, 1) for step in (-1, 1)]
                target["number"] = number
                target["pixels"] = (image + sum(shifted)) / 5
                del source, target, image, shifted
        except ShutDown:
            return


def edges(blurred: Ring, results: Ring) -> None:
    """How many pixels lie on an edge."""
    while True:
        try:
            with blurred.peek() as view:
                record = np.frombuffer(view, RECORD)
                across, down = np.gradient(record["pixels"][0])
                count = np.count_nonzero(np.hypot(across, down) > 0.1)
                results.put(np.array([record["number"][0], count], np.int64))
                del record, across, down
        except ShutDown:
            return


def main() -> None:
    room = 16 * RECORD.itemsize
    killed = multiprocessing.Event()
    with Ring.create(room) as frames, Ring.create(room) as blurred, Ring.create() as results:
        stages = [
            multiprocessing.Process(target=blur, args=(frames, blurred, killed)),
            multiprocessing.Process(target=blur, args=(frames, blurred, killed)),
            multiprocessing.Process(target=edges, args=(blurred, results)),
            multiprocessing.Process(target=camera, args=(frames,)),
        ]
        for stage in stages:
            stage.start()
        counts: dict[int, int] = {}
        while len(counts) < FRAMES:
            number, count = np.frombuffer(results.get(timeout=30, peers=stages), np.int64)
            counts[int(number)] = int(count)
        for ring in (frames, blurred):
            ring.shutdown()
        for stage in stages:
            stage.join()
    deaths = [stage.exitcode for stage in stages].count(-signal.SIGKILL)
    print(f"{len(counts)} of {FRAMES} frames, {deaths} process killed")
    print(f"{sum(counts.values()) / FRAMES:.0f} edge pixels a frame")


if __name__ == "__main__":
    main()
