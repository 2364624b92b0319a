"""The settings of the archive fit together: billing does not start where events would be filed again and again."""

from typing import Any

import pytest
from pydantic import ValidationError

from services.billing.config import BillingSettings


@pytest.mark.parametrize(
    ("settings", "wrong"),
    [
        ({"archive_ack_wait_s": 60}, "archive_interval_s"),
        ({"archive_interval_s": 121}, "archive_interval_s"),
        ({"archive_late_s": 300}, "archive_late_s"),
        ({"archive_ack_wait_s": 3600}, "archive_late_s"),
        ({"archive_pending_max": 4999}, "archive_pending_max"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict[str, Any], wrong: str) -> None:
    with pytest.raises(ValidationError, match=wrong):
        BillingSettings(**settings)


def test_longer_times_fit_together() -> None:
    settings = BillingSettings(archive_interval_s=240, archive_ack_wait_s=600, archive_late_s=601)
    assert settings.archive_ack_wait_s == 600
