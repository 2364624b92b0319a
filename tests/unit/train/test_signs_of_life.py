"""What a long run says between the ends of its ranges, so that its agent does not take it for hung."""

from typing import Any

import pytest

from services.trainer.train.checkpoint.position import Position
from services.trainer.train.data.schedule import RunSchedule
from services.trainer.train.loop.progress_report import Progress, StepRecord
from services.trainer.train.runtime import event_stream as alive


class Hearing:
    """The events that were emitted, and the time as the engine sees it."""

    def __init__(self) -> None:
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.now_s = 0.0

    def __call__(self, event_type: str, /, **fields: Any) -> None:
        self.events.append((event_type, fields))


@pytest.fixture
def hearing(monkeypatch: pytest.MonkeyPatch) -> Hearing:
    heard = Hearing()
    monkeypatch.setattr(alive, "monotonic", lambda: heard.now_s)
    return heard


def test_long_work_says_now_and_then_how_far_it_is(hearing: Hearing) -> None:
    tell = alive.sign_of_life(hearing, "reference", total=10, done=2)
    for _ in range(5):
        hearing.now_s += alive.SIGN_OF_LIFE_S / 2
        tell(2)
    assert hearing.events == [
        ("reference", {"done": 6, "total": 10}),
        ("reference", {"done": 10, "total": 10}),
    ]


def test_a_range_that_takes_hours_is_not_silent(hearing: Hearing) -> None:
    plan = RunSchedule(
        steps_per_epoch=1000,
        total_steps=1000,
        sequences_per_step=1,
        seed=0,
        evaluations=(),
        checkpoints={1000: False},
        reports=(1000,),
    )
    progress = Progress(plan, hearing, train_tokens_total=1000, validation_tokens=0)
    progress.start_at(Position(step=500, micro_batch_tokens=16))
    for step in range(501, 504):
        hearing.now_s += 2000
        record = StepRecord(step=step, loss=1.0, learning_rate=0.1, grad_norm=1.0, train_tokens=1)
        progress.add(record, started_s=hearing.now_s - 2000, seen_s=hearing.now_s)
    assert hearing.events == [("training", {"done": step, "total": 1000}) for step in range(501, 504)]
