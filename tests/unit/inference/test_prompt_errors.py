"""What callers hear when a model's chat template or tokenizer goes beyond its limits."""

from __future__ import annotations

import pytest

from services.inference.engines.base import EngineError, PromptFailed, PromptTooCostly
from services.inference.serving.calls import domain_error_of


@pytest.mark.parametrize("error", [PromptTooCostly("5 s"), PromptFailed("the tokenizer of this model failed")])
def test_a_broken_model_is_no_fault_of_the_mesh(error: EngineError) -> None:
    told = domain_error_of(error)
    assert (told.code.name, told.reason) == ("FAILED_PRECONDITION", "MODEL_INVALID")
    assert "of this model" in told.message
