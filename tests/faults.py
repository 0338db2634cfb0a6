"""The faults that were thought of, and `docs/faults.md`, which is written from the tests.

A test that shows what comes of a fault bears its number, ``@pytest.mark.fault(13)``.
``make faults`` (this file, run) collects the marks and writes the page;
``test_fault_table.py`` fails when the page is not what the marks give.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

TESTS = Path(__file__).resolve().parent
PAGE = TESTS.parent / "docs" / "faults.md"


@dataclass(frozen=True, slots=True)
class Fault:
    """One row: what goes wrong, and what comes of it."""

    happens: str
    outcome: str


FAULTS = {
    1: Fault(
        "A process is killed inside `put` or `put_many`, at whatever instruction",
        "Each message is wholly there or not at all; a batch that fits its area goes in as one; "
        "the others go on at once",
    ),
    2: Fault(
        "A process is killed inside `get` or `get_many`, at whatever instruction",
        "Each message was taken or is still there, never twice; what was taken dies with its taker",
    ),
    3: Fault(
        "A producer is killed after the message is committed and before a waiter is woken",
        "Two of the consumers that sleep look every 90 ms, and one that looks takes the message",
    ),
    4: Fault(
        "A process is killed while it recovers from another's death",
        "The lock is again one of a dead owner, and the next process recovers from the start",
    ),
    5: Fault("A process that waits for a lock is killed", "The others get the lock as before"),
    6: Fault(
        "A consumer that sleeps in `get` is killed",
        "Sleepers are not counted, so nothing leaks: the next message wakes another one, and puts "
        "make no more wake-ups for the dead",
    ),
    7: Fault(
        "A consumer is killed when it was woken, before it has taken anything",
        "Another one takes the message, after one slice of sleep at most",
    ),
    8: Fault(
        "A process is killed while the ring grows, shrinks or moves on to its next area",
        "The next process completes or undoes it; no page of memory is lost",
    ),
    9: Fault(
        "A process is killed inside `with reserve()` or `with peek()`",
        "What was reserved is never published; what was peeked at is there for another",
    ),
    10: Fault(
        "A worker is killed with a task taken and not answered",
        "Another worker does that task, as its next attempt; tasks that only queued stay there",
    ),
    11: Fault(
        "A worker is killed when its answer is committed, before it takes the next task",
        "The answer counts, once, and the task does not run again",
    ),
    12: Fault(
        "A task ends every worker that tries it (`os._exit`, SIGSEGV, SIGKILL)",
        "It is given up after `max_retries` with `WorkerDied`; all other tasks are answered",
    ),
    13: Fault(
        "The holder of a lock is stopped (SIGSTOP)",
        "The others run into their time-outs (`Full`, `Empty`; `*_nowait` after a millisecond); "
        "the lock is never taken from it, and after SIGCONT all go on",
    ),
    14: Fault(
        "A worker is stopped for longer than its heartbeat",
        "It counts as silent, and a log line says so; not as dead: no other worker gets its task",
    ),
    15: Fault(
        "The coordinator is killed",
        "Its workers end by themselves, and what they held in `/dev/shm` goes with the last one",
    ),
    16: Fault(
        "A killed process is not reaped by its parent (a zombie)",
        "It counts as dead: pidfd and `/proc` show it",
    ),
    17: Fault(
        "The pid of a dead process belongs to a new one",
        "The start time is part of every owner's name, so the new one is not taken for the old",
    ),
    18: Fault(
        "A process forks (or spawns) with a ring open, perhaps while a thread of it is inside",
        "The child works with the ring like any other process, and is not stuck on a lock; views "
        "and blocks stay with the parent",
    ),
    19: Fault(
        "A process calls `exec` while it is inside",
        "A lock that one of its threads held is released by the kernel as if by death; a "
        "reservation or a lease lasts until the new program ends, since its pid and its start "
        "time stay the same",
    ),
    20: Fault(
        "A process of another PID namespace attaches",
        "`AccessRefused`, with the reason: there, process ids would mean other processes",
    ),
    21: Fault(
        "`/dev/shm` is full, when a ring is made or when it grows",
        "`SharedMemoryFull` (an `OSError`, ENOSPC) names the size and the remedy, nothing is left "
        "behind; a `put` that fits what is there waits for a reader",
    ),
    22: Fault(
        "The file of a ring is truncated",
        "As with every mapped file, the kernel sends SIGBUS to a process that touches the missing "
        "part; only the owner of the file can truncate it",
    ),
    23: Fault(
        "Random bytes in the header, in frames, in lengths that are being read",
        "`RingCorrupted`, or the right data, in bounded time; never a crash",
    ),
    24: Fault(
        "Garbage in a lock word",
        "`RingCorrupted` if it names no living thread, else the time-out of the waiters",
    ),
    25: Fault(
        "The record of an area points outside the file, or into an area in use",
        "`RingCorrupted`; nothing is written or punched there",
    ),
    26: Fault(
        "Positions that cannot be",
        "The ring is poisoned: every process that uses it gets `RingCorrupted`",
    ),
    27: Fault(
        "Attaching while the ring is being made; its maker is stopped or killed on the way",
        "A name appears only when the ring is complete, so attaching waits, up to its timeout, and "
        "then says that there is none; the name can be used again",
    ),
    28: Fault(
        "Two cleaners at once; a cleaner while a process attaches",
        "One removes the name, the other finds nothing; a process that has attached keeps a ring "
        "with a name",
    ),
    29: Fault(
        "Another user opens the ring",
        "`AccessRefused` (a `PermissionError`, EACCES)",
    ),
    30: Fault(
        "The name is taken already: by a foreign file, a symlink, a file of another user or one "
        "that is open to others",
        "Attaching and making are refused with the reason; what stands there is neither followed, "
        "written to nor removed",
    ),
    31: Fault(
        "Ctrl-C while blocked in `put`, `get`, `join`, or waiting for a lock",
        "`KeyboardInterrupt` within 100 ms, whatever other threads do",
    ),
    32: Fault(
        "Signals come faster than the wait lasts",
        "Handlers run, and the deadline stays what it was",
    ),
    33: Fault(
        "`close` while a view lives, or while another thread is inside",
        "`BufferError`, and closing again after the view's end succeeds; a thread that waits gets "
        "`RingClosed`",
    ),
    34: Fault(
        "The interpreter ends while a daemon thread is blocked inside",
        "It ends at once, and the other processes go on",
    ),
    35: Fault(
        "The file was laid out by another version, or is no ring at all",
        "`LayoutMismatch`, with both versions, or with what the file begins with",
    ),
    36: Fault(
        "The kernel, or the emulator, has no robust futexes",
        "The fallback serves, with a warning that gives the reason",
    ),
    37: Fault(
        "Every process of a named queue is killed",
        "`cleanup_stale()` and `shmring rm --stale` remove what is left of it and nothing else; "
        "making the name anew needs neither",
    ),
    38: Fault(
        'A hostile pickle on a queue with `codec="bytes"` or `"msgpack"`',
        "It is never loaded: bytes stay bytes, and a frame of another codec is a `DecodeError`",
    ),
    39: Fault(
        "A consumer dies between `get` and `task_done`",
        "`join()` waits, as in the standard library; its `timeout` ends that, and with `peers=` it "
        "raises `PeerDied` when no process is left that could report",
    ),
    40: Fault(
        "No descriptors, no address space or no file size left while making a ring, attaching, "
        "growing, or mapping what another has grown",
        "The call fails, names what is missing, and can be repeated; the message is "
        "still there, and the ring serves the others",
    ),
    41: Fault(
        "The name is removed from outside (`rm`, or the desktop's clean-up at logout)",
        "Attached processes go on, a `get` that waits says so in the log; `attach` raises "
        "`RingNotFound`",
    ),
    42: Fault(
        "One consumer takes two sentinels in one batch",
        "It puts the second back, and another one ends by it; workers take one message at a time, "
        "so theirs never holds two",
    ),
    43: Fault(
        "The interpreter ends with daemon threads inside a call, or after the globals are gone",
        "Nothing is printed, nothing is left",
    ),
    44: Fault(
        "`close()` from several threads, beside any other call, or in a signal "
        "handler that interrupted a call of its thread",
        "It returns at once, each descriptor is closed once, and the calls raise `RingClosed`",
    ),
    45: Fault(
        "`os.fork` without multiprocessing, parents that leave by `os._exit`, a fork "
        "while another thread is inside a call",
        "The last process gives the name back, and the child's handle works",
    ),
    46: Fault(
        "Warnings are errors, and an open handle is dropped",
        "It leaves and gives its name back before it warns",
    ),
    47: Fault(
        "Descriptors are closed behind the handle and their numbers used again",
        "No other file is touched or closed",
    ),
    48: Fault(
        "An exception while a batch is decoded",
        "It carries the other objects of the batch as `items`",
    ),
    49: Fault(
        "`worker_process` is entered again in a process; a task's time runs out "
        "at the moment when it ends",
        "Each task is answered once, and only an overdue one is charged",
    ),
    50: Fault(
        "An index that answers differently when it is asked again",
        "It is asked once",
    ),
    51: Fault(
        "The receiver of a lent block dies, closes, forks or sends it on; its sender dies between"
        " block and message; /dev/shm is full",
        "The block comes back, and no view shows memory that was lent anew; where there is no"
        " memory, buffers are copied",
    ),
}


@dataclass(frozen=True, slots=True)
class Shown:
    """A test that bears the marks of some faults."""

    path: str  # from tests/
    name: str
    faults: tuple[int, ...]
    torture: bool


def files_with_tests() -> list[Path]:
    """Every file in which pytest looks for tests."""
    return sorted(TESTS.rglob("test_*.py"))


@functools.cache
def marked_tests() -> list[Shown]:
    """Every test that bears a fault's mark, in the order of the files."""
    return [each for path in files_with_tests() for each in _marked_in(path)]


