"""What a run learns from: the losses of labelled tokens and of preferences, and how they are summed.

It knows no optimizer and no step.
"""
