"""Hosts base models, adapters and tuned models, routes requests and meters what it serves. It never trains."""
