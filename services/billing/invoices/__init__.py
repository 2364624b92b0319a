"""Months as documents that never change, and credit notes. It meters nothing and prices nothing."""
