"""From a model's weights to tokens: what serves a model, local copies of its weights, engines in memory, calls.

It refuses to know endpoints and the messages of callers.
"""
