"""Files, seeds, signals, memory, devices, threads. Nothing here knows experts."""
