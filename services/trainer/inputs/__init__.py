"""What a training child is given: its input files in the work folder, and the spec that describes its run.

It knows nothing of what happens once the child runs.
"""
