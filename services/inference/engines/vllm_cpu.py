"""How vLLM computes on a CPU: in its child itself, with LoRA layers of our own. Not pure: vllm.

It knows no engine and no request.
"""

from __future__ import annotations

from typing import Any

from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU
from vllm.platforms import current_platform
from vllm.v1.executor.uniproc_executor import UniProcExecutor

from services.inference.engines.adapters.lora_rows import RowGroup, expand, group_rows, shrink

_CPU_LORA = "services.inference.engines.vllm_cpu.CpuLora"


class CpuExecutor(UniProcExecutor):  # type: ignore[misc]  # vllm is not typed
    """Computes in vLLM's child itself, with LoRA layers that leave the rows of the base model alone."""

    def _init_executor(self) -> None:
        type(current_platform).get_punica_wrapper = classmethod(lambda _: _CPU_LORA)
        super()._init_executor()


class CpuLora(PunicaWrapperCPU):  # type: ignore[misc]  # vllm is not typed
    """vLLM 0.32 on a CPU reads "no adapter" (-1) as "the last adapter", so that a request for the base model gets the
    weights of another tenant when both are in one batch. It also copies an adapter's matrices once per token.
    """

    _groups: tuple[RowGroup, ...] = ()

    def update_metadata(self, *args: Any, **kwargs: Any) -> None:
        super().update_metadata(*args, **kwargs)
        self._groups = group_rows(self.token_lora_indices)

    def add_shrink(self, y: Any, x: Any, lora_a_stacked: Any, scale: float, **_: Any) -> None:
        inputs = x.view(-1, x.shape[-1])
        for out, lora_a in zip(y, lora_a_stacked, strict=True):
            shrink(out, inputs, lora_a, scale, self._groups)

    def add_expand(
        self,
        y: Any,
        x: Any,
        lora_b_stacked: Any,
        output_slices: tuple[int, ...],
        offset_start: int = 0,
        add_inputs: bool = True,
        **_: Any,
    ) -> None:
        out = y.view(-1, y.shape[-1])
        start = offset_start
        for inputs, lora_b, width in zip(x, lora_b_stacked, output_slices, strict=True):
            expand(out, inputs, lora_b, slice(start, start + width), self._groups)
            start += width
