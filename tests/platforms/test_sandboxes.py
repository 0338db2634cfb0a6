"""Old kernels, containers and sandboxes: the ring, or the fallback and the reason, and no crash."""

from __future__ import annotations

import errno
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

import seccomp
import shmring
from seccomp import Refusal

if shmring.backend != "ring" or platform.machine() not in seccomp.MACHINES:
    pytest.skip(
        "no ring, or a machine without system call numbers in seccomp.py", allow_module_level=True
    )

TMPFILE = 0o20000000  # the bit that O_DIRECTORY is not
MADV_WIPEONFORK = 18

# What Docker's default profile refuses of what a Python program may try.
DOCKER = [
    Refusal(call, errno.EPERM)
    for call in ("kcmp", "ptrace", "process_vm_readv", "unshare", "sched_setaffinity")
]


def without_tmpfile(error: int) -> list[Refusal]:
    """By the call of glibc, and by that of musl."""
    return [
        Refusal("openat", error, argument=2, bits=TMPFILE),
        Refusal("open", error, argument=1, bits=TMPFILE),
    ]


# In which the ring works: with less, but without an error.
WITH_RING = {
    "Linux before 5.16": [Refusal("futex_waitv")],
    "Linux before 5.3": [
        Refusal("futex_waitv"),
        Refusal("pidfd_open"),
        Refusal("pidfd_send_signal"),
    ],
    "Linux before 4.14": [
        Refusal("madvise", errno.EINVAL, argument=2, equals=MADV_WIPEONFORK),
        Refusal("futex_waitv"),
        Refusal("pidfd_open"),
    ],
    "no O_TMPFILE": without_tmpfile(errno.EOPNOTSUPP),
    "Linux before 3.11": without_tmpfile(errno.EISDIR),
    "Docker": DOCKER,
    "Docker, which does not know the new calls": [
        *DOCKER,
        *(Refusal(call, errno.EPERM) for call in ("futex_waitv", "pidfd_open", "memfd_create")),
    ],
    "gVisor": [
        *(Refusal(call) for call in ("futex_waitv", "kcmp", "process_vm_readv", "getcpu")),
        Refusal("madvise", errno.EINVAL, argument=2, equals=MADV_WIPEONFORK),
    ],
    "links refused": [Refusal("linkat", errno.EPERM)],
}
# Where no block can be named, and the error says why.
NAMELESS = ["no O_TMPFILE", "Linux before 3.11", "links refused"]
# In which it cannot; part of what the warning says.
WITHOUT_RING = {
    "no robust lists": ([Refusal("get_robust_list")], "has no robust futexes"),
    "robust lists refused": ([Refusal("get_robust_list", errno.EPERM)], "has no robust futexes"),
}

PRELUDE = """
import contextlib, multiprocessing, os, signal, sys, threading
import seccomp
from seccomp import Refusal
seccomp.refuse(*{refusals!r})
import shmring
print(shmring.backend)
"""
SCENE = """
def child(queue, answers):
    for obj in iter(queue.get, None):
        answers.put(obj)

def hold(ring):
    with ring.peek():
        os.kill(os.getpid(), signal.SIGKILL)

if __name__ == "__main__":
    for method in ("fork", "spawn"):
        context = multiprocessing.get_context(method)
        queue, answers = shmring.Queue(ctx=context), shmring.JoinableQueue(ctx=context)
        started = context.Process(target=child, args=(queue, answers))
        started.start()
        for obj in (1, {"a": [2]}, b"x" * 300_000, None):
            queue.put(obj, timeout=60)
        assert answers.get(timeout=60) == 1
        if shmring.backend == "ring":
            other = shmring.Queue()
            threading.Timer(0.2, other.put, ("late",)).start()
            ready = shmring.wait([other, started], 60)
            assert ready, ready
            other.get(timeout=60)
            other.close()
        assert answers.get(timeout=60) == {"a": [2]}
        assert len(answers.get(timeout=60)) == 300_000
        started.join(60)
        assert started.exitcode == 0
        for _ in range(3):
            answers.task_done()
        answers.join()
    if shmring.backend == "ring":
        with shmring.Ring.create() as ring:
            ring.put(b"front")
            started = multiprocessing.get_context("fork").Process(target=hold, args=(ring,))
            started.start()
            os.waitid(os.P_PID, started.pid, os.WEXITED | os.WNOWAIT)  # it stays a zombie
            assert ring.get(timeout=60) == b"front"
            started.join(60)
        with shmring.Queue() as queue:
            started = multiprocessing.get_context("fork").Process(target=os._exit, args=(1,))
            started.start()
            os.waitid(os.P_PID, started.pid, os.WEXITED | os.WNOWAIT)
            try:
                queue.get(timeout=60, peers=[started])
            except shmring.PeerDied:
                print("died")
            started.join(60)
        try:
            with shmring.Queue(name={name!r}) as queue, shmring.Queue.attach({name!r}) as same:
                queue.put("named")
                print(same.get(timeout=60))
        except shmring.AccessRefused as refused:
            print("no name:", refused)
    print("end")
"""


def run_there(
    refusals: list[Refusal], tmp_path: Path, **environment: str
) -> subprocess.CompletedProcess[str]:
    program = tmp_path / "scene.py"
    prelude = PRELUDE.format(refusals=refusals)
    program.write_text(prelude + SCENE.replace("{name!r}", repr(f"test-sandbox-{os.getpid()}")))
    path = os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")]))
    kept = {name: os.environ[name] for name in os.environ if name != "SHMRING_BACKEND"}
    return subprocess.run(
        [sys.executable, program],
        env={**kept, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


@pytest.mark.parametrize("sandbox", WITH_RING)
def test_the_ring_works_with_what_is_left(sandbox, tmp_path):
    done = run_there(WITH_RING[sandbox], tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert lines[0] == "ring"
    assert "died" in lines
    assert lines[-1] == "end"
    if sandbox in NAMELESS:
        assert "cannot be made: " in done.stdout
    else:
        assert "named" in lines


@pytest.mark.parametrize("sandbox", WITHOUT_RING)
def test_the_fallback_serves_where_the_ring_cannot_and_says_why(sandbox, tmp_path):
    refusals, reason = WITHOUT_RING[sandbox]
    done = run_there(refusals, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == "queue"
    assert done.stdout.splitlines()[-1] == "end"
    assert "RuntimeWarning: shmring runs on its fallback" in done.stderr
    assert reason in done.stderr
