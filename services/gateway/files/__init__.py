"""Uploaded files: their bytes in the artifact store, the check of what they hold, and the removal of what nobody needs.

It refuses to know models, prices and protobuf.
"""
