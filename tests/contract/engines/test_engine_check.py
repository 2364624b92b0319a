"""Whether vLLM as it is installed can load an architecture: asked of vLLM itself, before anything is paid for."""

import importlib.util
import json
from pathlib import Path

import pytest

from services.inference.engines.checks.engine_check import check_engine_takes
from services.inference.engines.checks.finding import Finding


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "NobodysForCausalLM"])
def test_what_can_be_loaded_or_is_unknown_to_vllm_passes(tmp_path: Path, architecture: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architectures": [architecture]}))
    check_engine_takes(tmp_path)


def test_an_architecture_that_lacks_a_library_is_refused_with_its_name(tmp_path: Path) -> None:
    # The setup removes torchvision, whose builds for GPUs do not load beside a torch for the CPU.
    assert importlib.util.find_spec("torchvision") is None
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["Qwen3_5ForCausalLM"]}))
    with pytest.raises(Finding, match=r"Qwen3_5ForCausalLM cannot be served here: .*No module named 'torchvision'"):
        check_engine_takes(tmp_path)
