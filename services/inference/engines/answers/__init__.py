"""What stands in an answer: thoughts, text and calls of tools, and how a model is made to write them.

A stranger's text is read by processes of their own, within limits of time and memory. It refuses to know engines.
"""
