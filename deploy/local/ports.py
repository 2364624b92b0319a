"""Picks free local ports for a stack, once, so that every process can be told its peers' addresses before they run."""

import random
import socket
from collections.abc import Mapping, Sequence

HOST = "127.0.0.1"
# Below the range from which the kernel lends ports to outgoing connections: a port that is kept for restarts must not
# be lent while its owner is down.
PORT_MIN = 20_000
PORT_MAX = 32_000
ATTEMPTS_MAX = 2_000


def pick_ports(names: Sequence[str], kept: Mapping[str, int]) -> dict[str, int]:
    """A free port per name; the one from `kept` when nobody took it since."""
    ports: dict[str, int] = {}
    for name in names:
        wanted = kept.get(name)
        if wanted is not None and wanted not in ports.values() and is_free(wanted):
            ports[name] = wanted
    source = random.Random()  # noqa: S311 - two stacks that start together should rarely meet; nothing is secret
    for name in names:
        for _ in range(ATTEMPTS_MAX):
            if name in ports:
                break
            port = source.randrange(PORT_MIN, PORT_MAX)
            if port not in ports.values() and is_free(port):
                ports[name] = port
        else:
            if name not in ports:
                raise OSError(f"no free port between {PORT_MIN} and {PORT_MAX} for {name}")
    return ports


def is_free(port: int) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        # As servers do: connections of an earlier owner that still linger do not make the port taken.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
    return True
