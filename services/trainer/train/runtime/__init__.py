"""What a process of a run works with: its event stream, the other processes, its threads, and the cause of a failure.

It knows no data and no model.
"""
