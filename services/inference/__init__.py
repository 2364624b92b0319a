"""Hosts base models, adapters and tuned models, routes requests and meters what it serves. It never trains.

Rooms, each importing only those before it: engines, then models, spending and metering side by side, serving,
endpoints, api.
"""
