"""A model's tokenizer and chat template as prompts need them, read by the rules that training reads them by. Not pure:
disk.

It refuses to know processes and limits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

from formats.prompts.chat_template import NO_SWITCHES, TemplateRenderer
from formats.prompts.faults import RenderingRefused
from formats.prompts.model_folder import ModelFolder, read_model_folder

_NO_TEMPLATE = "it has no chat template; ask it to complete a text"


class PromptTokenizer:
    """Ids and texts of one model. A template that prints the date prints that of the day, in UTC."""

    def __init__(self, folder: ModelFolder) -> None:
        self._folder = folder
        self._renderer: tuple[date, TemplateRenderer] | None = None

    @classmethod
    def read(cls, model_path: Path) -> PromptTokenizer:
        """Raises ModelFault."""
        return cls(read_model_folder(model_path))

    def chat_ids(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] = (),
        switches: Mapping[str, bool] = NO_SWITCHES,
    ) -> list[int]:
        """Ids of the conversation with the generation prompt. `messages` as in formats/prompts/plain_messages.py.
        Raises RenderingRefused, ModelFault for a template that does not compile, and ValueError or TypeError for text
        that is none."""
        text = self._rendered_by().render(messages, tools=tools, add_generation_prompt=True, switches=switches)
        # The template writes every special token itself.
        return self._ids(text)

    def text_ids(self, text: str, *, opening: bool) -> list[int]:
        """Ids of the text; with `opening` behind what the tokenizer puts before a text, and never with what it puts
        behind one. Raises as `chat_ids`."""
        return [*(self._folder.opening_ids if opening else ()), *self._ids(text)]

    def text_of(self, token_id: int) -> str:
        """The text of a token alone, special ones included."""
        return str(self._folder.tokenizer.decode([token_id], skip_special_tokens=False))

    def _ids(self, text: str) -> list[int]:
        ids = list(self._folder.tokenizer.encode(text, add_special_tokens=False).ids)
        highest = max(ids, default=0)
        if highest >= self._folder.vocabulary_size:
            token = self._folder.tokenizer.id_to_token(highest)
            raise RenderingRefused(f"{token!r} in it is a token that the model has no weights for")
        return ids

    def _rendered_by(self) -> TemplateRenderer:
        today = datetime.now(UTC).date()
        if self._renderer is None or self._renderer[0] != today:
            # The process that renders is bounded as a whole.
            made = self._folder.renderer(today, bound=nullcontext)
            if made is None:
                raise RenderingRefused(_NO_TEMPLATE)
            self._renderer = (today, made)
        return self._renderer[1]
