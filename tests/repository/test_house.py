"""Structure of the repository: imports between packages, exports, top level."""

from __future__ import annotations

import ast
import fnmatch
import importlib
import os
import re
import subprocess
import sys
from importlib import resources
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
PYTHON = ROOT / "src" / "shmring"
CYTHON = ROOT / "cython" / "shmring"

# The packages, from the ground up: each imports only from those above it here.
ORDER = [
    *("errors", "arguments", "_lazy", "_warnings", "_core", "process", "shm", "diagnostics"),
    *(
        "queues",
        "fallback",
        "_backend",
        "drop_in",
        "context",
        "torch",
        "faster_fifo",
        "ipc",
        "observer",
        "metrics",
        "tasks",
        "coordinator",
        "pool",
        "cli",
        "__main__",
    ),
]
# Imported when peers= is used first: the compiled wait asks process.peers for deaths.
LATE = {("_core", "process")}

TOP_LEVEL = {
    ".ci",
    ".git",
    ".github",
    ".gitignore",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "LICENSE",
    "MANIFEST.in",
    "Makefile",
    "README.md",
    "SECURITY.md",
    "benchmarks",
    "cython",
    "docs",
    "examples",
    "pyproject.toml",
    "setup.py",
    "src",
    "tests",
}

MODULES = sorted(PYTHON.rglob("*.py"))
SOURCES = sorted((CYTHON / "_core").glob("*.pyx"))


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(PYTHON).with_suffix("").parts)


PUBLIC = [module_of(path) for path in MODULES if not path.stem.startswith("_")]


def package_of(path: Path) -> str:
    """The package of a module, or the name of one that is in none."""
    return path.relative_to(PYTHON).with_suffix("").parts[0]


class Imports(ast.NodeVisitor):
    """The modules of shmring that a module imports when it runs."""

    def __init__(self) -> None:
        self.names: set[str] = set()

    def visit_If(self, node: ast.If) -> None:
        if ast.unparse(node.test).rpartition(".")[2] != "TYPE_CHECKING":
            self.generic_visit(node)
            return
        for child in node.orelse:
            self.visit(child)
            if "lazily(" in ast.unparse(child):  # what types see there is imported when asked for
                for later in node.body:
                    self.visit(later)

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            package, _, rest = alias.name.partition(".")
            if package == "shmring":
                self.names.add(rest.partition(".")[0] or "__init__")

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        path = (node.module or "").split(".") if node.module else []
        if node.level == 0:
            if path[:1] != ["shmring"]:
                return
            path = path[1:]
        if path:
            self.names.add(path[0])
        else:  # from shmring import X: a module, or else something of __init__
            self.names |= {each.name if each.name in ORDER else "__init__" for each in node.names}


def imported_by_python(path: Path) -> set[str]:
    visitor = Imports()
    visitor.visit(ast.parse(path.read_text(encoding="utf-8"), str(path)))
    return visitor.names


def imported_by_cython(path: Path) -> set[str]:
    pattern = r"^\s*(?:from\s+(?:shmring\.|\.)(\w+)\s+import|import\s+shmring\.(\w+))"
    found = re.findall(pattern, path.read_text(encoding="utf-8"), re.MULTILINE)
    return {first or second for first, second in found}


def importers() -> list[tuple[str, set[str]]]:
    python = [(package_of(path), imported_by_python(path)) for path in MODULES]
    compiled = [("_core", imported_by_cython(path)) for path in SOURCES]
    return [(name, names) for name, names in python + compiled if name != "__init__"]


def test_every_package_has_its_place() -> None:
    assert {name for name, _ in importers()} == {*ORDER}


def test_no_import_turns_round() -> None:
    wrong = {
        (name, other)
        for name, others in importers()
        for other in others - {name}
        if other not in ORDER or ORDER.index(other) > ORDER.index(name)
    }
    assert wrong - LATE == set(), f"{wrong}: a package imports from those above it in ORDER"


def load(name: str) -> ModuleType:
    return importlib.import_module("shmring" if name == "__init__" else f"shmring.{name}")


@pytest.mark.parametrize("name", ["__init__", *PUBLIC])
def test_what_is_exported_exists(name: str) -> None:
    for begin, package in (("torch", "torch"), ("pool.dask", "ssl")):
        if name.startswith(begin):
            pytest.importorskip(package)
    module = load(name)
    assert [each for each in module.__all__ if not hasattr(module, each)] == []


def test_the_package_exports_what_it_has() -> None:
    import shmring

    public = {
        name
        for name in dir(shmring)
        if not name.startswith("_") and not isinstance(getattr(shmring, name), ModuleType)
    }
    # multiprocessing.managers has a class of that name: `import *` must not replace it.
    assert "SharedMemoryManager" not in shmring.__all__
    assert public - {"annotations"} == {*shmring.__all__, "SharedMemoryManager"}


