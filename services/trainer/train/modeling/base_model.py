"""Loads a base model and splits it into the body that makes hidden states and the vocabulary head.

It knows no data. Weights come from safetensors only, code only from transformers.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM

from services.trainer.train.data.batches.micro_batch import MicroBatch
from services.trainer.train.modeling.attention import plain_attention
from services.trainer.train.modeling.base_files import require_all_found, require_numbers, require_whole_files
from services.trainer.train.modeling.fsdp_exchanges import Exchanges
from services.trainer.train.modeling.kernels import on_cuda, reduced_precision, rows_known, use_kernels
from services.trainer.train.modeling.routers import Routers, routers_of
from services.trainer.train.settings.failures import user_failure

# Hidden states times head must be the model's own logits; beyond this the architecture does something we do not know.
_HEAD_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.25}


def _call(function: Callable[..., Any], *arguments: Any) -> Any:
    return function(*arguments)


@dataclass(frozen=True, kw_only=True)
class CausalModel:
    """`module` is what is trained (a transformers model, or a peft model around it); `base` is always the former."""

    module: Any
    base: Any
    device: str
    softcap: float | None
    # How a function that reads weights outside of a module's own forward is called; sharded weights are gathered around
    # it.
    call: Callable[..., Any] = _call
    # The collectives of sharded weights; None where every process has all of them.
    exchanges: Exchanges | None = None
    # What the body computes with beyond torch's own, for a checkpoint to name; nothing on a CPU.
    kernels: tuple[str, ...] = ()
    # Whether the body multiplies its float32 weights in 16 bits; the head and the loss never do.
    autocast: bool = False
    # Whether gradients of full weights are added where they are kept.
    in_place: bool = False
    # Of a mixture of experts that its authors balance; None for every other model.
    routers: Routers | None = None

    @property
    def trainable(self) -> dict[str, Any]:
        return {name: value for name, value in self.module.named_parameters() if value.requires_grad}

    @property
    def head_weight(self) -> Any:
        return self.base.get_output_embeddings().weight

    def labelled_hidden(self, batch: MicroBatch) -> tuple[Any, Any]:
        """Hidden states [labelled, width] and their targets [labelled]: the head never sees a token without a label."""
        with reduced_precision(self.device, wanted=self.autocast), rows_known(batch.row_numbers):
            output = self.base.get_decoder()(
                input_ids=batch.input_ids,
                position_ids=batch.position_ids,
                use_cache=False,
                return_dict=True,
                **self._row_ends(batch),
                **({} if self.routers is None else {"output_router_logits": self.routers.is_heard}),
            )
        if self.routers is not None and self.routers.is_heard:
            self.routers.pass_on(output.router_logits)
        return output.last_hidden_state.flatten(0, 1).index_select(0, batch.label_places), batch.label_ids

    def _row_ends(self, batch: MicroBatch) -> dict[str, Any]:
        """What flash attention would otherwise ask the device for in every layer, and wait for."""
        if batch.row_ends is None or self.base.config._attn_implementation != "flash_attention_2":
            return {}
        longest = batch.longest_row_tokens
        return {
            "cu_seq_lens_q": batch.row_ends, "cu_seq_lens_k": batch.row_ends,
            "max_length_q": longest, "max_length_k": longest,
        }  # fmt: skip

    def parameter_counts(self) -> tuple[int, int]:
        """(trainable, total)."""
        total = sum(parameter.numel() for parameter in self.module.parameters())
        return sum(parameter.numel() for parameter in self.trainable.values()), total


def load_base(directory: Path, device: str, *, full: bool, placed: bool = True) -> CausalModel:
    """Raises Failure(user, MODEL_INVALID). On a GPU float32 weights are multiplied in 16 bits. Unless `placed`, the
    weights stay in the machine's memory, and sharding brings them to `device`."""
    dtype = weights_dtype(device, full=full)
    base = _read(directory, dtype)
    if placed:
        base.to(device)
    require_numbers(dict(base.named_parameters()))
    head = base.get_output_embeddings()
    if head is None or getattr(head, "bias", None) is not None:
        raise user_failure("MODEL_INVALID", "the base model has no plain vocabulary head")
    model = CausalModel(
        module=base, base=base, device=device, softcap=getattr(base.config, "final_logit_softcapping", None)
    )
    _check_head(model, dtype)
    return replace(
        model,
        kernels=use_kernels(base, device, dtype),
        autocast=full and on_cuda(device),
        routers=routers_of(base),
    )


def weights_dtype(device: str, *, full: bool) -> Any:
    """float32 on a CPU and when all weights are trained; a frozen base on a GPU is bfloat16."""
    return torch.float32 if full or device == "cpu" else torch.bfloat16


def _read(directory: Path, dtype: Any) -> Any:
    require_whole_files(directory)
    try:
        config = AutoConfig.from_pretrained(str(directory), trust_remote_code=False, local_files_only=True)
        base, found = AutoModelForCausalLM.from_pretrained(
            str(directory),
            dtype=dtype,
            attn_implementation=plain_attention(config),
            trust_remote_code=False,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
            # Then they are listed, and refused below with their names.
            ignore_mismatched_sizes=True,
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise user_failure("MODEL_INVALID", f"the base model cannot be loaded: {error}") from error
    require_all_found(found["missing_keys"], [name for name, *_ in found["mismatched_keys"]])
    return base


def _check_head(model: CausalModel, dtype: Any) -> None:
    """Compares the model's own logits with those of the shortcut through the head, on a few tokens."""
    model.base.eval()
    ids = torch.arange(8, device=model.head_weight.device)[None] % model.head_weight.shape[0]
    with torch.no_grad():
        theirs = model.base(input_ids=ids, use_cache=False).logits.float()
        hidden = model.base.get_decoder()(input_ids=ids, use_cache=False, return_dict=True).last_hidden_state
        ours = logits_of(hidden, model.head_weight, model.softcap)
    difference = (theirs - ours).abs().max().item()
    if not difference <= _HEAD_TOLERANCE[dtype]:
        raise user_failure(
            "MODEL_INVALID",
            f"the architecture {type(model.base).__name__} is not supported: its logits are not hidden states times "
            f"head (difference {difference:.3g})",
        )


def logits_of(hidden: Any, weight: Any, softcap: float | None) -> Any:
    logits = functional.linear(hidden, weight).float()
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)
