"""What can be wrong with a model's tokenizer or chat template, and with a conversation under it."""

TEMPLATE = "chat template"


class ModelFault(Exception):
    """A file of the model is at fault. `part` is the file, or "chat template"; `problem` goes on from there, as in
    "tokenizer.json" and "is no tokenizer: ..."."""

    def __init__(self, part: str, problem: str) -> None:
        super().__init__(f"{part} {problem}")
        self.part = part
        self.problem = problem

    def __reduce__(self) -> tuple[type["ModelFault"], tuple[str, str]]:
        return ModelFault, (self.part, self.problem)


class RenderingRefused(Exception):
    """The chat template or the tokenizer does not take this. The text says what was expected; `words` are what the
    template itself said of it, or the same text."""

    def __init__(self, expected: str, words: str | None = None) -> None:
        super().__init__(expected)
        self.words = expected if words is None else words


def broken_template(why: str) -> ModelFault:
    return ModelFault(TEMPLATE, f"cannot be used: {why}")
