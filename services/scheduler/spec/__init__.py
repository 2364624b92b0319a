"""What a tuning job may ask for: types, bounds, what is wrong with a request, and its defaults.

Nothing here asks a database or another service; only convert.py knows the contract's messages.
"""
