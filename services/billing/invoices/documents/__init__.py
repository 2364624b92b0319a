"""An invoice as a document: CSV, a page to print, PDF.

It reads the message and nothing else, so that the same invoice is the same bytes.
"""
