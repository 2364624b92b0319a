"""The routers of a mixture of experts: whether a family balances them, and their logits, kept while somebody listens.

It knows no loss; losses/balancing.py has the formula.
"""

import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

# What transformers calls its loss in the module of a family, and that function's arguments.
_FUNCTION = "load_balancing_loss_func"
_ARGUMENTS = ["gate_logits", "num_experts", "top_k", "attention_mask"]
_COEFFICIENTS = ("router_aux_loss_coef", "aux_loss_coef")

Hear = Callable[[Sequence[Any]], None]


@dataclass(kw_only=True)
class Routers:
    """`coefficient` is what the authors of the model multiply the balancing loss by, `chosen` how many of the `experts`
    take a token. While `listen` lasts, each pass of the body hands over the routers' logits."""

    coefficient: float
    experts: int
    chosen: int
    _hear: tuple[bool, Hear] | None = field(default=None, repr=False)

    @contextmanager
    def listen(self, hear: Hear, *, with_gradient: bool) -> Iterator[None]:
        """`hear` gets logits [tokens, experts] of each router, pads among them. Passes with a gradient are heard, or
        those without: the pass of a reference must not be."""
        before, self._hear = self._hear, (with_gradient, hear)
        try:
            yield
        finally:
            self._hear = before

    @property
    def is_heard(self) -> bool:
        return self._hear is not None and self._hear[0] == torch.is_grad_enabled()

    def pass_on(self, logits: Sequence[Any]) -> None:
        assert self._hear is not None
        self._hear[1](logits)


def linear_routers(base: Any) -> set[str]:
    """The last names of routers that are linear layers (Jamba, Phi-3.5 MoE). An adapter on one would be put between the
    layer and whoever reads its logits; most families have routers of a kind of their own, which no adapter takes."""
    decoder = base.get_decoder()
    recorded = (getattr(decoder, "_can_record_outputs", None) or {}).get("router_logits", ())
    # Those that only name the kind of layer are no linear ones.
    recorders = [
        each for each in (recorded if isinstance(recorded, list) else [recorded]) if hasattr(each, "layer_name")
    ]
    return {
        name.rsplit(".", 1)[-1]
        for name, layer in decoder.named_modules()
        for recorder in recorders
        if isinstance(layer, torch.nn.Linear)
        and isinstance(layer, recorder.target_class)
        and (recorder.layer_name is None or f".{recorder.layer_name}." in f".{name}.")
    }


def routers_of(base: Any) -> Routers | None:
    """None for a model without a mixture, and for one that transformers balances by no loss, or not at all."""
    function = getattr(sys.modules[type(base).__module__], _FUNCTION, None)
    coefficient = next((getattr(base, name) for name in _COEFFICIENTS if getattr(base, name, None)), None)
    if function is None or coefficient is None or list(inspect.signature(function).parameters) != _ARGUMENTS:
        return None
    return Routers(coefficient=float(coefficient), experts=base.num_experts, chosen=base.num_experts_per_tok)
