"""The one operation against peft's own forward pass, layer by layer and in every state that a layer can be in."""

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import Linear

from services.trainer.train.modeling.lora_linear import join_adapters


def adapted(*, bias: bool = True, dropout: float = 0.0) -> Any:
    torch.manual_seed(0)
    base = torch.nn.Sequential(torch.nn.Linear(12, 20, bias=bias), torch.nn.Tanh(), torch.nn.Linear(20, 8, bias=bias))
    config = LoraConfig(r=3, lora_alpha=7, lora_dropout=dropout, target_modules=["0", "2"], init_lora_weights=False)
    return get_peft_model(base, config)


def outcome(module: Any, inputs: Any) -> tuple[Any, list[Any]]:
    output = module(inputs)
    moved = [parameter for parameter in module.parameters() if parameter.requires_grad]
    return output, list(torch.autograd.grad((output**2).sum(), [inputs, *moved]))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(5, 12), (2, 5, 12)])
def test_it_is_pefts_own_pass_with_its_gradients(bias: bool, shape: tuple[int, ...]) -> None:
    plain = adapted(bias=bias)
    joined = copy.deepcopy(plain)
    join_adapters(joined)
    assert all("forward" in vars(layer) for layer in joined.modules() if isinstance(layer, Linear))
    inputs = torch.randn(*shape, requires_grad=True)
    expected, expected_gradients = outcome(plain, inputs)
    found, gradients = outcome(joined, inputs)
    torch.testing.assert_close(found, expected)
    for one, other in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_no_gradient_is_made_for_inputs_that_need_none() -> None:
    joined = adapted()
    join_adapters(joined)
    joined(torch.randn(4, 12)).sum().backward()
    assert all((parameter.grad is None) != parameter.requires_grad for parameter in joined.parameters())


def test_an_adapter_that_is_off_or_merged_goes_pefts_way() -> None:
    plain, joined = adapted(), adapted()
    join_adapters(joined)
    inputs = torch.randn(4, 12)
    with plain.disable_adapter(), joined.disable_adapter():
        torch.testing.assert_close(joined(inputs), plain(inputs))
    expected = plain(inputs)
    joined.merge_adapter()
    torch.testing.assert_close(joined(inputs), expected)
    joined.unmerge_adapter()
    torch.testing.assert_close(joined.merge_and_unload()(inputs), expected)


def test_a_layer_with_dropout_keeps_pefts_pass() -> None:
    joined = adapted(dropout=0.5)
    join_adapters(joined)
    assert not any("forward" in vars(layer) for layer in joined.modules())


def test_under_a_base_of_16_bits_the_adapter_learns_in_32() -> None:
    joined, wide = adapted(), adapted()
    for layer in joined.modules():
        if isinstance(layer, Linear):
            layer.base_layer.bfloat16()
    join_adapters(joined)
    inputs = torch.randn(6, 12)
    output = joined(inputs.bfloat16())
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), wide(inputs), rtol=0.05, atol=0.1)
    output.sum().backward()
    gradients = [parameter.grad for parameter in joined.parameters() if parameter.requires_grad]
    assert {gradient.dtype for gradient in gradients} == {torch.float32}
