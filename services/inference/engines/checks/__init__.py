"""What a model's files must be to serve: a program that looks at an import, in a process of its own.

It refuses to know tables, streams and who imports.
"""
