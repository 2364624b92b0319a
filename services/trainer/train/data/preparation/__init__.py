"""A dataset file prepared as a whole, through the token cache where there is one. It knows no torch and no step.

Price, preview and training share it.
"""
