"""How a command runs: options that all commands share, one client per command, errors as text or JSON.

It knows no resource.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import sys
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import MISSING, fields
from typing import Annotated, Any, NoReturn, get_type_hints

import typer

from finemesh_client.client import Client
from finemesh_client.config import ConfigError, find_config
from finemesh_client.errors import FinemeshError

EXIT_REFUSED = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for scripts instead of text for people.")]
Limit = Annotated[int, typer.Option(min=1, max=100_000, help="Most rows to show.")]


class OptionConflict(ValueError):
    """Options that cannot be meant together; the text names them."""


def one_of(choices: Sequence[str]) -> Any:
    """A callback that refuses words outside a list and names the list."""

    def check(value: str | None) -> str | None:
        if value is not None and value not in choices:
            raise typer.BadParameter(f"must be one of {', '.join(choices)}")
        return value

    return check


def options_from(kind: type) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Gives a command one option for each field of a dataclass; the command takes the dataclass as `options`.

    So a command with fifty options is no function with fifty parameters.
    """
    hints = get_type_hints(kind, include_extras=True)
    names = [field.name for field in fields(kind)]

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        def run(**values: Any) -> None:
            options = kind(**{name: values.pop(name) for name in names})
            command(options=options, **values)

        own = [
            inspect.Parameter(
                field.name,
                inspect.Parameter.KEYWORD_ONLY,
                annotation=hints[field.name],
                default=inspect.Parameter.empty if field.default is MISSING else field.default,
            )
            for field in fields(kind)
        ]
        rest = [
            parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
            for name, parameter in inspect.signature(command, eval_str=True).parameters.items()
            if name != "options"
        ]
        run.__signature__ = inspect.Signature([*own, *rest])  # type: ignore[attr-defined]
        run.__name__, run.__doc__ = command.__name__, command.__doc__
        return run

    return decorate


def fail(error: FinemeshError | ConfigError, as_json: bool) -> NoReturn:
    """Prints an error to stderr, typed in JSON mode, and exits."""
    if isinstance(error, FinemeshError):
        described = {
            "error": type(error).__name__,
            "reason": error.reason,
            "message": error.message,
            "violations": [{"field": v.field, "description": v.description} for v in error.violations],
            "metadata": dict(error.metadata),
        }
    else:
        described = {"error": "ConfigError", "message": str(error)}
    print(json.dumps(described) if as_json else f"error: {error}", file=sys.stderr)
    raise typer.Exit(EXIT_REFUSED if isinstance(error, FinemeshError) else EXIT_USAGE)


def with_client(work: Callable[[Client], Awaitable[None]], as_json: bool) -> None:
    """Runs one command's work with a connected client."""

    async def run() -> None:
        async with Client(find_config()) as mesh:
            await work(mesh)

    try:
        asyncio.run(run())
    except (FinemeshError, ConfigError) as error:
        fail(error, as_json)
    except KeyboardInterrupt:
        raise typer.Exit(EXIT_INTERRUPTED) from None
