"""Build shmring and run its suite on several interpreters: ``make matrix``.

An interpreter is a version (`3.14`; `3.14t` without the GIL, `3.14d` for a debug
build; `musl` for whatever is linked to musl), or a path.  A version is looked for
among pyenv's, on the PATH, and, from 3.14 on, in a root of Debian sid that is made
below build/ with debootstrap, which needs root.

    build/matrix/sid/           Debian's interpreters, entered with chroot
    build/matrix/NAME/tree/     a copy of this tree, with a virtual environment of its own
    build/matrix/NAME/log       what the build and the tests printed
    build/matrix/NAME/row.json  the row of the table, and what it was made of

A row is kept while the tree and the interpreter stay the same; an interrupted
run goes on where it was.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree as xml
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PLACE = ROOT / "build" / "matrix"
SID = PLACE / "sid"
SID_FIRST = (3, 14)  # what Debian sid has
SID_VERSIONS = ("3.14", "3.15")
SID_PACKAGES = [
    *("ca-certificates", "g++", "gcc", "libc6-dev", "make", "util-linux"),
    *(f"python{version}-{part}" for version in SID_VERSIONS for part in ("venv", "dev", "dbg")),
]
KERNEL = ["/proc", "/sys", "/dev"]
# What pip needs of this machine to reach its registry.
PIP_SETTINGS = ["/etc/pip.conf", "/etc/xdg/pip", "~/.config/pip", "/etc/resolv.conf", "/etc/hosts"]
PIP_FILES = ["PIP_CERT", "SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "PIP_FIND_LINKS"]
DEFAULT = ["3.11", "3.12", "3.13", "3.14", "3.15", "3.14d"]
BUILD_S = 1200
TESTS_S = 2400

# Run by each interpreter that is found.
TELL = """
import json, platform, sys, sysconfig
print(json.dumps({
    "version": platform.python_version(),
    "kind": ("t" if sysconfig.get_config_var("Py_GIL_DISABLED") else "")
            + ("d" if hasattr(sys, "gettotalrefcount") else ""),
    "libc": " ".join(platform.libc_ver()).strip() if any(platform.libc_ver()) else "musl",
}))
"""


class CannotTryError(Exception):
    """Something is missing that only the machine's owner can give."""


@dataclasses.dataclass(frozen=True)
class Interpreter:
    """A Python that is there.

    Args:
        command: runs it, before its arguments.
        version: 3.14.0.
        kind: "t" without the GIL, "d" for a debug build, or both.
        libc: its C library.
    """

    command: tuple[str, ...]
    version: str
    kind: str
    libc: str

    def answers_to(self, wanted: str) -> bool:
        if wanted == "musl":
            return self.libc == "musl"
        return wanted == ".".join(self.version.split(".")[:2]) + self.kind

    @property
    def in_sid(self) -> bool:
        return self.command[0] == "unshare"


@dataclasses.dataclass
class Row:
    """What came of one interpreter; `problem` says why there are no figures."""

    name: str
    interpreter: str = ""
    libc: str = ""
    passed: int = 0
    failed: int = 0
    errors: int = 0
    skipped: int = 0
    build_s: int = 0
    tests_s: int = 0
    problem: str = ""

    @property
    def is_green(self) -> bool:
        return not self.problem and not self.failed and not self.errors and self.passed > 0


def show(text: str) -> None:
    print(text, flush=True)


# ---- interpreters -----------------------------------------------------------------------------


def ask(command: Sequence[str]) -> Interpreter | None:
    """What a command says of itself; None where it does not run."""
    try:
        done = subprocess.run(
            [*command, "-c", TELL], capture_output=True, text=True, timeout=60, check=True
        )
        return Interpreter(tuple(command), **json.loads(done.stdout))
    except (OSError, ValueError, subprocess.SubprocessError):
        return None


