"""A seeded Llama of some hundred thousand random weights with a real tokenizer, and random adapters for it.

Untrained on purpose: the engine suite compares numbers with transformers, it does not ask for sense.
"""

from __future__ import annotations

import inspect
import json
import textwrap
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CHAT_TEMPLATE = (
    "{{ bos_token }}{% if tools %}<|system|>{{ tools | tojson }}<|end|>{% endif %}"
    "{% if enable_thinking is defined %}<|system|>{{ enable_thinking }}<|end|>{% endif %}{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant', 'tool'] %}{{ raise_exception('unknown role') }}"
    "{% endif %}<|{{ message['role'] }}|>{{ message['reasoning_content'] }}{{ message['content'] }}"
    "{% for call in message['tool_calls'] %}<tool_call>{{ call['function'] | tojson }}</tool_call>{% endfor %}<|end|>"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIALS = ["<s>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
CONTEXT_TOKENS = 256
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def build_base(folder: Path, *, seed: int = 7, layers: int = 2) -> Path:
    """Write config, weights and tokenizer in the layout of the hub."""
    tokenizer = train_tokenizer()
    tokenizer.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=layers,
        num_attention_heads=4,  # heads of 32: the smallest that vLLM's CPU attention takes
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT_TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=False,
        # Large weights make decisive logits, so that rounding cannot flip a greedy choice.
        initializer_range=0.15,
    )
    torch.manual_seed(seed)
    LlamaForCausalLM(config).to(torch.float32).save_pretrained(folder, safe_serialization=True)
    return folder


def build_adapter(base: Path, folder: Path, *, rank: int = 8, seed: int = 1, **settings: Any) -> Path:
    """Write a LoRA adapter whose B is random too, so large that every answer changes. `settings` are peft's."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)
    config: dict[str, Any] = {"lora_alpha": 2 * rank, "target_modules": TARGETS} | settings
    tuned = get_peft_model(model, LoraConfig(r=rank, task_type="CAUSAL_LM", **config))
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.15)
    tuned.save_pretrained(folder, safe_serialization=True)
    # peft records where the base lay on this machine; an adapter that travels must not depend on it.
    config_path = folder / "adapter_config.json"
    config = json.loads(config_path.read_text())
    config_path.write_text(json.dumps(config | {"base_model_name_or_path": "tiny-llama"}))
    return folder


def train_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    text = "\n".join(
        inspect.getdoc(getattr(module, name)) or "" for module in (json, textwrap) for name in module.__all__
    )
    tokenizer.train_from_iterator(text.splitlines(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="<|end|>", chat_template=CHAT_TEMPLATE
    )
