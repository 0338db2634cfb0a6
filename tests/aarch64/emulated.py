"""shmring built for aarch64, and tested under qemu-user: ``make qemu-aarch64``.

Nothing of the machine is changed but that ``--install`` installs the compiler
and the emulator.  Below build/aarch64 there come to stand: a root with Debian's
Python of the other architecture, unpacked and not installed; the wheels that
the tests need; the cross-compiled extension; and a copy of this tree with it.

qemu-user emulates the calls of a Linux kernel without robust lists.  So two
things are run there: the product as it is, which has to choose its fallback;
and the same extension behind ``robust_lists.c``, by which it gets to run.  Of
the ring's tests, those are left out then in which a lock is left by the dead.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
PLACE = ROOT / "build" / "aarch64"
SYSROOT = PLACE / "sysroot"
WHEELS = PLACE / "wheels"
EXTENSION = PLACE / "extension"
TREE = PLACE / "tree"

COMPILER = "aarch64-linux-gnu-gcc"
EMULATOR = "qemu-aarch64"
NEEDED = {COMPILER: "gcc-aarch64-linux-gnu", EMULATOR: "qemu-user"}  # by Debian's package
UNPACKED = ["python3", "libpython3-dev", "libstdc++6"]
TEST_WHEELS = ["hypothesis", "msgspec", "numpy", "psutil", "pytest>=9"]
LITMUS_ROUNDS = "1000000"
SKIP = 77  # the exit status of what could not be tried

FALLBACK_TESTS = [
    "registry",
    "fallback",
    "imports",
    "ipc",
    "ipc_memory",
    "task_table",
    "message",
]
RING_TESTS = [
    "closing",
    "codecs",
    "memory",
    "message",
    "poked",
    "queue",
    "ring",
    "builtin_codec",
    "unbounded",
    "wait",
]
# Words in the names of tests that fail there for the emulator's sake.
SLOW = ["spawn", "forkserver", "grandchild"]  # an interpreter starts for longer than a test waits
# A child that is forked beside threads: the emulator itself may abort.
FORKED = ["fork", "ends_without_cleanup"]
NOT_EMULATED = [
    "address_space",  # RLIMIT_AS
    "_put_with_none",
    "block_is_being_entered",  # these five fork beside threads
    "while_get_many_decodes",
    "in_a_forked_child",
    "from_an_unrelated_program",
    "after_unlink_it_cannot_be_named",
    "shutdown_waits_for_the_lock",
    "fallback",  # whose queues have threads
    "is_closed_by_two",  # these five start threads in a forked child, or fork beside them
    "close_one_handle_at_once",
    "end_in_other_threads",
    "close_in_a_signal_handler",
    "cleanup_in_a_signal_handler",
    "a_put_wakes_it",  # these four trace
    "passes_the_wake_on",
    "passes_the_wake_up_on",
    "killed_under_the_lock",
]


class CannotTryError(Exception):
    """Something is missing that only the machine's owner can give."""


def run(*command: str | Path, env: Mapping[str, str] | None = None, cwd: Path = ROOT) -> None:
    """Run a program of this machine, or of the other one."""
    subprocess.run(command, check=True, cwd=cwd, env={**os.environ, **(env or {})})


def done_before(stamp: Path, key: str) -> bool:
    """Whether a step was finished with the same input."""
    return stamp.exists() and stamp.read_text() == key


# ---- what is needed ---------------------------------------------------------------------------


def find_tools(install: bool) -> None:
    """The cross-compiler and the emulator; with `install` they are installed."""
    for tool in ("apt-get", "dpkg"):
        if shutil.which(tool) is None:
            raise CannotTryError(f"there is no {tool}: this is made for Debian")
    missing = [package for tool, package in NEEDED.items() if shutil.which(tool) is None]
    if missing and not install:
        raise CannotTryError(f"not installed: {', '.join(missing)}; `make qemu-aarch64` does")
    if missing:
        wait = "DPkg::Lock::Timeout=600"
        run("apt-get", "update", "-q")
        run(
            *("apt-get", "install", "-y", "-q", "--no-install-recommends", "-o", wait, *missing),
            env={"DEBIAN_FRONTEND": "noninteractive"},
        )


