"""What the operating system gives and takes: limits, signals, locks, files written whole."""
