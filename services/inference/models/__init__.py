"""The catalogue of base models, their import, and the registry of the models that jobs made.

It knows which weights there are and where they lie. It refuses to know engines, endpoints and prices.
"""
