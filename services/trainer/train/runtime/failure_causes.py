"""Why a run failed: an unforeseen exception becomes a Failure, and a Failure becomes JSON for another process.

A process that loses a peer knows only that the peer is gone. The board tells it what the peer failed of. This module
knows no step and no launcher.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from services.trainer.train.disk.durable import is_disk_full
from services.trainer.train.settings.failures import Failure, Violation, platform_failure

LOST_PEER, DIED = "lost_peer", "died"
# The words of gloo when the process at the other end has died.
_LOST_PEER_WORDS = ("Connection closed by peer", "Connection reset by peer", "gloo/transport")
_KEY = "finemesh/failure"


def explain(error: Exception) -> Failure:
    """The Failure of an exception that nobody foresaw. It counts as the platform's. A lack of memory or disk is named,
    because people can do something about it."""
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


def imprecision(failure: Failure) -> int:
    """How little a failure says about the cause of a run's end; of several failures the one with the smallest number is
    reported. 0 is about data or settings, 1 about the platform, 2 is a process that died without a word, 3 is the loss
    of a peer."""
    if failure.details.get("cause") == LOST_PEER:
        return 3
    if failure.details.get("cause") == DIED:
        return 2
    return 0 if failure.kind == "user" else 1


def failure_to_json(failure: Failure) -> dict[str, Any]:
    """The failure as a JSON object."""
    return {
        "kind": failure.kind,
        "reason": failure.reason,
        "message": failure.message,
        "step": failure.step,
        "last_checkpoint_step": failure.last_checkpoint_step,
        "violations": [asdict(violation) for violation in failure.violations],
        "details": failure.details,
    }


def failure_from_json(document: Mapping[str, Any]) -> Failure:
    """The failure that `failure_to_json` wrote."""
    failure = Failure(
        document["kind"],
        document["reason"],
        document["message"],
        [Violation(**violation) for violation in document["violations"]],
        document["details"],
    )
    failure.step, failure.last_checkpoint_step = document["step"], document["last_checkpoint_step"]
    return failure


class FailureBoard:
    """Where the processes of a run on several machines leave why they failed: a key in torch's store on the leading
    machine. The first failure that is left stays, because the others follow from it."""

    def __init__(self, connect: Callable[[], Any]) -> None:
        self._connect = connect

    def leave(self, failure: Failure) -> Failure:
        """Leaves this failure and returns the cause, as far as it is known: this failure, or the one that another
        process left before. A process leaves its failure before it ends, so those that lose it as a peer find it here.
        """
        try:
            store = self._connect()
            if failure.details.get("cause") != LOST_PEER:
                store.compare_set(_KEY, "", json.dumps(failure_to_json(failure)))
            elif store.check([_KEY]):
                return failure_from_json(json.loads(store.get(_KEY)))
        except RuntimeError:
            # The machine that keeps the store is the one that is gone.
            pass
        return failure
