"""Build each wheel that this machine can build, and test those that it can run: ``make wheels``.

From one sdist, by each Python, for each target.  zig compiles, against the C library that
the target names: so a wheel has its tag whatever this machine's compiler and C library are.

    build/wheels/NAME/    the virtual environment of one Python, and what it built
    wheelhouse/           the wheels, tagged by auditwheel
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Sequence
from pathlib import Path

import ziglang

from matrix import CannotTryError, Interpreter, enter_sid, find

ROOT = Path(__file__).resolve().parents[2]
PLACE = ROOT / "build" / "wheels"
WHEELHOUSE = ROOT / "wheelhouse"
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
TARGETS = {  # what zig calls them
    f"{policy}_{machine}": f"{machine}-linux-{libc}"
    for machine in ("x86_64", "aarch64")
    for policy, libc in (("manylinux_2_28", "gnu.2.28"), ("musllinux_1_2", "musl"))
}
ZIG = str(Path(ziglang.__file__).parent / "zig")  # needs nothing of the root that it runs in
MAX_BYTES = 700_000


@dataclasses.dataclass(frozen=True)
class Python:
    """An interpreter that is there.

    Args:
        before: what a command in its root begins with.
        command: the interpreter.
        version: 3.14.0.
        suffix: ends the names of its extension modules.
        headers: the folder of its pyconfig.h.
    """

    before: tuple[str, ...]
    command: str
    version: str
    suffix: str
    headers: Path

    @property
    def name(self) -> str:
        return self.suffix.strip(".").removesuffix(".so")

    @property
    def own_target(self) -> str:
        libc = "musllinux_1_2" if "musl" in self.suffix else "manylinux_2_28"
        return f"{libc}_{platform.machine()}"

    def suffix_on(self, target: str) -> str:
        """What ends the names of extension modules for the same version elsewhere."""
        machine, _, libc = TARGETS[target].split(".")[0].partition("-linux-")
        tag = self.name.split("-")[1]
        return f".cpython-{tag}-{machine}-linux-{libc}.so"

    def run(self, *command: str | Path, cwd: Path = ROOT, **env: str) -> None:
        run(*self.before, *command, cwd=cwd, **env)


@dataclasses.dataclass
class Row:
    """What came of one wheel."""

    wheel: Path
    tested: str = "no"


def run(*command: str | Path, cwd: Path = ROOT, **env: str) -> None:
    subprocess.run(command, check=True, cwd=cwd, env={**os.environ, **env})


# Run by each interpreter.
TELL = """
import pathlib, sysconfig
include = pathlib.Path(sysconfig.get_path("include"))
debian = include.parent / (sysconfig.get_config_var("MULTIARCH") or "") / include.name
print(sysconfig.get_config_var("EXT_SUFFIX"))
print(debian if debian.exists() else include)
"""


def python_of(found: Interpreter) -> Python:
    """An interpreter, and what it tells of itself."""
    before = tuple(enter_sid()) if found.in_sid else ()
    told = subprocess.run([*found.command, "-c", TELL], capture_output=True, text=True, check=True)
    suffix, headers = told.stdout.splitlines()
    return Python(before, found.command[-1], found.version, suffix, Path(headers))


def headers_of(python: Python, place: Path) -> Path:
    """A folder for the compiler, where Debian's pyconfig.h finds that of each architecture."""
    for machine in ("x86_64", "aarch64"):
        link = place / "include" / f"{machine}-linux-gnu" / python.headers.name
        if not link.is_symlink():
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(python.headers)
    return place / "include"


def make_sdist() -> Path:
    """The sdist, made anew and unpacked; the wheels come from it, as a user's would."""
    folder = PLACE / "sdist"
    shutil.rmtree(folder, ignore_errors=True)
    run(sys.executable, "-m", "build", "--sdist", "--outdir", folder, ROOT)
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        opened.extractall(folder, filter="data")
    return folder / archive.name.removesuffix(".tar.gz")


