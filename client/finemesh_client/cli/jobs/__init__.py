"""Tuning jobs from a quote to a model: options, price, creation, watching. It knows no default; the server does."""
