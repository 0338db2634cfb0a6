"""A vector of environments in processes, in the manner of gymnasium's AsyncVectorEnv."""

from __future__ import annotations

import os
import signal
from typing import Any

import pytest

import shmring
from shmring import PeerDied

np = pytest.importorskip("numpy")
if shmring.backend != "ring":
    pytest.skip("a pipe does not survive a killed process", allow_module_level=True)


class Environment:
    """A position that actions move; an image shows it."""

    def reset(self, seed: int) -> Any:
        self.position, self.steps = seed, 0
        return self.observation()

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, int]]:
        self.position += int(action)
        self.steps += 1
        return self.observation(), float(action), self.steps == 25, False, {"at": self.position}

    def observation(self) -> Any:
        return np.full((64, 64, 3), self.position % 256, np.uint8)


def work(index: int, commands: Any, answers: Any) -> None:
    environment = Environment()
    for command, argument in iter(commands.get, None):
        call = environment.reset if command == "reset" else environment.step
        answers.put((index, command, call(argument)))


class Vector:
    """Environments that step together; the one whose process died starts again."""

    def __init__(self, count: int, context: Any) -> None:
        self.context, self.answers = context, context.Queue()
        self.commands = [context.Queue() for _ in range(count)]
        self.processes = [self.start(index) for index in range(count)]

    def start(self, index: int) -> Any:
        process = self.context.Process(
            target=work, args=(index, self.commands[index], self.answers), daemon=True
        )
        process.start()
        return process

    def reset(self) -> Any:
        return self.ask({index: ("reset", index) for index in range(len(self.commands))})

    def step(self, actions: Any) -> Any:
        return self.ask({index: ("step", action) for index, action in enumerate(actions)})

    def ask(self, asked: dict[int, Any]) -> dict[int, Any]:
        """Put a command for each, and wait for the answers of those that live."""
        for index, command in asked.items():
            self.commands[index].put(command)
        found: dict[int, Any] = {}
        while missing := asked.keys() - found.keys():
            try:
                peers = [self.processes[index] for index in missing]
                index, _, answer = self.answers.get(timeout=60, peers=peers)
                found[index] = answer
            except PeerDied:
                for index in missing:
                    self.restart(index)
                    self.commands[index].put(("reset", index))
        return found

    def restart(self, index: int) -> None:
        self.processes[index].join()
        while not self.commands[index].empty():
            self.commands[index].get_nowait()
        self.processes[index] = self.start(index)

    def close(self) -> None:
        for commands, process in zip(self.commands, self.processes, strict=True):
            commands.put(None)
            process.join(60)
            commands.close()
        self.answers.close()


def test_a_loop_of_steps_goes_on_after_a_worker_was_killed() -> None:
    environments = Vector(3, shmring.get_context("fork"))
    first = environments.reset()
    assert [int(first[index][0, 0, 0]) for index in range(3)] == [0, 1, 2]
    for turn in range(20):
        if turn == 10:
            victim = environments.processes[1]
            os.kill(victim.pid, signal.SIGKILL)
            victim.join(60)
        answers = environments.step([1, 2, 3])
        if turn == 10:
            assert int(answers[1][0, 0, 0]) == 1, "reset, with the seed it had"
            continue
        for index, (observation, reward, ended, _, info) in answers.items():
            assert observation.shape == (64, 64, 3)
            assert observation.flags.writeable
            assert (observation == info["at"]).all()
            assert reward == index + 1
            assert not ended
    expected = [20, 1 + 2 * 9, 2 + 3 * 20]
    assert [answers[index][4]["at"] for index in range(3)] == expected
    environments.close()
