"""The internal dataset service: counts, previews and template checks, made by programs of the training engine.

It knows no attempt and no price.
"""
