"""Files of the artifact store: to and from it, and cached on this machine by their digests.

It knows nothing of what a file means.
"""
