"""Where the families' chat templates come from: packages of their authors or of those who train them, none copied.

The forms of Llama 2 and Phi-4, which no package ships, are written down here in our own words.
"""

import importlib.util
from collections.abc import Callable
from pathlib import Path

# `[INST]`, the system message inside the first question, and a space on both sides of an answer.
LLAMA_2 = """\
{%- for message in messages %}
    {%- if message.role == 'user' %}
        {%- set question = message.content.strip() %}
        {%- if messages[0].role == 'system' and loop.index == 2 %}
            {%- set question = '<<SYS>>\\n' + messages[0].content + '\\n<</SYS>>\\n\\n' + message.content %}
        {%- endif %}
        {{- bos_token + '[INST] ' + question.strip() + ' [/INST]' }}
    {%- elif message.role == 'assistant' %}
        {{- ' ' + message.content.strip() + ' ' + eos_token }}
    {%- elif not loop.first %}
        {{- raise_exception('a system message comes first') }}
    {%- endif %}
{%- endfor %}"""
# Header and words are parted by a token, and no line break stands anywhere.
PHI_4 = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '<|im_sep|>' + message.content + '<|im_end|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant<|im_sep|>' }}{% endif %}"""
# The end of a text stands behind the last turn alone, when no answer is asked for.
PHI_4_MINI = """\
{%- for message in messages %}
    {{- '<|' + message.role + '|>' + message.content + '<|end|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>' }}{% else %}{{- eos_token }}{% endif %}"""

# What a distill of DeepSeek-R1 is given to be tuned: its own asks with an open thought, and leaves thoughts out.
DEEPSEEK_THOUGHTS = """\
{{- bos_token }}
{%- for message in messages %}
    {%- if message.role == 'system' %}
        {{- message.content }}
    {%- elif message.role == 'user' %}
        {{- '<｜User｜>' + message.content }}
    {%- else %}
        {{- '<｜Assistant｜><think>\\n' + (message.reasoning or '') + '\\n</think>\\n\\n' }}
        {{- message.content + eos_token }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<｜Assistant｜><think>\\n' }}{% endif %}"""

Source = Callable[[], str]


def trl(name: str) -> Source:
    """A template that trl ships, by the name of its file."""

    def read() -> str:
        package = importlib.util.find_spec("trl")
        assert package is not None
        assert package.origin is not None
        return (Path(package.origin).parent / "chat_templates" / f"{name}.jinja").read_text()

    return read


def mistral(version: str, *, spm: bool) -> Source:
    """A template of a version of Mistral's tokenizers, as its authors' own package makes it."""

    def make() -> str:
        from mistral_common.integrations.chat_templates.template_generator import TemplateConfig, build_chat_template
        from mistral_common.tokens.tokenizers.base import TokenizerVersion

        return str(build_chat_template(TemplateConfig(version=TokenizerVersion(version), spm=spm)))

    return make


def written(source: str) -> Source:
    return lambda: source
