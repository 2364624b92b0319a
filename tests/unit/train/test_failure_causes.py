"""Why a run failed, from one process to another: the first word is the cause, and whoever lost a peer takes it for its
own."""

import errno
from typing import Any

import pytest
import torch
import torch.distributed as dist

from services.trainer.train.runtime.failure_causes import (
    FailureBoard,
    explain,
    failure_from_json,
    failure_to_json,
    imprecision,
)
from services.trainer.train.settings.failures import Failure, Violation, platform_failure, user_failure

GONE = RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:26881")


def same(one: Failure, other: Failure) -> bool:
    return failure_to_json(one) == failure_to_json(other)


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("[Errno 2] No such file or directory: '/data/work/analysis-1/base/config.json'", "'config.json'"),
        ("No space left on device (/mnt/a/b)", "(b)"),
        ("see https://host/docs/page and projects/p/files/f", "https://host/docs/page and projects/p/files/f"),
    ],
)
def test_a_failure_names_no_folder_of_the_machine(said: str, told: str) -> None:
    message = user_failure("MODEL_INVALID", said).message
    assert told in message
    assert not any(folder in message for folder in ("/data", "/mnt"))


def torn() -> Failure:
    failure = user_failure(
        "MODEL_INVALID", "its file is damaged", [Violation(field="base_model", description="is torn")], {"node": "b"}
    )
    failure.step, failure.last_checkpoint_step = 7, 6
    return failure


def test_a_failure_travels_whole() -> None:
    assert failure_from_json(failure_to_json(torn())).__dict__ == torn().__dict__


@pytest.mark.parametrize(
    ("error", "words", "cause"),
    [
        (torch.OutOfMemoryError("no room"), "out of memory: no room", None),
        (MemoryError("no room"), "out of memory: no room", None),
        (OSError(errno.ENOSPC, "No space left on device", "x"), "the disk is full: x", "disk_full"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "y"), "No such file or directory (y)", None),
        (GONE, "another process of the run is gone", "lost_peer"),
        (dist.DistBackendError("nccl"), "another process of the run is gone", "lost_peer"),
        (KeyError("z"), "KeyError: 'z'", None),
    ],
)
def test_what_nobody_foresaw_is_ours(error: Exception, words: str, cause: str | None) -> None:
    failure = explain(error)
    assert (failure.kind, failure.reason) == ("platform", "TRAINING_FAILED")
    assert words in failure.message
    assert failure.details.get("cause") == cause


def test_a_failure_needs_no_explanation() -> None:
    assert explain(failure := torn()) is failure


def test_who_lost_a_peer_takes_its_word_for_the_cause() -> None:
    store = dist.HashStore()
    assert same(FailureBoard(lambda: store).leave(torn()), torn())
    assert same(FailureBoard(lambda: store).leave(explain(GONE)), torn())


def test_the_first_word_is_the_cause_and_each_keeps_its_own() -> None:
    store = dist.HashStore()
    later = platform_failure("TRAINING_FAILED", "I fell over what the other one left")
    FailureBoard(lambda: store).leave(torn())
    assert same(FailureBoard(lambda: store).leave(later), later)
    assert same(FailureBoard(lambda: store).leave(explain(GONE)), torn())


def test_without_a_word_a_lost_peer_is_all_that_is_known() -> None:
    store = dist.HashStore()
    lost = explain(GONE)
    assert FailureBoard(lambda: store).leave(lost) is lost
    # It leaves no word itself: the next one would take it for the cause.
    assert same(FailureBoard(lambda: store).leave(torn()), torn())
    assert same(FailureBoard(lambda: store).leave(explain(GONE)), torn())


def test_a_store_that_is_gone_changes_nothing() -> None:
    class Gone:
        def check(self, *_: Any) -> Any:
            raise dist.DistNetworkError("Broken pipe")

        compare_set = check

    for failure in (torn(), explain(GONE)):
        assert FailureBoard(Gone).leave(failure) is failure


def test_what_says_most_comes_first() -> None:
    died = platform_failure("TRAINING_FAILED", "killed", {"cause": "died"})
    order = [torn(), platform_failure("TRAINING_FAILED", "ours"), died, explain(GONE)]
    assert sorted(reversed(order), key=imprecision) == order
