"""A dataset file prepared as a whole, through the cache of tokens where there is one. Price, preview and training share
it.

It knows no torch and no step.
"""
