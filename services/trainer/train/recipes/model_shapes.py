"""The base models that can be made: plain data.

Sizes fit what serving engines take: head sizes of 32 or 64, vocabularies in steps of 64. It knows no torch.
"""

import hashlib
import json
import sys
from dataclasses import asdict, dataclass
from typing import Any

RECIPE_VERSION = 2
CONTEXT_LENGTH = 512


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """`config` goes to the transformers config of `model_type` as it is; `pretrain_steps` 0 leaves the seeded random
    weights.

    `embedding_scale` multiplies the drawn embeddings. Where they are also the head, they bound how sure a narrow model
    can ever be: its hidden states have length sqrt(width), and an adapter cannot stretch a frozen head.
    """

    name: str
    model_type: str
    config: dict[str, Any]
    vocabulary: int
    pretrain_steps: int = 0
    embedding_scale: float = 1.0
    seed: int = 7

    def digest(self) -> str:
        """Decides what is made; the corpus follows the Python version."""
        decisive = {"recipe": asdict(self), "version": RECIPE_VERSION, "python": sys.version}
        return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()


def _small(**more: Any) -> dict[str, Any]:
    return {
        "hidden_size": 64,
        "intermediate_size": 192,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": CONTEXT_LENGTH,
        "initializer_range": 0.06,
        **more,
    }


_ALL = (
    Recipe(
        name="demo-llama",
        model_type="llama",
        vocabulary=2048,
        pretrain_steps=800,
        embedding_scale=2.5,
        config={
            "hidden_size": 128,
            "intermediate_size": 384,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "max_position_embeddings": CONTEXT_LENGTH,
            "initializer_range": 0.08,
            "tie_word_embeddings": True,
        },
    ),
    Recipe(name="tiny-llama", model_type="llama", vocabulary=1024, config=_small(head_dim=32)),
    # Rotations of other speeds: CodeLlama's slow ones, and those of Llama 3.1, stretched for a longer context.
    Recipe(
        name="tiny-codellama",
        model_type="llama",
        vocabulary=1024,
        config=_small(num_key_value_heads=2, rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0}),
    ),
    Recipe(
        name="tiny-llama3",
        model_type="llama",
        vocabulary=1024,
        config=_small(
            head_dim=32,
            rope_parameters={
                "rope_type": "llama3",
                "rope_theta": 500_000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": CONTEXT_LENGTH // 8,
            },
        ),
    ),
    Recipe(name="tiny-qwen2", model_type="qwen2", vocabulary=1024, config=_small()),
    Recipe(name="tiny-qwen3", model_type="qwen3", vocabulary=1024, config=_small(head_dim=32)),
    Recipe(name="tiny-mistral", model_type="mistral", vocabulary=1024, config=_small(head_dim=32, sliding_window=None)),
    Recipe(
        name="tiny-mixtral",
        model_type="mixtral",
        vocabulary=1024,
        # The coefficient of Mixtral 8x7B.
        config=_small(
            head_dim=32, sliding_window=None, num_local_experts=4, num_experts_per_tok=2, router_aux_loss_coef=0.02
        ),
    ),
    Recipe(name="tiny-gemma", model_type="gemma", vocabulary=1024, config=_small(head_dim=32)),
    # Scores of attention capped so low that it shows; every other layer sees a window shorter than most rows.
    Recipe(
        name="tiny-gemma2",
        model_type="gemma2",
        vocabulary=1024,
        config=_small(head_dim=32, query_pre_attn_scalar=32, attn_logit_softcapping=2.0, sliding_window=16),
    ),
    # Query, key and value are one matrix here, gate and up another.
    Recipe(name="tiny-phi3", model_type="phi3", vocabulary=1024, config=_small(num_key_value_heads=2)),
)
RECIPES = {recipe.name: recipe for recipe in _ALL}
