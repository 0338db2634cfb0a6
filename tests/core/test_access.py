"""Access to named blocks, and what prevents a name."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pytest.importorskip("shmring._core.ring", exc_type=ImportError)

import shmring
from shmring import (
    AccessRefused,
    Queue,
    Ring,
    RingExists,
    RingNotFound,
    SharedMemoryManager,
    ShmringError,
    cleanup_stale,
)
from shmring.cli.main import main
from shmring.ipc.registry import open_segment
from shmring.shm import segment
from support import own_name, run_in_process, run_with_mounts

pytestmark = pytest.mark.usefixtures("only_cleaner")

NAME = own_name("access")
PATH = Path("/dev/shm", NAME)
OTHER_USER = 65534

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")


def as_another_user(action: Callable[[], object]) -> None:
    """Run something as another user, in a child, and have it succeed."""

    def drop_and_act() -> None:
        os.setgroups([])
        os.setgid(OTHER_USER)
        os.setuid(OTHER_USER)
        action()

    with run_in_process(drop_and_act) as child:
        child.join(30)
        assert child.exitcode == 0


@contextlib.contextmanager
def memory() -> Iterator[SharedMemoryManager]:
    with SharedMemoryManager(NAME, 100) as made:
        assert made.create()
        yield made


MADE = {
    "ring": (lambda: Ring.create(name=NAME), lambda: Ring.attach(NAME)),
    "queue": (lambda: Queue(name=NAME), lambda: Queue.attach(NAME)),
    "memory": (memory, lambda: SharedMemoryManager(NAME, 100).connect()),
    "registry": (lambda: contextlib.closing(open_segment(NAME)), lambda: open_segment(NAME)),
}
made = pytest.mark.parametrize(("make", "attach"), MADE.values(), ids=MADE)


# ---- another PID namespace -----------------------------------------------------------------

ELSEWHERE = """
import os, sys, shmring, shmring.ipc.registry
assert os.getpid() == 1, "no PID namespace of its own"
name = sys.argv[1]
for attach in (
    lambda: shmring.Ring.attach(name + "-ring"),
    lambda: shmring.Queue.attach(name + "-queue"),
    lambda: shmring.SharedMemoryManager(name + "-memory", 100).connect(),
    lambda: shmring.ipc.registry.open_segment(name + "-registry"),
):
    try:
        attach()
    except shmring.AccessRefused as refused:
        print(refused)
