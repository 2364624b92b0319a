"""How a run fits into the memory of its devices, and what happens when it does not.

It knows no optimizer and no checkpoint.
"""
