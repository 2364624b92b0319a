"""Writes into deploy/.env which bytes the images from outside are: `python -m deploy.pin_images`.

A tag can be moved to other bytes, a digest cannot. Each image of deploy/env.example, or what .env names instead, is
asked of its registry, by the docker command and with the logins that it has, and is written as `name:tag@sha256:...`.
Run it again to take what the tags are by then. When one image cannot be asked for, nothing is written.
"""

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from deploy.compose_env import EXAMPLE, TARGET, write_private

ASKING_S_MAX = 60.0
# In the example each has its default, in a comment.
_DEFAULT = re.compile(r"^#(?P<name>FINEMESH_[A-Z]+_IMAGE)=(?P<value>\S+)$", re.MULTILINE)
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


class UnknownDigestError(Exception):
    """Why there is no digest of an image."""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m deploy.pin_images", description=__doc__)
    parser.add_argument("--out", type=Path, default=TARGET, help="the file that compose reads")
    target = parser.parse_args(arguments).out
    if not target.exists():
        print(f"{target} is missing; run `make compose-env` first", file=sys.stderr)
        return 1
    present = target.read_text(encoding="utf-8")
    pins = {}
    for name, image in images(EXAMPLE.read_text(encoding="utf-8"), present).items():
        try:
            pins[name] = f"{image}@{digest_of(image)}"
        except UnknownDigestError as error:
            print(f"{image} has no digest: {error}; nothing is written", file=sys.stderr)
            return 1
    write_private(target, pinned(present, pins))
    for name, value in pins.items():
        print(f"{name}={value}")
    return 0


def images(example: str, present: str) -> dict[str, str]:
    """By variable, without a digest: what `present` names, else the example's default."""
    found = {match["name"]: match["value"] for match in _DEFAULT.finditer(example)}
    for name in found:
        given = re.findall(rf"^{name}=(\S+)$", present, re.MULTILINE)
        found[name] = (given[-1] if given else found[name]).partition("@")[0]
    return found


def pinned(present: str, pins: Mapping[str, str]) -> str:
    """`present` with these variables in their places, or at its end; everything else stays."""
    text = present
    for name, value in pins.items():
        line = f"{name}={value}"
        text, count = re.subn(rf"^{name}=.*$", line, text, flags=re.MULTILINE)
        if not count:
            text = text.rstrip() + f"\n{line}\n"
    return text


def digest_of(image: str) -> str:
    """Of the index, where an image is for several platforms, so that one pin serves hosts of every kind."""
    command = ["docker", "buildx", "imagetools", "inspect", "--format", "{{json .Manifest}}", image]
    try:
        asked = subprocess.run(command, capture_output=True, text=True, timeout=ASKING_S_MAX, check=False)
    except FileNotFoundError:
        raise UnknownDigestError("there is no docker command") from None
    except subprocess.TimeoutExpired:
        raise UnknownDigestError(f"its registry did not answer in {ASKING_S_MAX:.0f} s") from None
    if asked.returncode != 0:
        raise UnknownDigestError(asked.stderr.strip()[-500:] or f"docker ended with {asked.returncode}")
    try:
        digest = str(json.loads(asked.stdout)["digest"])
    except (ValueError, KeyError, TypeError):
        digest = asked.stdout[:100]
    if not _DIGEST.fullmatch(digest):
        raise UnknownDigestError(f"docker answered {digest!r}")
    return digest


if __name__ == "__main__":
    sys.exit(main())
