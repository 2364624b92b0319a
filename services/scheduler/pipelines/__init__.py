"""The background workers that take jobs on: load, process without a transaction, apply under a guard.

Any number of workers in any number of processes may run at once. They decide nothing that a room below decides.
"""