def on_this_machine(wanted: str) -> Iterator[Path]:
    """The programs that may be it: pyenv's, the newest first, then those on the PATH."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    number, kind = re.fullmatch(r"(3\.\d+)?(\w*)", wanted).groups()  # type: ignore[union-attr]
    folders = pyenv.glob(f"{number}.*" if number else "*musl*")
    yield from (
        folder / "bin" / "python3"
        for folder in sorted(folders, key=lambda each: _numbers(each.name), reverse=True)
    )
    for name in (f"python{number or 3}{kind}", f"python{number or 3}"):
        yield from (Path(folder, name) for folder in os.environ["PATH"].split(os.pathsep))


def _numbers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]


def find(wanted: str) -> Interpreter:
    """The interpreter of that name, or at that path."""
    if os.sep in wanted:
        found = ask([str(Path(wanted).absolute())])
        if found is None:
            raise CannotTryError(f"{wanted} is no Python that runs here")
        return found
    if not re.fullmatch(r"3\.\d+t?d?|musl", wanted):
        raise CannotTryError("neither a version (3.14, 3.14t, 3.14d), nor musl, nor a path")
    for program in on_this_machine(wanted):
        found = ask([str(program)]) if program.exists() else None
        if found is not None and found.answers_to(wanted):
            return found
    version = wanted.removesuffix("d")
    if version not in SID_VERSIONS:
        raise CannotTryError("pyenv, the PATH and Debian do not have it: give its path")
    make_sid()
    found = ask([*enter_sid(), f"/usr/bin/python{wanted}"])
    if found is None:
        raise CannotTryError(f"Debian sid gave no python{wanted} that runs")
    return found


def make_sid() -> None:
    """A root of Debian sid with its interpreters, their headers and a compiler."""
    stamp, key = PLACE / ".sid", " ".join(SID_PACKAGES)
    if stamp.exists() and stamp.read_text() == key:
        return
    if os.geteuid() != 0 or not shutil.which("debootstrap"):
        raise CannotTryError(
            "neither pyenv nor the PATH has it; as root, with debootstrap installed, it is"
            " fetched from Debian sid"
        )
    show("matrix: a root of Debian sid, with debootstrap")
    shutil.rmtree(SID, ignore_errors=True)
    SID.mkdir(parents=True)
    with (PLACE / "sid.log").open("w") as log:
        done = subprocess.run(
            [
                *("debootstrap", "--variant=minbase", f"--include={','.join(SID_PACKAGES)}"),
                *("sid", str(SID)),
            ],
            stdout=log,
            stderr=subprocess.STDOUT,
            check=False,
        )
    if done.returncode != 0:
        raise CannotTryError(f"debootstrap failed: {log.name} says why")
    stamp.write_text(key)


def enter_sid() -> list[str]:
    """Before a command: run it in that root, where this tree has the same path.

    The mounts are those of a namespace of its own, and go with it.
    """
    shared = [str(ROOT), *KERNEL, *map(os.path.expanduser, PIP_SETTINGS)]
    shared += [os.environ[name] for name in PIP_FILES if name in os.environ]
    inside = shlex.quote(str(SID))
    script = [f"mount --rbind {inside} {inside}"]
    for path in filter(os.path.exists, dict.fromkeys(shared)):
        target = shlex.quote(f"{SID}{path}")
        make = f"mkdir -p {target}"
        if os.path.isfile(path):
            make = f"mkdir -p $(dirname {target}); touch {target}"
        bind = "--rbind" if path in KERNEL else "--bind"
        script.append(f"{make}; mount {bind} {shlex.quote(path)} {target}")
    script.append(f"mount -t tmpfs -o mode=1777 tmpfs {inside}/dev/shm")
    script.append(f'exec chroot {inside} sh -c \'cd "$0" && exec "$@"\' "$PWD" "$@"')
    return ["unshare", "--mount", "sh", "-ec", "\n".join(script), "sh"]


# ---- trees ------------------------------------------------------------------------------------


def sources() -> dict[str, bytes]:
    """The files of this tree that git knows or would add, by their paths."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    paths = [ROOT / name for name in listed.split("\0") if name]
    return {str(path.relative_to(ROOT)): path.read_bytes() for path in paths if path.is_file()}


def digest_of(files: dict[str, bytes]) -> str:
    whole = hashlib.sha256()
    for name in sorted(files):
        whole.update(name.encode() + b"\0" + hashlib.sha256(files[name]).digest())
    return whole.hexdigest()


def lay_out(files: dict[str, bytes], tree: Path) -> None:
    """Make `tree` a copy of these files; what was built there stays, and so does what is equal."""
    listing = tree.parent / "files.json"
    before = json.loads(listing.read_text()) if listing.exists() else []
    for name in set(before) - set(files):
        (tree / name).unlink(missing_ok=True)
    for name, content in files.items():
        path = tree / name
        if not path.exists() or path.read_bytes() != content:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
            shutil.copymode(ROOT / name, path)
    listing.write_text(json.dumps(sorted(files)))


# ---- a row ------------------------------------------------------------------------------------


