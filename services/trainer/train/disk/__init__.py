"""Folders that are whole or absent, and arrays that are too large for memory. It knows no tokens and no tensors."""
