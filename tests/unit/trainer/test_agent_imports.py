"""The agent stays light: neither torch nor what brings it is imported by its process."""

import subprocess
import sys
from pathlib import Path

HEAVY = ("torch", "transformers", "peft", "safetensors", "tokenizers", "numpy", "vllm")


def test_the_agent_imports_nothing_heavy() -> None:
    code = f"import sys, services.trainer.main; print([m for m in {HEAVY!r} if m in sys.modules])"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[3]
    )
    assert result.stdout.strip() == "[]"
