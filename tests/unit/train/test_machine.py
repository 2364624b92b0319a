"""What a checkpoint says of the machine that wrote it, and what a resume on another one tells."""

import platform
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from services.trainer.train.checkpoint.machine import differences, machine_of
from services.trainer.train.modeling.base_model import CausalModel
from services.trainer.train.runtime.process_group import ALONE, Group
from services.trainer.train.settings.spec_json import parse_spec

SPEC = parse_spec({"job_id": "ft-1", "base_model": {"directory": "base"}, "train_file": "train.jsonl"})


def machine(kernels: tuple[str, ...] = (), device: str = "cpu", group: Group = ALONE) -> dict[str, Any]:
    config = LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    base = LlamaForCausalLM(config)
    spec = SPEC if device == "cpu" else parse_spec({**_document(), "device": device})
    model = CausalModel(module=base, base=base, device="cpu", softcap=None, kernels=kernels)
    return machine_of(spec, group, model)


def _document() -> dict[str, Any]:
    return {"job_id": "ft-1", "base_model": {"directory": "base"}, "train_file": "train.jsonl"}


def test_the_same_machine_differs_in_nothing() -> None:
    assert differences(machine(), machine()) == []
    assert machine()["hardware"] == f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"


def test_another_width_of_a_cpu_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seen: the same threads and another instruction set end in other bytes, without a word."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    before = machine()
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    name = platform.machine()
    assert differences(before, machine()) == [f"hardware {name} AVX2 instead of {name} AVX512"]


def test_another_gpu_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (9, 0))
    names = iter(("A", "B"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _device: next(names))
    before, now = machine(device="cuda:0"), machine(device="cuda:0")
    assert differences(before, now) == ["hardware A (compute capability 9.0) instead of B (compute capability 9.0)"]


@pytest.mark.parametrize("library", ["torch", "transformers"])
def test_another_version_of_what_computes_is_told(library: str) -> None:
    now = machine()
    assert differences({**now, library: "1.0"}, now) == [f"{library} 1.0 instead of {now[library]}"]


def test_other_threads_processes_and_kernels_are_told() -> None:
    now = machine()
    before = {**machine(("flex_attention", "compiled")), "threads": 7, "processes": 3}
    assert differences(before, now) == [
        "kernels flex_attention+compiled instead of none",
        f"processes 3 instead of {now['processes']}",
        f"threads 7 instead of {now['threads']}",
    ]


def test_what_an_older_checkpoint_does_not_name_is_unknown() -> None:
    now = machine()
    before = {name: value for name, value in now.items() if name != "hardware"}
    assert differences(before, now) == [f"hardware unknown instead of {now['hardware']}"]


def test_another_machine_among_the_others_of_a_gang_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each process knows its own hardware only; their sum shows the others."""
    sums = iter((10.0, 10.0, 11.0))
    monkeypatch.setattr(Group, "total", lambda _group, _values: [next(sums)])
    before, same, other = (machine(group=Group(size=2)) for _ in range(3))
    assert differences(before, same) == []
    assert differences(before, other) == ["other processes of the run were on other hardware"]
