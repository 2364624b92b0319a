"""The run itself: start, step, evaluate, report, checkpoint, stop early, finish.

It knows neither who started it nor who is billed.
"""
