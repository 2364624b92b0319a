"""What a log line must not say: a traceback tells where something failed, never what the variables held."""

import logging
from typing import Literal

import pytest
import structlog

from chassis.settings import ChassisSettings
from chassis.telemetry import logs


@pytest.mark.parametrize("log_format", ["console", "json"])
def test_tracebacks_keep_the_values_of_variables_to_themselves(
    log_format: Literal["console", "json"], capsys: pytest.CaptureFixture[str]
) -> None:
    root = logging.getLogger()
    handlers, level = root.handlers, root.level
    try:
        logs.configure(ChassisSettings(service_name="tester", log_format=log_format))
        _fail_with("hunter" + "2")
    finally:
        root.handlers = handlers
        root.setLevel(level)
        structlog.reset_defaults()
    written = capsys.readouterr().err
    assert "ValueError: the password is wrong" in written
    assert "_fail_with" in written
    assert "hunter2" not in written


def _fail_with(password: str) -> None:
    try:
        assert password
        raise ValueError("the password is wrong")
    except ValueError:
        structlog.get_logger().exception("login_failed")