def unpack_python() -> None:
    """Debian's Python for aarch64, and all it stands on, below SYSROOT."""
    stamp = PLACE / ".sysroot"
    if done_before(stamp, repr(UNPACKED)):
        return
    private = PLACE / "apt"  # an apt of its own: the machine's stays with its architecture
    archives = private / "cache" / "archives"
    for folder in (archives / "partial", private / "state" / "lists" / "partial"):
        folder.mkdir(parents=True, exist_ok=True)
    (private / "status").touch()
    (private / "apt.conf").write_text(
        f'Dir::State "{private}/state";\n'
        f'Dir::State::status "{private}/status";\n'
        f'Dir::Cache "{private}/cache";\n'
        'APT::Architecture "arm64";\n'
        'APT::Architectures { "arm64"; };\n'
        'APT::Sandbox::User "root";\n'
        'Acquire::Languages "none";\n'
    )
    env = {"APT_CONFIG": str(private / "apt.conf")}
    run("apt-get", "update", "-q", env=env)
    run(
        *("apt-get", "install", "-y", "-q", "--download-only", "--no-install-recommends"),
        *UNPACKED,
        env=env,
    )
    shutil.rmtree(SYSROOT, ignore_errors=True)
    SYSROOT.mkdir()
    for package in sorted(archives.glob("*.deb")):
        # not the folders of a whole system: the emulator would look into its /tmp and /dev
        if package.name.startswith(("lib", "python3", "zlib1g", "linux-libc")):
            run("dpkg", "-x", package, SYSROOT)
    stamp.write_text(repr(UNPACKED))


def python_version() -> str:
    """Of the unpacked Python: 3.N."""
    (found,) = SYSROOT.glob("usr/lib/python3.*/_sysconfigdata__aarch64-linux-gnu.py")
    return found.parent.name.removeprefix("python")


def fetch_wheels() -> None:
    """What the tests import, for the other architecture."""
    stamp, key = PLACE / ".wheels", f"{python_version()} {TEST_WHEELS}"
    if done_before(stamp, key):
        return
    shutil.rmtree(WHEELS, ignore_errors=True)
    platforms = ["--platform=manylinux2014_aarch64", "--platform=manylinux_2_28_aarch64"]
    run(
        *(sys.executable, "-m", "pip", "install", "-q", "--target", WHEELS),
        *(*platforms, f"--python-version={python_version()}", "--only-binary=:all:"),
        *TEST_WHEELS,
    )
    stamp.write_text(key)


# ---- built ------------------------------------------------------------------------------------


