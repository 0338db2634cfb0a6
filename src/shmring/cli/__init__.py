"""The command line: ``shmring``."""
