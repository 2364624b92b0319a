"""Moments go to protobuf and back unchanged; what no calendar holds is refused."""

from datetime import UTC, datetime, timedelta, timezone

import pytest
from google.protobuf.timestamp_pb2 import Timestamp
from hypothesis import given
from hypothesis import strategies as st

from chassis.timestamps import time_from_proto, time_to_proto


@given(st.datetimes(min_value=datetime(1, 1, 1), max_value=datetime(9999, 12, 31)))
def test_a_moment_comes_back_as_it_went(moment: datetime) -> None:
    aware = moment.replace(tzinfo=UTC)
    stamp = time_to_proto(aware)
    assert time_from_proto(stamp) == aware == stamp.ToDatetime(tzinfo=UTC)


def test_another_zone_is_the_same_moment_in_utc() -> None:
    moment = datetime(2030, 1, 1, 2, tzinfo=timezone(timedelta(hours=2)))
    assert time_from_proto(time_to_proto(moment)) == datetime(2030, 1, 1, tzinfo=UTC)


def test_no_moment_is_no_stamp() -> None:
    assert time_to_proto(None) is None


@pytest.mark.parametrize("seconds", [2**62, -(2**62), 10**12])
def test_what_no_calendar_holds_is_refused(seconds: int) -> None:
    with pytest.raises(ValueError, match="no moment"):
        time_from_proto(Timestamp(seconds=seconds))
