"""What a caller is told of an engine that failed: what went wrong, and nothing of where this server keeps its files."""

import pytest

from services.inference.engines.base import AdapterInvalid, EngineError, EngineFailed, RequestInvalid
from services.inference.serving.calls import domain_error_of


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (
            EngineFailed("/var/lib/finemesh/data/weights/rv_1/config.json cannot be read as JSON: Expecting value"),
            "config.json cannot be read as JSON: Expecting value",
        ),
        (
            EngineFailed("vLLM did not start: [Errno 2] No such file: '/srv/a b/weights/rv_1/tokenizer.json'"),
            "vLLM did not start: [Errno 2] No such file: 'tokenizer.json'",
        ),
        (EngineFailed("ipc:///tmp/finemesh-engine-1/4af is in use"), "4af is in use"),
        (EngineFailed("5/7 blocks are free, and/or more"), "5/7 blocks are free, and/or more"),
        (
            AdapterInvalid("rv_2", "vLLM refuses it: /var/lib/finemesh/data/weights/rv_2 has no target modules"),
            "adapter rv_2: vLLM refuses it: rv_2 has no target modules",
        ),
        (RequestInvalid("stop", "has /etc/hosts twice"), "stop: has /etc/hosts twice"),
    ],
)
def test_no_path_of_the_server_is_told(error: EngineError, told: str) -> None:
    assert domain_error_of(error).message == told
