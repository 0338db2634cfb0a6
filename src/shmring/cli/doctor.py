"""``shmring doctor``: what this machine can do, and what to do about the rest."""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import errno
import os
import platform
import shutil
import sys
import warnings
from importlib.util import find_spec
from typing import NamedTuple

from shmring.cli.common import WRONG, dump, show, size

__all__ = ["Check", "checks", "doctor"]

_LEAST_SHM = 64 << 20
_SYS_FUTEX_WAITV = 449  # on every architecture
_SYS_GET_ROBUST_LIST = {"x86_64": 274, "aarch64": 100}


class Check(NamedTuple):
    """One line of the doctor.

    Attributes:
        name: what was looked at.
        state: "ok", "note" (works, with a limit) or "bad".
        found: what is there.
        remedy: what to do; empty where nothing is to be done.
    """

    name: str
    state: str
    found: str
    remedy: str = ""


def doctor(options: argparse.Namespace) -> int:
    """Print what was checked; 1 if anything is bad."""
    found = checks()
    bad = any(each.state == "bad" for each in found)
    if options.json:
        print(dump({"ok": not bad, "checks": [each._asdict() for each in found]}))
        return WRONG if bad else 0
    for each in found:
        show([f"{each.state:<5} {each.name:<16} {each.found}"])
        if each.remedy:
            show([f"      {'':<16} -> {each.remedy}"])
    return WRONG if bad else 0


def checks() -> list[Check]:
    """Look at everything; a check that fails itself is a note."""
    found = []
    for look in (
        _back_end,
        _python,
        _kernel,
        _robust_futexes,
        _futex_waitv,
        _shared_memory,
        _default_limit,
        _memory_limit,
        _proc,
        _seccomp,
        _compiler,
        _extras,
    ):
        try:
            found.append(look())
        except Exception as error:
            name = look.__name__.strip("_").replace("_", " ")
            found.append(Check(name, "note", f"cannot be told: {type(error).__name__}: {error}"))
    return found


def _back_end() -> Check:
    wanted = os.environ.get("SHMRING_BACKEND", "")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            from shmring import _backend
        except ImportError as error:
            return Check("back end", "bad", str(error), "unset SHMRING_BACKEND, or reinstall")
    if _backend.backend == "ring":
        return Check("back end", "ok", "ring: the compiled extension")
    if wanted == "queue":
        return Check("back end", "note", "queue: SHMRING_BACKEND=queue asks for the fallback")
    reason = str(caught[0].message) if caught else "a module of the extension is missing"
    if not caught:  # it was imported, and the reason told, before
        try:
            from shmring._core import object_ring  # noqa: F401
        except ImportError as error:
            reason = str(error)
    return Check("back end", "bad", f"queue, the fallback: {reason}", "see the lines below")


def _python() -> Check:
    gil = getattr(sys, "_is_gil_enabled", lambda: True)()
    kind = "" if gil else ", free-threaded"
    text = f"{platform.python_implementation()} {platform.python_version()}{kind}"
    return Check("python", "ok", f"{text} on {platform.machine()}, {' '.join(platform.libc_ver())}")


def _kernel() -> Check:
    text = f"{platform.system()} {platform.release()}"
    if sys.platform != "linux":
        return Check("kernel", "bad", text, "the ring is Linux only: here the fallback serves")
    return Check("kernel", "ok", text)


def _syscall(number: int, *arguments: object) -> int:
    """The errno of a system call; 0 if it went well."""
    libc = ctypes.CDLL(None, use_errno=True)
    ctypes.set_errno(0)
    return 0 if libc.syscall(number, *arguments) >= 0 else ctypes.get_errno()


def _robust_futexes() -> Check:
    number = _SYS_GET_ROBUST_LIST.get(platform.machine())
    if number is None:
        return Check("robust futexes", "note", f"not looked for on {platform.machine()}")
    head, length = ctypes.c_void_p(), ctypes.c_size_t()
    error = _syscall(number, 0, ctypes.byref(head), ctypes.byref(length))
    if error:
        return Check(
            "robust futexes",
            "bad",
            f"get_robust_list: {os.strerror(error)}",
            "allow get_robust_list in the sandbox; emulators without it get the fallback",
        )
    return Check("robust futexes", "ok", "the kernel frees a lock whose owner dies")


def _futex_waitv() -> Check:
    error = _syscall(_SYS_FUTEX_WAITV, None, 0, 0, None, 0)
    if error in (errno.ENOSYS, errno.EPERM):
        return Check(
            "futex_waitv",
            "note",
            f"{os.strerror(error)}: shmring.wait looks every 2 ms",
            "Linux 5.16 or later, and a sandbox that allows it, wake it at once",
        )
    return Check("futex_waitv", "ok", "shmring.wait sleeps on all rings at once")


