"""The double-entry ledger: balances, entries and the chain that seals them.

It knows no job, no model and no invoice.
"""
