"""A trial, or one part of it, in a process of its own; prints its tally as JSON.

    python tests/torture/drive.py STEPPER STRIDE PART PARTS NAME

The process has imported little and is forked quickly; what crashes or hangs in
it is a failed test, not the end of the run; and it may run another build of the
extension, or see another /dev/shm, than the tests do.
"""

from __future__ import annotations

import faulthandler
import json
import sys
from pathlib import Path

from registry import TRIALS
from trials import Selection
from walking import Walker, on_one_cpu

__all__ = ["main"]


def main(stepper: str, stride: str, part: str, parts: str, name: str) -> None:
    selection = Selection(int(stride), int(part), int(parts))
    walker = Walker(Path(stepper))
    try:
        with on_one_cpu(selection.part):
            tally = TRIALS[name].run(walker, selection)
    finally:
        faulthandler.cancel_dump_traceback_later()
        walker.close()
    print(json.dumps(tally.as_dict()))


if __name__ == "__main__":
    main(*sys.argv[1:])