"""


@pytest.mark.fault(20)
@pytest.mark.parametrize("mount", [[], ["--mount-proc"]], ids=["their /proc", "its own /proc"])
def test_another_pid_namespace_is_refused_with_the_reason(mount):
    if shutil.which("unshare") is None:
        pytest.skip("there is no unshare(1) to make a PID namespace with")
    with (
        Ring.create(name=NAME + "-ring") as ring,
        Queue(name=NAME + "-queue"),
        SharedMemoryManager(NAME + "-memory", 100) as memory,
        contextlib.closing(open_segment(NAME + "-registry")),
    ):
        assert memory.create()
        done = subprocess.run(
            ["unshare", "--pid", "--fork", *mount, sys.executable, "-c", ELSEWHERE, NAME],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        if done.stderr.startswith("unshare"):
            pytest.skip(f"no PID namespace to be had here: {done.stderr.strip()}")
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("created in another PID namespace") == 4, done.stdout
        assert done.stdout.count("--pid") == 4
        ring.put(b"x")
        assert ring.get() == b"x"


# ---- another user --------------------------------------------------------------------------


@as_root
@made
@pytest.mark.fault(29)
def test_another_user_is_refused(make, attach):
    def be_refused() -> None:
        with pytest.raises(AccessRefused, match="Permission denied") as caught:
            attach()
        assert caught.value.errno == errno.EACCES
        assert isinstance(caught.value, PermissionError)
        with pytest.raises(RingExists, match="not ours"):
            Ring.create(name=NAME)
        assert SharedMemoryManager(NAME, 10).create() is False
        assert NAME not in cleanup_stale()

    with make():
        as_another_user(be_refused)
        assert PATH.exists()


@as_root
@pytest.mark.fault(29, 37)
def test_what_another_user_left_is_his():
    """Also for root, which could open and remove it."""

    def leave_it() -> None:
        _ring = Ring.create(name=NAME)
        os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(AssertionError, match="-9"):
        as_another_user(leave_it)
    try:
        assert PATH.stat().st_uid == OTHER_USER
        assert NAME not in cleanup_stale()
        with pytest.raises(AccessRefused, match=f"belongs to user {OTHER_USER}"):
            Ring.attach(NAME)
        with pytest.raises(RingExists, match="not ours"):
            Ring.create(name=NAME)
        as_another_user(lambda: contextlib.closing(Ring.create(name=NAME)).__exit__())
        assert not PATH.exists(), "its owner can remove it"
    finally:
        PATH.unlink(missing_ok=True)


# ---- something that stands there already -----------------------------------------------------


def foreign_file() -> None:
    PATH.write_bytes(b"another user's" * 1000)
    PATH.chmod(0o600)


def empty_file() -> None:
    PATH.touch(0o600)


def open_to_all() -> None:
    with Ring.create(name=NAME + "-2") as ring:
        ring.put(b"x")
        os.link(f"/dev/shm/{NAME}-2", PATH)
    PATH.chmod(0o644)


def of_another_user() -> None:
    foreign_file()
    os.chown(PATH, OTHER_USER, -1)


def symlink_to(target: Path) -> Callable[[], None]:
    return lambda: PATH.symlink_to(target)


def listening_socket() -> None:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(PATH))
    PATH.chmod(0o600)


A_LINK = os.strerror(errno.ELOOP)  # musl words it otherwise

VICTIM = Path("/dev/shm", NAME + "-victim")
SQUATTED = {  # and what attaching says
    "foreign file": (foreign_file, "begins with"),
    "empty file": (empty_file, "not a ring|has 0 bytes"),
    "file open to all": (open_to_all, "mode 644"),
    "file of another user": (of_another_user, f"belongs to user {OTHER_USER}"),
    "directory": (lambda: PATH.mkdir(0o700), "Is a directory"),
    "fifo": (lambda: os.mkfifo(PATH, 0o600), "not a regular file"),
    "socket": (listening_socket, "cannot be opened"),
    "symlink to nothing": (
        symlink_to(VICTIM.with_name(NAME + "-nothing")),
        A_LINK,
    ),
    "symlink to a file": (symlink_to(VICTIM), A_LINK),
    "symlink to a ring": (symlink_to(VICTIM.with_name(NAME + "-ring")), A_LINK),
}


@pytest.mark.fault(30)
@pytest.mark.parametrize(("squat", "said"), SQUATTED.values(), ids=SQUATTED)
def test_a_name_that_is_taken_is_refused_and_left_alone(squat, said):
    if squat is of_another_user and os.geteuid() != 0:
        pytest.skip("only root can give a file away")
    VICTIM.write_bytes(b"precious" * 4000)
    VICTIM.chmod(0o600)
    try:
        with Ring.create(name=NAME + "-ring") as ring:
            ring.put(b"kept")
            squat()
            before = os.lstat(PATH)
            for attach in (
                lambda: Ring.attach(NAME),
                lambda: Queue.attach(NAME),
                lambda: SharedMemoryManager(NAME, 10).connect(),
            ):
                with pytest.raises(ShmringError, match=said):
                    attach()
            for make in (lambda: Ring.create(name=NAME), lambda: Queue(name=NAME)):
                with pytest.raises(RingExists, match="in use, or is not ours"):
                    make()
            assert SharedMemoryManager(NAME, 10).create() is False
            assert NAME not in cleanup_stale()
            after = os.lstat(PATH)
            assert (after.st_ino, after.st_size, after.st_mtime_ns, after.st_mode) == (
                before.st_ino,
                before.st_size,
                before.st_mtime_ns,
                before.st_mode,
            )
            assert ring.get() == b"kept"
        assert VICTIM.read_bytes() == b"precious" * 4000
    finally:
        VICTIM.unlink()
        if stat.S_ISDIR(os.lstat(PATH).st_mode):
            PATH.rmdir()
        else:
            PATH.unlink()


@pytest.mark.fault(30)
@pytest.mark.parametrize("mode", [0o640, 0o604, 0o666, 0o601])
@made
def test_a_mode_that_lets_others_in_is_refused(make, attach, mode):
    with make():
        PATH.chmod(mode)
        with pytest.raises(AccessRefused, match=f"has mode {mode:o}: it must be closed to others"):
            attach()
        PATH.chmod(0o600)
    assert not PATH.exists()


@pytest.mark.fault(29)
@made
def test_what_is_made_is_closed_to_others_whatever_the_umask(make, attach):
    before = os.umask(0)
    try:
        with make():
            assert stat.S_IMODE(PATH.stat().st_mode) == 0o600
    finally:
        os.umask(before)


# ---- no place ------------------------------------------------------------------------------


def _double(there: Queue[int], back: Queue[int]) -> None:
    back.put(2 * there.get(timeout=30))


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOENT])
def test_a_place_that_takes_no_files_is_done_without(monkeypatch, start_method, number):
    plainly = os.open

    def refuse(path, *args, **kwargs):
        if path == segment.DIRECTORY:
            raise OSError(number, os.strerror(number), path)
        return plainly(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", refuse)
    with (
        Queue() as there,
        Queue() as back,
        run_in_process(_double, there, back, method=start_method),
    ):
        there.put(21)
        assert back.get(timeout=60) == 42
        for _ in range(2):
            with pytest.raises(AccessRefused, match="memfd") as refused:
                there.name  # noqa: B018
            assert "unlinked" not in str(refused.value)
        with pytest.raises(RingNotFound, match="has no name"):
            there.unlink()


WITHOUT_PLACE = """
import multiprocessing, sys
import shmring
from shmring.cli.main import main

