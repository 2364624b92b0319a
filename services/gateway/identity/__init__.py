"""Organizations, projects and keys: who calls, what the key allows, and how often it may call.

It refuses to know files, and how a call arrives.
"""
