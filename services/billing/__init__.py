"""Turns metered work into money, exactly once. It never asks another service what something cost."""