def build(source: Path, python: Python, target: str) -> Path:
    """One wheel, with the tag of its target."""
    place = PLACE / python.name
    installed = place / "venv" / "bin" / "python"
    if not installed.exists():
        python.run(python.command, "-m", "venv", place / "venv")
        requires = SETTINGS["build-system"]["requires"]
        python.run(installed, "-m", "pip", "install", "-q", "--upgrade", "build", *requires)
    raw = place / target
    shutil.rmtree(raw, ignore_errors=True)
    raw.mkdir(parents=True)
    folders = raw / "folders.cfg"  # what Cython makes is the same for all
    folders.write_text(f"[build]\nbuild_lib={raw}/lib\nbuild_temp={source}/build/c\n")
    headers = headers_of(python, place)
    compiler = f"{shlex.quote(ZIG)} cc -target {TARGETS[target]} -I{shlex.quote(str(headers))}"
    python.run(
        *(installed, "-m", "build", "--wheel", "--no-isolation", "--outdir", raw, source),
        DIST_EXTRA_CONFIG=str(folders),
        CC=compiler,
        LDSHARED=f"{compiler} -shared",
        ZIG_GLOBAL_CACHE_DIR=str(PLACE / "zig"),
        ZIG_LOCAL_CACHE_DIR=str(PLACE / "zig"),
        SHMRING_REQUIRE_EXTENSION="1",
        SETUPTOOLS_EXT_SUFFIX=python.suffix_on(target),
        _PYTHON_HOST_PLATFORM="linux-" + TARGETS[target].partition("-")[0],
    )
    (built,) = raw.glob("*.whl")
    repaired = raw / "repaired"
    # musl's loader takes this name for itself; every process has it loaded.
    own_libc = ("--exclude", "libc.so")
    auditwheel = (sys.executable, "-m", "auditwheel", "repair", "--patcher", "none")
    run(*auditwheel, *own_libc, "--wheel-dir", repaired, built)
    (wheel,) = repaired.glob("*.whl")
    check(wheel, target, python.suffix_on(target))
    return Path(shutil.move(wheel, WHEELHOUSE / wheel.name))


def check(wheel: Path, target: str, suffix: str) -> None:
    """That it is small, holds what the target loads, and needs no newer C library than it names."""
    modules = [path.stem for path in ROOT.glob("cython/shmring/_core/*.pyx")]
    wanted = {f"{name}{end}" for name in modules for end in (suffix, ".pyi")} | {"py.typed"}
    held = {Path(name).name for name in zipfile.ZipFile(wheel).namelist()}
    held = {name for name in held if name.endswith((".so", ".pyi", ".typed"))}
    assert held == wanted, f"{wheel.name}: {held ^ wanted}: too much, or missing"
    assert wheel.stat().st_size < MAX_BYTES, f"{wheel.name} has {wheel.stat().st_size:,} bytes"
    policy, newest, machine = re.fullmatch(r"(\w+linux_\d)_(\d+)_(\w+)", target).groups()
    tags = wheel.stem.split("-")[-1].split(".")
    found = [re.fullmatch(rf"{policy}_(\d+)_{machine}", tag) for tag in tags]
    minors = [int(tag[1]) for tag in found if tag]
    assert minors, f"{wheel.name} is not for {target}"
    assert min(minors) <= int(newest), f"{wheel.name} needs a newer C library than {target}"


def test(wheel: Path, python: Python, more: Sequence[str]) -> bool:
    """Whether the installed wheel passes the tests of CI, by the same command."""
    settings = SETTINGS["tool"]["cibuildwheel"]
    place = PLACE / python.name / "tested"
    installed = place / "bin" / "python"
    if installed.exists():
        python.run(installed, "-m", "pip", "uninstall", "-q", "-y", "shmring")
    else:
        python.run(python.command, "-m", "venv", place)
    python.run(installed, "-m", "pip", "install", "-q", f"{wheel}[{settings['test-extras']}]")
    imported = "import shmring, sys; assert shmring.__file__.startswith(sys.prefix), shmring"
    python.run(installed, "-c", imported, cwd=place)
    command = shlex.split(settings["test-command"].format(project=ROOT))
    assert command[0] == "python", command
    try:
        python.run(installed, *command[1:], *more, cwd=place)
    except subprocess.CalledProcessError:
        return False
    return True


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="wheels", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("pythons", nargs="+", help="versions or paths")
    parser.add_argument("--targets", nargs="+", choices=[*TARGETS, "own"], default=[*TARGETS])
    parser.add_argument("--tests", default="", help="more arguments for pytest")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    WHEELHOUSE.mkdir(exist_ok=True)
    source = make_sdist()
    rows: list[Row] = []
    for wanted in options.pythons:
        try:
            python = python_of(find(wanted))
        except CannotTryError as reason:
            print(f"{wanted}: {reason}", flush=True)
            continue
        own = python.own_target
        for target in [own] if "own" in options.targets else options.targets:
            row = Row(build(source, python, target))
            rows.append(row)
            if target == own:
                passed = test(row.wheel, python, shlex.split(options.tests))
                row.tested = f"{'passed' if passed else 'FAILED'} on {python.version}"
    for row in rows:
        files = len(zipfile.ZipFile(row.wheel).namelist())
        size = row.wheel.stat().st_size
        print(f"{row.wheel.name}  {size:,} bytes  {files} files  tested: {row.tested}")
    return 0 if rows and not any("FAILED" in row.tested for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
