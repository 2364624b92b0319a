"""Dedicated endpoints: their lifecycle, the loop that drives them, and what serves a name.

It refuses to know the messages of callers, and it leaves the choice of devices to the scheduler.
"""