def run(command: Sequence[str], tree: Path, log: Path, seconds: int) -> int:
    """Run a command in a tree, which prints to the log; its exit status."""
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("MAKE", "MFLAGS", "VIRTUAL_ENV", "PYENV_VERSION", "SHMRING_"))
    }
    with log.open("a") as out:
        out.write(f"\n$ {shlex.join(command)}\n")
        out.flush()
        with subprocess.Popen(
            command,
            cwd=tree,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        ) as running:
            try:
                return running.wait(seconds)
            except BaseException:  # Ctrl-C as well: nothing goes on behind us
                os.killpg(running.pid, 9)
                raise


def count(report: Path, row: Row) -> None:
    suite = xml.parse(report).getroot().find("testsuite")
    assert suite is not None
    names = ("tests", "failures", "errors", "skipped")
    total, row.failed, row.errors, row.skipped = (int(suite.get(name, "0")) for name in names)
    row.passed = total - row.failed - row.errors - row.skipped


def build_and_test(row: Row, found: Interpreter, tree: Path, arguments: str) -> None:
    """Fill in the row."""
    log, report = tree.parent / "log", tree.parent / "report.xml"
    log.unlink(missing_ok=True)
    report.unlink(missing_ok=True)
    before = enter_sid() if found.in_sid else []
    python = found.command[-1]
    begun = time.monotonic()
    make = ["make", f"PYTHON={python}", "build", ".venv/.with-test"]
    if run([*before, *make], tree, log, BUILD_S) != 0:
        row.problem = f"not built: {log}"
        return
    row.build_s = round(time.monotonic() - begun)
    begun = time.monotonic()
    tests = [
        *(".venv/bin/python", "-m", "pytest", "-q", "-rfE", "-n", "2", "--dist", "worksteal"),
        *(f"--junitxml={report}", *shlex.split(arguments)),
    ]
    status = run([*before, *tests], tree, log, TESTS_S)
    row.tests_s = round(time.monotonic() - begun)
    if not report.exists():
        row.problem = f"pytest ended with {status}: {log}"
        return
    count(report, row)


def row_of(wanted: str, files: dict[str, bytes], arguments: str, again: bool) -> Row:
    """The row of one interpreter: as it was, where nothing has changed since."""
    row = Row(wanted)
    try:
        found = find(wanted)
    except CannotTryError as reason:
        row.problem = f"not tried: {reason}"
        return row
    row.interpreter, row.libc = found.version + found.kind, found.libc
    row.name = f"{row.interpreter} {found.libc}" if os.sep in wanted else wanted
    folder = PLACE / re.sub(r"[^\w.]+", "-", row.name)
    kept = folder / "row.json"
    key = repr((digest_of(files), found, arguments))
    if kept.exists() and not again:
        stored = json.loads(kept.read_text())
        if stored["key"] == key:
            return Row(**stored["row"])
    show(f"matrix: {row.name} ({found.version}{found.kind}, {found.libc})")
    folder.mkdir(parents=True, exist_ok=True)
    kept.unlink(missing_ok=True)
    lay_out(files, folder / "tree")
    try:
        build_and_test(row, found, folder / "tree", arguments)
    except subprocess.TimeoutExpired as late:
        row.problem = f"cut short after {late.timeout:.0f} s: {folder / 'log'}"
    if not row.problem:
        kept.write_text(json.dumps({"key": key, "row": dataclasses.asdict(row)}))
    return row


def table(rows: Sequence[Row]) -> str:
    """All rows, one a line."""
    counts = ("passed", "failed", "errors", "skipped")
    heads = ("interpreter", "version", "libc", *counts, "build", "tests")
    lines = [heads]
    for row in rows:
        figures = (getattr(row, name) for name in counts)
        times = (f"{row.build_s} s", f"{row.tests_s} s")
        lines.append((row.name, row.interpreter, row.libc, *map(str, figures), *times))
    widths = [max(len(line[column]) for line in lines) for column in range(len(heads))]
    shown = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in lines]
    return "\n".join(
        [shown[0]]
        + [
            f"{row.name.ljust(widths[0])}  {row.problem}" if row.problem else line
            for row, line in zip(rows, shown[1:], strict=True)
        ]
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="matrix", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("interpreters", nargs="*", default=DEFAULT, help="versions or paths")
    parser.add_argument("--again", action="store_true", help="run what has a row already")
    parser.add_argument("--tests", default="", help="arguments of pytest, in one word")
    options = parser.parse_args(arguments)
    files = sources()
    PLACE.mkdir(parents=True, exist_ok=True)
    rows = [row_of(each, files, options.tests, options.again) for each in options.interpreters]
    show(table(rows))
    return 0 if all(row.is_green for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
