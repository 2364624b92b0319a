"""Puts a peft LoRA adapter on a base model. It knows no optimizer and no file."""

from dataclasses import replace
from typing import Any

from peft import LoraConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer

from services.trainer.train.modeling.base_model import CausalModel
from services.trainer.train.modeling.lora_linear import join_adapters
from services.trainer.train.settings.failures import Violation, user_failure
from services.trainer.train.settings.spec import LoraTraining


def add_adapter(model: CausalModel, training: LoraTraining, base_id: str) -> CausalModel:
    """Freezes the base; the adapter is float32 and drawn from torch's current seed. Raises Failure(user,
    INVALID_FIELD)."""
    modules: Any = training.target_modules
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=training.r,
        lora_alpha=training.alpha,
        lora_dropout=training.dropout,
        target_modules=modules if isinstance(modules, str) else list(modules),
        bias="none",
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


def _refuse_the_vocabulary(model: CausalModel) -> None:
    """The head is multiplied past its own forward pass, where its adapter would learn nothing; embeddings are often the
    same weights, and the serving engine takes adapters of linear layers alone."""
    vocabulary = (model.base.get_input_embeddings(), model.base.get_output_embeddings())
    named = [
        name for name, layer in model.base.named_modules() if layer in vocabulary and isinstance(layer, BaseTunerLayer)
    ]
    if named:
        what = f"takes no adapter on the vocabulary's weights ({', '.join(named)}); leave them out or train all weights"
        violation = Violation(field="training.target_modules", description=what)
        raise user_failure("INVALID_FIELD", f"the engine {what}", [violation])
