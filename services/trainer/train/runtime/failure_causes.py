"""Why a run failed, in a form that travels: from an exception that nobody foresaw to a Failure, from there to JSON, and from one
process of a run to another, since whoever loses a peer knows only that it is gone.

It knows no step and no launcher.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from services.trainer.train.disk.durable import is_disk_full
from services.trainer.train.settings.failures import Failure, Violation, platform_failure

LOST_PEER, DIED = "lost_peer", "died"
# What gloo says when the process at the other end has died.
_LOST_PEER_WORDS = ("Connection closed by peer", "Connection reset by peer", "gloo/transport")
_KEY = "finemesh/failure"


def explain(error: Exception) -> Failure:
    """What nobody foresaw is ours. Memory and disk are named, because people can do something about them."""
    if isinstance(error, Failure):
        return error
    name = type(error).__name__
    if isinstance(error, MemoryError) or name == "OutOfMemoryError":
        return platform_failure("TRAINING_FAILED", f"out of memory: {error}")
    if is_disk_full(error):
        where = getattr(error, "filename", None) or error
        return platform_failure("TRAINING_FAILED", f"the disk is full: {where}", {"cause": "disk_full"})
    if isinstance(error, OSError):
        return platform_failure("TRAINING_FAILED", f"{error.strerror or name} ({error.filename or 'no file'})")
    if name.startswith("Dist") or any(words in str(error) for words in _LOST_PEER_WORDS):
        return platform_failure("TRAINING_FAILED", f"another process of the run is gone: {error}", {"cause": LOST_PEER})
    return platform_failure("TRAINING_FAILED", f"{name}: {error}")


def vagueness(failure: Failure) -> int:
    """What says most is told. The order is what a process said by itself about data or settings, about the platform, then a death
    without a word, then lost meetings."""
    if failure.details.get("cause") == LOST_PEER:
        return 3
    if failure.details.get("cause") == DIED:
        return 2
    return 0 if failure.kind == "user" else 1


def told(failure: Failure) -> dict[str, Any]:
    """For JSON."""
    return {
        "kind": failure.kind,
        "reason": failure.reason,
        "message": failure.message,
        "step": failure.step,
        "last_checkpoint_step": failure.last_checkpoint_step,
        "violations": [asdict(violation) for violation in failure.violations],
        "details": failure.details,
    }


def heard(document: Mapping[str, Any]) -> Failure:
    """What `told` wrote down."""
    failure = Failure(
        document["kind"],
        document["reason"],
        document["message"],
        [Violation(**violation) for violation in document["violations"]],
        document["details"],
    )
    failure.step, failure.last_checkpoint_step = document["step"], document["last_checkpoint_step"]
    return failure


class Board:
    """Where the processes of a run on several machines leave why they failed: a store of torch's that is with the leading machine.
    The first word counts: the others failed of it."""

    def __init__(self, connect: Callable[[], Any]) -> None:
        self._connect = connect

    def leave(self, failure: Failure) -> Failure:
        """The cause, as far as anybody knows it: this failure, or the one that another process left before it. Whoever leaves
        a word does so before it goes, so those who miss it find the word."""
        try:
            store = self._connect()
            if failure.details.get("cause") != LOST_PEER:
                store.compare_set(_KEY, "", json.dumps(told(failure)))
            elif store.check([_KEY]):
                return heard(json.loads(store.get(_KEY)))
        except RuntimeError:
            # The machine that keeps the store is the one that is gone.
            pass
        return failure
