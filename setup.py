"""Builds the compiled floor; everything else stands in pyproject.toml.

Switches, all read from the environment:

``SHMRING_REQUIRE_EXTENSION=1``  failing to build the extension is an error.
``SHMRING_NO_EXTENSION=1``       do not even try: a package with the fallback only.
``SHMRING_SANITIZE=address,undefined``  instrument; run with the runtime preloaded:
                                 ``LD_PRELOAD=$(gcc -print-file-name=libasan.so)``.
``SHMRING_COVERAGE=1``           line tracing, for a coverage plug-in of Cython.
``SHMRING_SYMBOLS=1``            keep the symbols; a build in place has them anyway.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

os.chdir(Path(__file__).resolve().parent)
SOURCES = Path("cython", "shmring", "_core")


def switch(name: str) -> str:
    value = os.environ.get(f"SHMRING_{name}", "")
    return "" if value == "0" else value


REQUIRED = bool(switch("REQUIRE_EXTENSION"))


def why_not() -> str:
    """Why the extension is not attempted; empty when it is."""
    if switch("NO_EXTENSION"):
        return "SHMRING_NO_EXTENSION is set"
    if sys.platform != "linux":
        return f"the ring needs Linux, this is {sys.platform}"
    if not any(SOURCES.glob("*.pyx")):
        return f"there is no .pyx file in {SOURCES}"
    return ""


def extension(source: Path) -> Extension:
    compile_args = ["-O3", "-g1", "-fvisibility=hidden", "-fno-plt", "-Wall"]
    link_args: list[str] = []
    macros: list[tuple[str, str | None]] = []
    directives: dict[str, object] = {
        "language_level": 3,
        "binding": False,
        "boundscheck": False,
        "wraparound": False,
        "cdivision": True,
        "embedsignature": True,
        "freethreading_compatible": True,
    }
    if sanitizers := switch("SANITIZE"):
        flags = [f"-fsanitize={sanitizers}", "-fno-omit-frame-pointer"]
        compile_args += ["-O1", *flags]
        link_args += flags
        if sanitizers == "thread":
            compile_args.append("-Wno-tsan")  # it cannot see fences: docs/notes/sanitizers.md
    if switch("COVERAGE"):
        directives["linetrace"] = True
        macros += [("CYTHON_TRACE", "1"), ("CYTHON_TRACE_NOGIL", "1")]
    built = Extension(
        f"shmring._core.{source.stem}",
        [source.as_posix()],
        include_dirs=[SOURCES.as_posix()],
        depends=sorted(path.as_posix() for end in ("*.h", "*.pxd") for path in SOURCES.glob(end)),
        define_macros=macros,
        extra_compile_args=compile_args,
        extra_link_args=link_args,
        optional=not REQUIRED,
    )
    # Read by Cython's build_ext, to which setuptools hands the .pyx.
    built.cython_c_in_temp = True
    built.cython_include_dirs = ["cython"]
    built.cython_directives = directives
    return built


def say(text: str) -> None:
    print(f"\nshmring: {text}\n", file=sys.stderr, flush=True)


class BuildExtension(build_ext):
    """Says what could not be built, after the build that went on without it."""

    def run(self) -> None:
        if not (self.inplace or switch("SYMBOLS") or switch("SANITIZE")):
            for each in self.extensions:
                each.extra_link_args.append("-s")
        super().run()
        place = Path("src") if self.inplace else Path(self.build_lib)
        names = [self.get_ext_filename(ext.name) for ext in self.extensions]
        missing = [name for name in names if not (place / name).exists()]
        if missing:
            say(
                f"WARNING: {', '.join(missing)} could not be built (see the error above). "
                "The package works without, on multiprocessing.Queue: slower, and not safe "
                "against killed processes. With a C compiler and the headers of Python, "
                "`pip install --force-reinstall --no-cache-dir shmring` builds the ring; "
                "SHMRING_REQUIRE_EXTENSION=1 makes this an error."
            )


class PlatformWheel(bdist_wheel):
    """A wheel without the extension still belongs to one platform.

    Tagged ``any``, it would be preferred to the sdist on a Linux for which we
    publish no wheel, and quietly keep the ring away from it.
    """

    def finalize_options(self) -> None:
        super().finalize_options()
        self.root_is_pure = False

    def get_tag(self) -> tuple[str, str, str]:
        python, abi, platform = super().get_tag()
        if self.distribution.ext_modules:
            return python, abi, platform
        return "py3", "none", platform


reason = why_not()
if reason and REQUIRED:
    raise SystemExit(f"shmring: SHMRING_REQUIRE_EXTENSION is set, but {reason}")
if reason:
    say(f"the compiled ring is not built ({reason}); the fallback will be used")

setup(
    ext_modules=[] if reason else [extension(path) for path in sorted(SOURCES.glob("*.pyx"))],
    cmdclass={"build_ext": BuildExtension, "bdist_wheel": PlatformWheel},
)
