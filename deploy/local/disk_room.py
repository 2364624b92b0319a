"""Whether a disk has room for a process to start on it. Not pure: os."""

import shutil
from pathlib import Path

ROOM_BYTES_MIN = 16 * 1024**2


def has_room(folder: Path) -> bool:
    """False below what PostgreSQL and nats-server need for a start; the part that only root may fill is no room."""
    return shutil.disk_usage(folder).free >= ROOM_BYTES_MIN
