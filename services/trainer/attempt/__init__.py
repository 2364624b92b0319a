"""One attempt of a job on this node: its run, the events of its child, its reports and its ending.

It knows nothing of the heartbeat nor of other attempts.
"""
