"""docs/http.md is true: its tables list the parameters that the routes know, and settings that exist."""

import json
import re
from pathlib import Path

from services.gateway.config import GatewaySettings
from services.gateway.http import chat_request, completion_request
from services.gateway.http.app import HttpApp
from services.gateway.http.request_fields import Parameters

TEXT = (Path(__file__).parents[3] / "docs" / "http.md").read_text(encoding="utf-8")
ROUTES: dict[str, Parameters] = {"chat": chat_request.PARAMETERS, "completion": completion_request.PARAMETERS}


def table(head: str) -> dict[str, list[str]]:
    """The words in code of each row, by what its first cell says."""
    rows = TEXT.split(f"| {head} |", 1)[1].split("\n\n")[0].splitlines()[2:]
    cells = [row.strip("|").split("|", 1) for row in rows]
    return {first.strip(): re.findall(r"`([^`]+)`", rest) for first, rest in cells}


def test_the_tables_are_the_parameters_that_are_known() -> None:
    for head, kept in (("read by", "read"), ("changes nothing in an answer, and is ignored by", "ignored")):
        listed = table(head)
        for route, known in ROUTES.items():
            names = listed["both"] + listed[route]
            assert sorted(names) == sorted(getattr(known, kept))
    fixed = table("allowed with these values alone")
    for route, known in ROUTES.items():
        assert sorted(fixed[route]) == sorted(
            f"{name}: {json.dumps(value)}" for name, values in known.fixed.items() for value in values
        )


def test_the_routes_and_the_settings_exist() -> None:
    app = HttpApp(None, None, None, None, GatewaySettings())  # type: ignore[arg-type]
    routes = {route.path.replace(":path", "").replace("model_id", "id") for route in app.asgi.routes}  # type: ignore[attr-defined]
    assert set(re.findall(r"`(?:GET|POST) (/[^`]*)`", TEXT)) == routes
    settings = set(table("setting of the gateway"))
    assert {name.strip("`") for name in settings} <= set(GatewaySettings.model_fields)