def _marked_in(path: Path) -> Iterator[Shown]:
    tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
    whole = any(
        isinstance(node, ast.Assign)
        and ast.unparse(node.targets[0]) == "pytestmark"
        and "pytest.mark.torture" in ast.unparse(node.value)
        for node in tree.body
    )
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        faults = [
            number
            for decorator in node.decorator_list
            for call in ast.walk(decorator)
            if isinstance(call, ast.Call) and ast.unparse(call.func) == "pytest.mark.fault"
            for number in map(ast.literal_eval, call.args)
        ]
        if faults:
            long = any(ast.unparse(each) == "pytest.mark.torture" for each in node.decorator_list)
            yield Shown(path.relative_to(TESTS).as_posix(), node.name, tuple(faults), whole or long)


def page(shown: list[Shown]) -> str:
    """What is to stand in docs/faults.md."""
    lines = [
        "# Faults: what comes of each, and the tests that show it",
        "",
        "Written by `make faults` from the marks on the tests (`@pytest.mark.fault(13)`) and the",
        "table in `tests/faults.py`; not edited by hand. Tests in *italics* are long and run by",
        "`make torture`, all others by `make test`. Paths are below `tests/`.",
        "",
        "| # | what happens | what comes of it | shown by |",
        "|---|---|---|---|",
    ]
    for number, fault in sorted(FAULTS.items()):
        by = _tests_of(number, shown)
        lines.append(f"| {number} | {fault.happens} | {fault.outcome} | {by} |")
    return "\n".join(lines) + "\n"


def _tests_of(number: int, shown: list[Shown]) -> str:
    by_path: dict[str, list[str]] = {}
    for each in shown:
        if number in each.faults:
            name = f"*`{each.name}`*" if each.torture else f"`{each.name}`"
            by_path.setdefault(each.path, []).append(name)
    return "; ".join(f"{path}: {', '.join(names)}" for path, names in by_path.items())


if __name__ == "__main__":
    PAGE.write_text(page(marked_tests()), encoding="utf-8")
