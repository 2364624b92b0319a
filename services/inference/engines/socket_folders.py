"""Folders for the sockets of engines, in which their deadlines lie, too. Not pure: files.

Each is held by the process whose engine it is, so that a sweep finds what was left by one that was killed. Their paths
are short: the name of a socket has at most about a hundred characters.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from chassis.objects.held_folders import HeldFolders

PREFIX = "finemesh-engine-"


def socket_folders() -> HeldFolders:
    """Of all engines on this machine."""
    return HeldFolders(Path(tempfile.gettempdir()), prefix=PREFIX)