print("removed", shmring.cleanup_stale())
with shmring.Queue() as there, shmring.JoinableQueue() as back:
    child = multiprocessing.get_context("fork").Process(target=lambda: back.put(2 * there.get()))
    child.start()
    there.put(21)
    print("got", back.get(timeout=30))
    child.join(30)
    for name in (lambda: there.name, lambda: shmring.Queue(name="shmring-test")):
        try:
            print("named", name())
        except shmring.AccessRefused as refused:
            print("refused:", refused)
sys.stdout.flush()
sys.exit(main(["ls"]))
"""
NULL_ALONE = "touch /mnt/null && mount --bind /dev/null /mnt/null && mount --move /mnt /dev"


@pytest.mark.parametrize(
    ("mounts", "why", "status"),
    [
        ("mount -t tmpfs -o ro none /dev/shm", "Read-only file system", 0),
        (f"mount -t tmpfs none /mnt && {NULL_ALONE}", "there is no /dev/shm", 0),
        ("mount -t tmpfs none /dev/shm && umount -l /proc", "/proc is not mounted", 1),
    ],
    ids=["read-only", "missing", "no proc"],
)
def test_a_real_place_that_takes_no_files_is_done_without(mounts, why, status):
    done = run_with_mounts(mounts, WITHOUT_PLACE)
    told = done.stdout.splitlines()[:4]
    assert told[:2] == ["removed []", "got 42"], done
    assert all(line.startswith("refused: ") and why in line for line in told[2:]), told
    assert done.returncode == status, done
    assert "Traceback" not in done.stderr
    if status:
        assert done.stderr.count("\n") == 1
        assert why in done.stderr


def test_a_missing_place_is_nothing_to_look_at(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(segment, "DIRECTORY", str(tmp_path / "nothing"))
    assert shmring.cleanup_stale() == []
    assert main(["rm", "--stale"]) == 0
    assert capsys.readouterr().out == f"there is no {segment.DIRECTORY}: nothing to look at\n"


def test_a_place_that_may_not_be_read_is_named(monkeypatch, capsys):
    def refuse(path):
        raise PermissionError(errno.EACCES, "Permission denied", path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(AccessRefused, match="/dev/shm cannot be opened: Permission denied"):
        shmring.cleanup_stale()
    for command in (["rm", "--stale"], ["ls"]):
        assert main(command) == 1
        assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("call", ["posix_fallocate", "memfd_create"])
def test_memory_that_is_refused_is_explained(monkeypatch, call):
    def refuse(*args):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, call, refuse)
    if call == "memfd_create":
        monkeypatch.setattr(segment, "DIRECTORY", "/dev/shm/nothing")
    with pytest.raises(
        PermissionError, match=r"bytes of shared memory cannot be had from /dev/shm"
    ) as error:
        Queue()
    assert error.value.errno == errno.EPERM
    assert "Operation not permitted; mount a writable tmpfs" in str(error.value)
    if call == "posix_fallocate":
        assert re.search(r"\(\d+ bytes, \d+ of them free\)", str(error.value))


def test_a_name_that_was_unlinked_is_said_to_be():
    with Queue(name=NAME) as queue:
        queue.unlink()
        with pytest.raises(RingNotFound, match="was unlinked"):
            queue.name  # noqa: B018