def build_extension() -> None:
    """The extension, by this tree's setup.py, the cross-compiler and the other Python's headers."""
    made_of = [ROOT / "setup.py", *sorted((ROOT / "cython").rglob("*.[hp]*"))]
    key = hashlib.sha256(b"".join(map(Path.read_bytes, made_of))).hexdigest() + python_version()
    stamp = PLACE / ".extension"
    if done_before(stamp, key):
        return
    shutil.rmtree(EXTENSION, ignore_errors=True)
    settings = "_sysconfigdata__aarch64-linux-gnu"
    (EXTENSION / "settings").mkdir(parents=True)
    shutil.copy(SYSROOT / f"usr/lib/python{python_version()}/{settings}.py", EXTENSION / "settings")
    include = SYSROOT / "usr" / "include"
    compiler = (COMPILER, f"--sysroot={SYSROOT}")  # the C library's own parts are there alone
    run(
        *(sys.executable, "setup.py", "-q", "build_ext"),
        *("--build-lib", EXTENSION, "--build-temp", EXTENSION / "temp"),
        *("--include-dirs", f"{include}/python{python_version()}:{include}"),
        env={
            "CC": shlex.join(compiler),
            "PYTHONPATH": str(EXTENSION / "settings"),
            "_PYTHON_SYSCONFIGDATA_NAME": settings,
            "_PYTHON_HOST_PLATFORM": "linux-aarch64",
            "SHMRING_REQUIRE_EXTENSION": "1",
        },
    )
    flags = ["-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
    run(*compiler, *flags, HERE / "robust_lists.c", "-o", EXTENSION / "robust_lists.so")
    stamp.write_text(key)


def lay_out() -> None:
    """A copy of this tree with the extension in it."""
    shutil.rmtree(TREE, ignore_errors=True)
    ours_alone = shutil.ignore_patterns(
        ".*", "build", "dist", "wheelhouse", "*.egg-info", "__pycache__", "*.so"
    )
    shutil.copytree(ROOT, TREE, ignore=ours_alone)
    shutil.copytree(EXTENSION / "shmring", TREE / "src" / "shmring", dirs_exist_ok=True)


def interpreter(preloaded: bool) -> Path:
    """A program of this machine that is the other machine's Python, to itself as well."""
    name = SYSROOT / "usr" / "bin" / ("python-preloaded" if preloaded else "python-emulated")
    path = [TREE / "src", WHEELS]
    preload = ""
    if preloaded:
        preload = f"-E LD_PRELOAD={EXTENSION}/robust_lists.so"
        path.insert(0, EXTENSION / "unset")
        path[0].mkdir(exist_ok=True)
        # or the programs of this machine that it starts would be given it
        (path[0] / "sitecustomize.py").write_text("import os\ndel os.environ['LD_PRELOAD']\n")
    name.write_text(
        "#!/bin/sh\n"
        f"export PYTHONPATH={':'.join(map(str, path))}\n"
        f"exec {EMULATOR} -L {SYSROOT} {preload} -0 {name}"
        f' {SYSROOT}/usr/bin/python{python_version()} "$@"\n'
    )
    name.chmod(0o755)
    return name


def build_litmus() -> Path:
    """litmus.c for the other machine, behind the same answer about robust lists."""
    stub, program = EXTENSION / "Python.h", EXTENSION / "litmus"
    stub.write_text("#define PyExc_ImportError 0\n#define PyErr_Format(...) ((void)0)\n")
    includes = [f"-I{EXTENSION}", f"-I{ROOT / 'cython/shmring/_core'}"]
    flags = ["-O2", "-Wall", "-Wextra", "-Werror", "-pthread"]
    sources = [HERE / "litmus.c", HERE / "robust_lists.c"]
    run(COMPILER, f"--sysroot={SYSROOT}", *flags, *includes, *sources, "-o", program)
    return program


# ---- run --------------------------------------------------------------------------------------


def test(python: Path, names: Sequence[str], left_out: Sequence[str], *more: str) -> None:
    """pytest, there: some files, without the tests whose names hold a word that is left out."""
    run(
        *(python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", "faulthandler_timeout=900"),
        # this Python's compiler trips over the source that pytest shows
        *("--tb=native", "-k", " and ".join(f"not {word}" for word in left_out)),
        *(
            *more,
            *(str(path) for name in names for path in Path("tests").glob(f"*/test_{name}.py")),
        ),
        cwd=TREE,
        env={"OPENBLAS_NUM_THREADS": "1"},  # it aborts in a child that was forked beside threads
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Prepare what is not there yet, and run all of it."""
    parser = argparse.ArgumentParser(prog="emulated", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--install", action="store_true", help="install what is missing")
    options = parser.parse_args(arguments)
    try:
        find_tools(options.install)
    except CannotTryError as reason:
        print(f"cannot be tried: {reason}", file=sys.stderr)
        return SKIP
    PLACE.mkdir(parents=True, exist_ok=True)
    unpack_python()
    fetch_wheels()
    build_extension()
    lay_out()
    emulated, preloaded = interpreter(preloaded=False), interpreter(preloaded=True)
    run(EMULATOR, "--version")
    run(COMPILER, "--version")
    run(emulated, "-c", "import sys, platform; print(sys.version, platform.platform())")

    print("---- memory order: two threads, by the functions of sync.h and count.h", flush=True)
    run(EMULATOR, "-L", SYSROOT, build_litmus(), LITMUS_ROUNDS)

    print("---- the product as it is: the fallback, with the reason", flush=True)
    run(emulated, "tests/aarch64/smoke.py", cwd=TREE)
    os.environ["SHMRING_BACKEND"] = "queue"  # the warning has been seen, and would be an error
    test(emulated, FALLBACK_TESTS, SLOW + FORKED, "-m", "both_backends and not torture")
    del os.environ["SHMRING_BACKEND"]

    print("---- the same extension, told of a robust list: the ring, but no kills", flush=True)
    test(preloaded, RING_TESTS, SLOW + NOT_EMULATED)
    return 0


if __name__ == "__main__":
    sys.exit(main())
