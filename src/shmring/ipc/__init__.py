"""Messages between named processes: Message, HighPerformanceIPC."""
