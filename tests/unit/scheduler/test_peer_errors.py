"""Which errors of other services end a job, and in which words."""

import pytest

from chassis.errors import (
    DeadlineExceeded,
    DomainError,
    FailedPrecondition,
    FieldViolation,
    Internal,
    InvalidArgument,
    PermissionDenied,
    Unavailable,
)
from services.scheduler.admission.peer_errors import RETRY_DELAY_S_MAX, Verdict, failure_of, verdict_of, waiting_of


@pytest.mark.parametrize(
    ("error", "verdict"),
    [
        (FailedPrecondition("BALANCE_INSUFFICIENT", "too little"), Verdict.REFUSE),
        (FailedPrecondition("SPEND_CAP_EXCEEDED", "too much"), Verdict.REFUSE),
        (FailedPrecondition("HOLD_EXPIRED", "too late"), Verdict.REFUSE),
        (InvalidArgument("DATASET_INVALID", "bad lines"), Verdict.REFUSE),
        (InvalidArgument("PRICE_UNKNOWN", "no price"), Verdict.REFUSE),
        (Unavailable("DEPENDENCY_UNAVAILABLE", "away"), Verdict.WAIT),
        (DeadlineExceeded("DEADLINE_TOO_SHORT", "slow"), Verdict.WAIT),
        (PermissionDenied("CALLER_NOT_ALLOWED", "misconfigured"), Verdict.WAIT),
        (Internal("INTERNAL", "defect"), Verdict.DOUBT),
    ],
)
def test_the_verdict(error: DomainError, verdict: Verdict) -> None:
    assert verdict_of(error) is verdict


def test_faulty_lines_are_in_the_message_up_to_a_limit() -> None:
    violations = [FieldViolation(f"line {number}", "must be an object") for number in range(1, 31)]
    failure = failure_of(
        InvalidArgument(
            "DATASET_INVALID", "the dataset has errors", violations=violations, metadata={"violations_omitted": "5"}
        )
    )
    assert failure.message.startswith("the dataset has errors: line 1: must be an object; line 2:")
    assert "line 20:" in failure.message
    assert "line 21:" not in failure.message
    assert failure.message.endswith("and 15 more")
    assert not failure.platform_fault


def test_the_shortfall_is_kept() -> None:
    error = FailedPrecondition("BALANCE_INSUFFICIENT", "too little", metadata={"shortfall_nanos_usd": "5"})
    assert failure_of(error).metadata == {"shortfall_nanos_usd": "5"}


def test_a_defect_of_ours_is_our_fault() -> None:
    assert failure_of(Internal("INTERNAL", "defect")).platform_fault


def test_waiting_grows_and_respects_what_the_server_asked_for() -> None:
    error = Unavailable("DEPENDENCY_UNAVAILABLE", "away")
    delays = [waiting_of(error, "billing", failures).delay_s for failures in (1, 2, 3, 50)]
    assert delays == [0.25, 0.5, 1.0, RETRY_DELAY_S_MAX]
    asked = Unavailable("DEPENDENCY_UNAVAILABLE", "away", retry_after_s=60)
    assert waiting_of(asked, "billing", 1).delay_s == 60
    assert waiting_of(error, "billing", 2).message == "waits for billing: away (attempt 2)"


@pytest.mark.parametrize(
    ("reason", "platform_fault"), [("SPEND_CAP_EXCEEDED", False), ("HOLD_EXPIRED", True), ("INTERNAL", True)]
)
def test_whose_fault_it_is(reason: str, platform_fault: bool) -> None:
    kind = Internal if reason == "INTERNAL" else FailedPrecondition
    assert failure_of(kind(reason, "no")).platform_fault is platform_fault
