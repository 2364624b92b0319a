"""Puts a peft LoRA adapter on a base model. It knows no optimizer and no file."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NoReturn

from peft import LoraConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch.nn import Linear

from formats.adapters import ALL_LINEAR
from formats.adapters import LoraConfig as Start
from services.trainer.train.modeling.base_model import CausalModel
from services.trainer.train.modeling.lora_linear import join_adapters
from services.trainer.train.modeling.routers import linear_routers
from services.trainer.train.modeling.start_adapter import follows
from services.trainer.train.settings.failures import Violation, user_failure
from services.trainer.train.settings.spec import LoraTraining


def add_adapter(model: CausalModel, training: LoraTraining, base_id: str, start: Start | None = None) -> CausalModel:
    """Freezes the base; the adapter is float32 and drawn from torch's current seed. `start` is the adapter that the run
    goes on with: its patterns are kept, and its layers where the run names none. Raises Failure(user,
    INVALID_FIELD)."""
    if start is not None and follows(training):
        named = _layers_of(model, start)
    else:
        named = {"target_modules": _listed(_targets(model, training.target_modules))}
    if start is not None:
        named["use_rslora"] = start.use_rslora
        named["rank_pattern"], named["alpha_pattern"] = dict(start.rank_pattern), dict(start.alpha_pattern)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=training.r,
        lora_alpha=training.alpha,
        lora_dropout=training.dropout,
        bias="none",
        **named,
    )
    try:
        module = get_peft_model(model.base, config)
    except ValueError as error:
        # The experts of a mixture are fused parameters, for which peft knows no dropout.
        field = "training.dropout" if "lora_dropout" in str(error) else "training.target_modules"
        violation = Violation(field=field, description=f"does not fit this base model: {error}")
        raise user_failure("INVALID_FIELD", f"no adapter can be put on the base model: {error}", [violation]) from error
    _refuse_the_vocabulary(model)
    # peft notes the folder that the base was loaded from, which means nothing elsewhere.
    module.peft_config["default"].base_model_name_or_path = base_id
    join_adapters(module)
    return replace(model, module=module)


def _targets(model: CausalModel, wanted: str | tuple[str, ...]) -> str | tuple[str, ...]:
    """The wanted modules; "all-linear" leaves out the routers of a mixture of experts that are linear layers. Raises
    Failure(user, INVALID_FIELD) when one of them is named."""
    routers = linear_routers(model.base)
    if not routers:
        return wanted
    if not isinstance(wanted, str):
        named = sorted(routers & {name.rsplit(".", 1)[-1] for name in wanted})
        if named:
            _refuse("takes no adapter on the router of a mixture of experts", named)
        return wanted
    head = model.base.get_output_embeddings()
    linear = [name for name, layer in model.base.named_modules() if isinstance(layer, Linear) and layer is not head]
    return tuple(sorted({name.rsplit(".", 1)[-1] for name in linear} - routers))


def _layers_of(model: CausalModel, start: Start) -> dict[str, Any]:
    """As peft's settings have them: what is not used is nothing there."""
    modules = start.target_modules
    if isinstance(modules, str) and modules.lower() == ALL_LINEAR:
        modules = _targets(model, modules)
    else:
        routers = linear_routers(model.base)
        leaves = ((name, name.rsplit(".", 1)[-1]) for name, _ in model.base.named_modules())
        if named := [name for name, leaf in leaves if leaf in routers and start.targets(name)]:
            _refuse("takes no adapter on the router of a mixture of experts", named)
    return {
        "target_modules": _listed(modules) or [],
        "exclude_modules": _listed(start.exclude_modules) or None,
        "layers_to_transform": list(start.layers_to_transform) or None,
        "layers_pattern": list(start.layers_pattern) or None,
        "target_parameters": list(start.target_parameters) or None,
    }


def _listed(modules: str | tuple[str, ...]) -> str | list[str]:
    return modules if isinstance(modules, str) else list(modules)


def _refuse_the_vocabulary(model: CausalModel) -> None:
    """The head is multiplied past its own forward pass, where its adapter would learn nothing; embeddings are often the
    same weights, and the serving engine takes adapters of linear layers alone."""
    vocabulary = (model.base.get_input_embeddings(), model.base.get_output_embeddings())
    named = [
        name for name, layer in model.base.named_modules() if layer in vocabulary and isinstance(layer, BaseTunerLayer)
    ]
    if named:
        _refuse("takes no adapter on the vocabulary's weights", named)


def _refuse(what: str, named: Sequence[str]) -> NoReturn:
    what = f"{what} ({', '.join(named)}); leave them out or train all weights"
    violation = Violation(field="training.target_modules", description=what)
    raise user_failure("INVALID_FIELD", f"the engine {what}", [violation])
