"""Rows grouped into sequences, and the order in which an epoch sees them. Pure functions of lengths and a seed."""
