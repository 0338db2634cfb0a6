"""Claims: a worker's cycle, and the putting back of what a dead one held.

A task is in the queue, or claimed by a worker, or answered; after a kill it is
exactly one of these, however the dead worker left its claim.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass, field

from looking import (
    AT_ONCE,
    Finding,
    check_counts,
    check_memory,
    locks_of_the_dead,
    message,
    opened_afresh,
    settle,
    sort_out,
)
from operations import forget_owner
from shmring import Queue
from shmring.errors import Empty
from tally import BROKEN, DOUBLED, LOST, TORN, Harm
from trials import Operation, Stage
from walking import die_some_day, end

__all__ = ["CLAIMS", "small_queue"]

TASKS = 3


@dataclass
class Desk(Stage):
    """A queue of tasks and one of results, as a coordinator and its workers share them.

    Args:
        tasks: the queue of the tasks, with TASKS of them in it.
        results: the queue of the answers.
        slot: the victim's claim slot, if it has one before the walk.
    """

    tasks: Queue[bytes]
    results: Queue[bytes]
    positions: dict[bytes, int] = field(default_factory=dict)
    ever: int = 0
    earlier: int = 0  # answers that had come before
    slot: int | None = None
    victim: int = 0

    def beside(self, victim: int) -> None:
        self.victim = victim

    def afresh(self) -> None:
        self.tasks = opened_afresh(self.tasks)
        self.results = opened_afresh(self.results)

    def put(self, number: int, length: int = 100) -> None:
        task = message(number, length)
        self.positions[task] = self.tasks._put_position(task, False)
        self.ever += 1

    def close(self) -> None:
        self.tasks.close()
        self.results.close()

    def put_back(self, pid: int) -> tuple[list[bytes], list[bytes]]:
        """What a coordinator does when a worker has died, in its order.

        Returns:
            the answers that had come, and the tasks that were put back.
        """
        claims = self.tasks._claims()  # takes both locks once
        answers = drain(self.results)
        back: list[bytes] = []
        for slot, owner, _, _, low, high in claims:
            if owner != pid:
                continue
            if low < high:
                claimed = [task for task, at in self.positions.items() if low <= at < high]
                if not claimed:
                    raise Harm(TORN, f"a claim of {low} to {high}: {self.positions}")
                for task in claimed:
                    if answer_to(task) not in answers:
                        self.put(int.from_bytes(task[4:8], "little"), len(task))
                        back.append(task)
            self.tasks._claim_free(slot)
        return answers, back

    def settle(self, thorough: bool) -> Finding:
        """Put back what the victim held, then do what is there: each is answered once."""
        everything = sorted(self.positions)
        locked = locks_of_the_dead(self.tasks, self.results)
        answers, back = self.put_back(self.victim)
        left = self.work_off()
        all_done = sorted([*(task_of(answer) for answer in answers), *left])
        if len(set(all_done)) != len(all_done):
            raise Harm(DOUBLED, f"{len(answers)} answered, {len(back)} put back, {len(left)} there")
        if all_done != everything:
            kind = LOST if set(all_done) <= set(everything) else TORN
            raise Harm(kind, f"{len(answers)} answered, {len(back)} put back, {len(left)} there")
        check_counts(self.tasks, self.ever, self.ever)
        settle(self.results, [], self.results.statistics().messages_put, thorough=thorough)
        self.check_rest(thorough)
        answered = len(answers) > self.earlier
        said = "answered" if answered else "claimed" if back else "in the queue"
        return Finding(said, locked)

    def check_rest(self, thorough: bool) -> None:
        if self.tasks._claims():
            raise Harm(BROKEN, "a slot of no worker")
        check_memory(self.tasks, thorough)

    def work_off(self) -> list[bytes]:
        """Be a worker: claim, take and release each task that is there."""
        slot = self.tasks._claim_open()
        left = []
        with contextlib.suppress(Empty):
            while True:
                left.append(self.tasks.get(self.tasks.qsize() > 0, AT_ONCE))
                self.tasks._claim_release(slot)
        self.tasks._claim_close(slot)
        return left


def drain(queue: Queue[bytes]) -> list[bytes]:
    found: list[bytes] = []
    with contextlib.suppress(Empty):
        while True:
            found.append(queue.get_nowait())
    return found


def answer_to(task: bytes) -> bytes:
    return b"answer" + task


def task_of(answer: bytes) -> bytes:
    if not answer.startswith(b"answer"):
        raise Harm(TORN, f"an answer of {len(answer)} bytes: {answer[:64].hex(' ', 8)}")
    return answer.removeprefix(b"answer")


# ---- the desks -----------------------------------------------------------------------------------


def small_queue() -> Queue[bytes]:
    """As the constructor makes one, but with areas of a page to begin with."""
    queue: Queue[bytes] = Queue.__new__(Queue)
    queue._choose("bytes")
    queue._make(4096, 1 << 20)
    return queue


def desk(length: int = 100, count: int = TASKS) -> Desk:
    made = Desk(small_queue(), small_queue())
    for number in range(count):
        made.put(number, length)
    return made


def moving_desk() -> Desk:
    """All of the first area was taken; the next task lies in the second."""
    made = desk(500, 10)
    assert made.tasks.statistics().growths == 1
    for number in range(7):
        assert made.tasks.get_nowait() == message(number, 500)
        del made.positions[message(number, 500)]
    return made


def open_claim(made: Desk) -> None:
    made.slot = made.tasks._claim_open()


def cycle(made: Desk) -> None:
    """What a worker does with one task."""
    task = made.tasks.get()
    made.results.put(answer_to(task))
    assert made.slot is not None
    made.tasks._claim_release(made.slot)


def come_and_go(made: Desk) -> None:
    """A worker that takes one task, answers, and leaves."""
    made.slot = made.tasks._claim_open()
    cycle(made)
    made.tasks._claim_close(made.slot)


def after_a_cycle(made: Desk) -> None:
    """The slot is not new: a claim that was released stands in it."""
    open_claim(made)
    cycle(made)


def desk_with_an_answer() -> Desk:
    made = desk()
    made.earlier = 1
    return made


def claiming(
    name: str,
    act: Callable[[Desk], object],
    prepare: Callable[[], Desk] = desk,
    warm: Callable[[Desk], object] | None = open_claim,
) -> Operation:
    return Operation(name, prepare, act, warm=warm)


# ---- putting back --------------------------------------------------------------------------------


class Widowed(Desk):
    """A worker has died with a claim; the victim is the coordinator that puts it back.

    What a coordinator was doing dies with it.  Another one finds the task in the
    queue, or still claimed; or both, if the first died between the two stores,
    for which tasks are told apart by their numbers.
    """

    worker = 0

    def lose_a_worker(self) -> Widowed:
        near, far = os.pipe()
        self.worker = os.fork()
        if self.worker == 0:
            try:
                die_some_day()
                self.tasks._claim_open()
                self.tasks.get_nowait()
                os.write(far, b"!")
                signal.pause()
            finally:
                os._exit(1)
        assert os.read(near, 1) == b"!"
        os.close(near)
        os.close(far)
        end(self.worker)
        return self

    def settle(self, thorough: bool) -> Finding:
        everything = sorted(self.positions)
        locked = locks_of_the_dead(self.tasks, self.results)
        _, back = self.put_back(self.worker)
        left = self.work_off()
        sort_out(sorted(set(left)), everything)
        if set(left) != set(everything):
            raise Harm(LOST, f"{len(left)} there, {len(back)} of them put back now")
        twice = len(left) - len(everything)
        if twice > len(back):
            raise Harm(DOUBLED, f"{len(left)} there, {len(back)} of them put back now")
        check_counts(self.tasks, 1 + len(left), 1 + len(left))  # the worker had taken one
        self.check_rest(thorough)
        said = "back in the queue" if not back else "both" if twice else "still claimed"
        return Finding(said, locked)


def widowed(*sides: str) -> Widowed:
    made = Widowed(**vars(desk())).lose_a_worker()
    forget_owner(made.tasks, *sides)
    return made


CLAIMS = [
    claiming("claim", lambda d: d.tasks.get()),
    claiming("claim in a used slot", lambda d: d.tasks.get(), desk_with_an_answer, after_a_cycle),
    claiming("claim that moves on", lambda d: d.tasks.get(), moving_desk),
    claiming("claim of a batch", lambda d: d.tasks.get_many()),
    claiming("claim, answer, release", cycle),
    claiming("open, claim, answer, release, close", come_and_go, warm=None),
    Operation("put back", widowed, lambda d: d.put_back(d.worker)),
    Operation(
        "put back, locks of a dead one",
        lambda: widowed("producers", "consumers"),
        lambda d: d.put_back(d.worker),
    ),
]
