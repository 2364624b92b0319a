"""Background work of the scheduler, each in the shape load, process, apply. Nothing here answers a call."""
