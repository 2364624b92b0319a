"""What every daemon stands on: process life, servers, channels, errors, settings, storage and events.

It knows no product noun: nothing in here can name a job, a price, a model or a GPU.
"""
