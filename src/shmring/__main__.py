"""``python -m shmring`` is the command ``shmring``."""

import sys

from shmring.cli.main import main

if __name__ == "__main__":  # a spawned worker imports this module under another name
    sys.exit(main())
