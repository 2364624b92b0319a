"""Questions about a dataset, answered without training: counts, sampled rows, and what the chat template can render.

It counts with the code that feeds training. It knows no torch and no price.
"""
