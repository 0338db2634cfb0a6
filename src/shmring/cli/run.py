"""``shmring run``: a program with shmring's queues in place of multiprocessing's."""

from __future__ import annotations

import argparse
import os
import runpy
import sys

from shmring.cli.common import IMPOSSIBLE
from shmring.drop_in import install

__all__ = ["run"]


def run(options: argparse.Namespace) -> int:
    """Run a script or a module as Python would; its exceptions and exit status are its own."""
    arguments = options.arguments
    if options.module is None:
        if arguments[:1] == ["--"]:
            arguments = arguments[1:]
        if not arguments:
            return _refuse("SCRIPT is missing (see shmring run --help)")
        if not os.path.exists(arguments[0]):
            return _refuse(f"{arguments[0]!r} does not exist")
    if not install():
        print("shmring: the fallback changes no queues", file=sys.stderr)
    if options.module is not None:
        sys.argv = [options.module, *arguments]  # run_module replaces the first
        _put_first_on_path(os.getcwd())
        runpy.run_module(options.module, run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        if not os.path.isdir(arguments[0]):  # run_path does it for folders
            _put_first_on_path(os.path.dirname(os.path.abspath(arguments[0])))
        runpy.run_path(arguments[0], run_name="__main__")
    return 0


def _refuse(text: str) -> int:
    print(f"shmring: {text}", file=sys.stderr)
    return IMPOSSIBLE


def _put_first_on_path(folder: str) -> None:
    """Replace the folder of the command by the one of the program."""
    if not sys.flags.safe_path:
        sys.path[0] = folder