def layout_in_c() -> dict[str, int]:
    text = (CYTHON / "_core" / "layout.h").read_text(encoding="utf-8")
    defines = re.findall(r"^#define SHMRING_(\w+)[ \t]+(\w+?)[uUlL]*\b", text, re.MULTILINE)
    return {name: int(value, 0) for name, value in defines}


def layout_in_pxd() -> set[str]:
    """The constants; SHMRING_ stands in no other kind of declaration there."""
    text = (CYTHON / "_core" / "layout.pxd").read_text(encoding="utf-8")
    return set(re.findall(r"\bSHMRING_(\w+)", text))


def test_the_pxd_declares_the_layout_of_the_header() -> None:
    assert len(layout_in_c()) > 10
    assert layout_in_pxd() == layout_in_c().keys()


@pytest.mark.skipif(sys.platform != "linux", reason="the extension is Linux only")
def test_the_compiled_layout_is_that_of_the_header() -> None:
    compiled, in_c = load("_core.ring").LAYOUT, layout_in_c()
    assert compiled == {name: in_c.get(name) for name in compiled}
    laid_out = {name for name in in_c if not name.startswith("KIND_")}
    placed = {name for name in laid_out if name.endswith(("_OFFSET", "_BYTES", "_COUNT"))}
    assert {"MAGIC", "VERSION", *placed} <= compiled.keys(), "what makes a layout is shown"


def test_the_codecs_have_the_kinds_of_the_header() -> None:
    codec, layout = load("queues.codec"), layout_in_c()
    kinds = {name: value for name, value in vars(codec).items() if name.startswith("KIND_")}
    assert len(kinds) > 3
    assert kinds == {name: layout[name] for name in kinds}


def test_no_test_takes_a_name_that_another_worker_would_take() -> None:
    """Two tests of one file run at once in two workers: what is named comes from own_name."""
    fixed = [
        f"{path.name}:{node.lineno} {node.value}"
        for path in sorted((ROOT / "tests").rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
        if re.search(r"(?:^|['\"]|/dev/shm/)test-[\w-]*\w(?:$|['\"])", node.value)
        and node.value not in ("test-command", "test-extras")  # of cibuildwheel
    ]
    assert not fixed


def test_the_top_level_is_bare() -> None:
    generated = [".gitignore", "PKG-INFO", "setup.cfg"]  # the last two in an sdist
    if (ROOT / ".gitignore").exists():
        generated += (ROOT / ".gitignore").read_text(encoding="utf-8").split()
    odd = [
        path.name
        for path in ROOT.iterdir()
        if path.name not in TOP_LEVEL
        and not any(fnmatch.fnmatch(path.name, pattern.rstrip("/")) for pattern in generated)
    ]
    assert not odd, f"{odd}: has no place at the top; see section 2 of the design"


def test_what_runs_on_both_back_ends_can_be_collected_without_the_extension() -> None:
    """As on macOS, on Windows, and on kernels without robust futexes."""
    missing = [f"shmring._core.{path.stem}" for path in SOURCES]
    missing += ["curses", "pwd", "resource", "termios"]  # and these on Windows
    program = (
        "import psutil, pytest, signal, sys\n"  # psutil's code for Linux needs them
        f"sys.modules.update(dict.fromkeys({missing}))\n"
        "del signal.SIGKILL, signal.SIGSTOP\n"
        "arguments = ['--collect-only', '-q', '-p', 'no:cacheprovider', '-m', 'both_backends']\n"
        f"sys.exit(pytest.main([*arguments, {str(ROOT / 'tests')!r}]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "SHMRING_BACKEND": "queue"},
        cwd=ROOT / "tests",
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr
    assert "test_ipc.py" in done.stdout


def test_types_travel_with_the_package() -> None:
    """`make wheels` looks for the same in each wheel."""
    installed = {entry.name for entry in resources.files("shmring").iterdir()}
    assert "py.typed" in installed
    stubs = {f"{path.stem}.pyi" for path in SOURCES}
    core = {entry.name for entry in resources.files("shmring._core").iterdir()}
    assert stubs <= core, "each compiled module has a stub"


def test_the_floor_calls_no_function_that_newer_c_libraries_rename():
    """glibc 2.38 gives these another symbol, which no older one has."""
    renamed = re.compile(r"\b(strto[a-z]+|v?f?sscanf|v?fscanf|v?scanf|ato[fil]+)\s*\(")
    found = [
        f"{path.name}: {call.group(1)}"
        for path in sorted((CYTHON / "_core").iterdir())
        if path.suffix in (".h", ".pyx", ".pxd")
        for call in renamed.finditer(path.read_text())
    ]
    assert not found


def test_steps_that_need_no_extension_do_not_require_it_either():
    """Whatever the environment says: CI exports SHMRING_REQUIRE_EXTENSION."""
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    without = [line for line in text.splitlines() if "SHMRING_NO_EXTENSION=1" in line]
    assert without
    assert all("SHMRING_REQUIRE_EXTENSION= " in line for line in without)
