"""The HTTP edge for clients that speak OpenAI's protocol: chat and the list of models.

It refuses to know engines, files and tables.
"""
