"""Hands each service its own certificate: `python -m deploy.certificates --authority A --out O name...`.

The authority and all keys lie in A; O/<name>/ gets ca.pem, <service>.pem and <service>.key and nothing else, so that a
service that is broken into can speak as itself only. `trainer@gpu-7` is the certificate of the node `gpu-7`: its agent
can speak for no other node. Of `inference@gpu-7` the scheduler takes calls about devices of that node only. With
`trainer@gpu-7=trainer` it goes into O/trainer/ instead. What is valid stays.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from chassis import pki


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m deploy.certificates", description=__doc__)
    parser.add_argument("--authority", type=Path, required=True, help="folder of the authority and of all keys")
    parser.add_argument("--out", type=Path, required=True, help="folder with one folder per name")
    parser.add_argument("names", nargs="+", help="service or service@node, each with =folder if that is another")
    options = parser.parse_args(arguments)
    pki.create_authority(options.authority)
    for given in options.names:
        name, _, folder = given.partition("=")
        pki.issue(options.authority, name)
        hand_over(options.authority, name, options.out / (folder or name))
    return 0


def hand_over(authority: Path, name: str, folder: Path) -> None:
    """Copies what changed. Readable by the owner only; a reader sees the old file or the new one."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    service = name.partition(pki.INSTANCE_MARK)[0]
    pair = {f"{service}.{kind}": f"{name}.{kind}" for kind in ("pem", "key")}
    for file, source in {f"{pki.AUTHORITY}.pem": f"{pki.AUTHORITY}.pem", **pair}.items():
        content, target = (authority / source).read_bytes(), folder / file
        if target.exists() and target.read_bytes() == content:
            continue
        partial = target.with_name(f".{file}.partial")
        partial.unlink(missing_ok=True)
        with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o400), "wb") as copy:
            copy.write(content)
        partial.replace(target)


if __name__ == "__main__":
    sys.exit(main())