def _shared_memory() -> Check:
    found = os.statvfs("/dev/shm")
    total, free = found.f_blocks * found.f_frsize, found.f_bavail * found.f_frsize
    text = f"{size(total)}, {size(free)} free"
    if not os.access("/dev/shm", os.W_OK):
        return Check("/dev/shm", "bad", f"{text}, not writable", "mount a writable tmpfs there")
    if free < _LEAST_SHM:
        remedy = "shmring rm --stale; for containers --shm-size=1g, else mount -o remount,size=1g"
        return Check("/dev/shm", "bad" if free < _LEAST_SHM // 8 else "note", text, remedy)
    from shmring.shm.segment import create_anonymous

    os.close(create_anonymous(4096))
    return Check("/dev/shm", "ok", text)


def _default_limit() -> Check:
    from shmring.shm.segment import default_max_capacity

    return Check("max_capacity", "ok", f"a queue grows to {size(default_max_capacity())} at most")


def _memory_limit() -> Check:
    parts = []
    limit = _first_line("/sys/fs/cgroup/memory.max")
    if limit not in (None, "max"):
        parts.append(f"memory cgroup {size(int(str(limit)))}")
    pids = _first_line("/sys/fs/cgroup/pids.max")
    if pids not in (None, "max"):
        parts.append(f"{pids} processes and threads")
    cpu = _first_line("/sys/fs/cgroup/cpu.max")
    if cpu is not None and not cpu.startswith("max"):
        quota, period = map(int, cpu.split())
        parts.append(f"{quota / period:g} cores")
    container = _container()
    if container:
        parts.append(f"in a container ({container})")
    import resource

    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    parts.append(f"{files} open files: one for each queue handle")
    if files < 256:
        return Check("limits", "note", ", ".join(parts), "raise it: ulimit -n 4096")
    return Check("limits", "ok", ", ".join(parts))


def _container() -> str:
    for path, name in (("/.dockerenv", "docker"), ("/run/.containerenv", "podman")):
        if os.path.exists(path):
            return name
    return os.environ.get("container", "")  # noqa: SIM112 (systemd's spelling)


def _proc() -> Check:
    from shmring.shm.segment import pid_namespace

    if not pid_namespace():
        return Check("/proc", "bad", "not mounted", "mount it: names and shmring ls need it")
    return Check("/proc", "ok", f"PID namespace {pid_namespace()}: only its processes can share")


def _seccomp() -> Check:
    with open("/proc/self/status") as file:
        status = dict(line.rstrip("\n").split(":\t", 1) for line in file if ":\t" in line)
    modes = {"0": "off", "1": "strict", "2": "a filter"}
    mode = modes.get(status.get("Seccomp", ""), "unknown")
    refused = []
    with contextlib.suppress(AttributeError):
        try:
            os.close(os.memfd_create("shmring"))
        except OSError:
            refused.append("memfd_create")
        try:
            os.close(os.pidfd_open(os.getpid()))
        except OSError:
            refused.append("pidfd_open")
    if refused:
        remedy = f"allow {', '.join(refused)} in the sandbox"
        return Check("seccomp", "note", f"{mode}; {', '.join(refused)} refused", remedy)
    return Check("seccomp", "ok", mode)


def _compiler() -> Check:
    import sysconfig

    compiler = (os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc").split()[0]
    header = os.path.join(sysconfig.get_paths()["include"], "Python.h")
    missing = [compiler] if shutil.which(compiler) is None else []
    missing += ["Python.h"] if not os.path.exists(header) else []
    if missing:
        return Check(
            "compiler",
            "note",
            f"{' and '.join(missing)} missing: only wheels can be installed",
            "install a C compiler and Python's headers to build from source",
        )
    return Check("compiler", "ok", f"{shutil.which(compiler)}, with Python's headers")


def _extras() -> Check:
    extras = {
        "numpy": "numpy",
        "msgspec": "msgpack",
        "rich": "cli",
        "prometheus_client": "metrics",
        "opentelemetry": "otel",
        "argcomplete": "completion",
        "psutil": "pool",
        "joblib": "joblib",
        "distributed": "dask",
        "torch": "torch",
    }
    there = [extra for module, extra in extras.items() if find_spec(module) is not None]
    return Check("extras", "ok", ", ".join(there) or "none installed")


def _first_line(path: str) -> str | None:
    try:
        with open(path) as file:
            return file.readline().strip()
    except OSError:
        return None
