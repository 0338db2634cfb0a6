"""The same classes on multiprocessing, where the extension cannot run."""
