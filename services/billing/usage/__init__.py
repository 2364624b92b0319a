"""Metered work becomes records and entries, once per work key. It knows no invoice and no caller."""
