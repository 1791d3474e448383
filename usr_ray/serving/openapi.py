"""What the service takes and answers, field by field: the schemas of /openapi.json, and a page that shows them."""

from __future__ import annotations

import html
from collections.abc import Iterator, Mapping
from typing import Any

Schema = dict[str, Any]


def _object(fields: Mapping[str, Schema], *, needed: tuple[str, ...] = (), **more: Any) -> Schema:
    return {"type": "object", "properties": dict(fields), "required": list(needed), **more}


def _text(description: str, **more: Any) -> Schema:
    return {"type": "string", "description": description, **more}


def _list(items: Schema, description: str, **more: Any) -> Schema:
    return {"type": "array", "items": items, "description": description, **more}


def _probability(description: str) -> Schema:
    return {"type": "number", "minimum": 0, "maximum": 1, "description": description}


def _of_orders(description: str) -> Schema:
    kinds = [{"type": "number", "minimum": 0, "maximum": 1}, {"type": "null"}]
    return {"oneOf": kinds, "description": f"{description} Null where nobody logs the scenario's orders."}


_FEATURES: Schema = {
    "type": "object",
    "description": "Raw values by feature, as in the logs: categories are strings, integers or booleans, numbers are "
    "not scaled; a missing one is a null.",
}
_CANDIDATE = _object(
    {
        "id": _text("Raw item_id."),
        "features": _FEATURES | {"description": "Of the item, in place of all that the lake has. Raw values by name."},
    },
    needed=("id",),
    additionalProperties=False,
)
_WEIGHTS = _object({name: {"type": "number"} for name in ("ctr", "ctcvr")}, additionalProperties=False)
RANK_REQUEST = _object(
    {
        "request_id": _text("Comes back in the answer."),
        "scenario": _text("One of the model's scenarios."),
        "user_id": _text("Raw; an integer is taken too. A user whom the lake does not know has no history."),
        "query": _text("Raw; in scenarios with queries only."),
        "context": _FEATURES | {"description": "Context features of the request. Raw values by name."},
        "time": _text(
            "When the request is made: ISO 8601 with a zone, now by default; not before the version's `as_of`. The "
            "history has what happened strictly before it.",
            format="date-time",
        ),
        "candidates": _list(
            {"oneOf": [{"type": "string"}, _CANDIDATE]}, "1 to 2,000 items: ids, or ids with features."
        ),
        "task": {
            "oneOf": [{"type": "string", "enum": ["ctr", "ctcvr"]}, _WEIGHTS],
            "description": "What is ranked by: p_ctr (the default), p_ctcvr, or the sum of both with these weights. "
            "p_ctcvr is refused where nobody logs the scenario's orders.",
        },
        "k": {"type": "integer", "minimum": 1, "description": "Most items in the answer; all by default."},
    },
    needed=("scenario", "user_id", "candidates"),
    additionalProperties=False,
)
ITEM = _object(
    {
        "id": _text("Of the candidate."),
        "p_ctr": _probability("That the user clicks it in this scenario."),
        "p_ctcvr": _of_orders("That the user clicks it here and then orders it."),
        "p_ctr_global": _probability("That the user clicks it in any scenario; of models with GLMT only."),
        "p_ctcvr_global": _of_orders("That the user clicks and orders it in any scenario; of models with GLMT only."),
    }
)
RANK_ANSWER = _object(
    {
        "request_id": _text("Of the request, or null."),
        "model_id": _text("16 hex digits that name the checkpoint."),
        "version": _text("Of the registry, which has answered."),
        "bucket": _text("stable or canary, for the log of impressions and jobs/online_report.py."),
        "items": _list(ITEM, "In the order of the candidates (/v1/score) or the best first (/v1/rank)."),
        "unknown": _object(
            {
                "user": {"type": "boolean", "description": "The lake does not know the user; false where degraded."},
                "candidates": _list({"type": "string"}, "Items that are in no impression of the lake."),
            },
            description="What of the request the lake has not seen.",
        ),
        "degraded": {
            "type": "boolean",
            "description": "The user could not be read in time: the answer is without history and user features.",
        },
    }
)
_SIGNALS = {"type": "object", "description": "Signal to what it adds to p_ctr; see docs/serving.md, the page."}
EXPLAIN_ANSWER = _object(
    RANK_ANSWER["properties"]
    | {
        "items": _list(_object(ITEM["properties"] | {"signals": _SIGNALS}), "In the order of the candidates."),
        "time": _text("Of the request.", format="date-time"),
        "history": _list(
            _object(
                {
                    "scenario": _text("Where it happened."),
                    "action": _text("click or order."),
                    "item": _text("Raw item_id, or null where the model does not know it."),
                    "query": _text("Raw query of its impression, or null."),
                    "age_s": {"type": "number", "description": "Seconds before the request."},
                }
            ),
            "The events that the model saw, the newest first.",
        ),
    }
)
_ROW = {
    "user_id": _text("Raw."),
    "item_id": _text("Raw."),
    "event_time": _text("ISO 8601 with a zone.", format="date-time"),
    "ingest_time": _text("When it was known; event_time by default.", format="date-time"),
}
_KINDS = {
    "impressions": _object(
        {"impression_id": _text("Unique."), **_ROW, "query": _text("Raw.")},
        needed=("impression_id", "user_id", "item_id", "event_time"),
    ),
    "clicks": _object(
        {
            "click_id": _text("Unique in its scenario."),
            **_ROW,
            "impression_id": _text("Of what was clicked, if known."),
        },
        needed=("click_id", "user_id", "item_id", "event_time"),
        additionalProperties=False,
    ),
    "orders": _object(
        {"order_id": _text("Unique with item_id."), **_ROW},
        needed=("order_id", "user_id", "item_id", "event_time"),
        additionalProperties=False,
    ),
}
EVENTS_ANSWER = _object(
    {
        "accepted": {"type": "integer", "description": "Rows that are new; they are on the disk."},
        "known_before": {"type": "integer", "description": "Rows that were posted before."},
    }
)
ERROR = _object({"error": _text("One line: the field, what was found, what is needed.")})


def events_request(scenarios: tuple[str, ...]) -> Schema:
    """The body of POST /v1/events: rows by the log's name."""
    logs = {
        f"{scenario}_{kind}": _list(row, f"{kind.capitalize()} of {scenario}.")
        for scenario in scenarios
        for kind, row in _KINDS.items()
    }
    shop = _list(_KINDS["orders"], "Orders of the shop's common log.")
    return _object(logs | {"orders": shop}, additionalProperties=False)


def described(request: Schema, answer: Schema) -> dict[str, Any]:
    """What FastAPI takes (`openapi_extra`) of a POST."""

    def of(schema: Schema) -> dict[str, Any]:
        return {"content": {"application/json": {"schema": schema}}}

    refusals = {
        "401": "The token is missing or another one.",
        "422": "The request is bad.",
        "429": "Too many requests are in progress, or it has waited too long; see Retry-After.",
    }
    responses = {status: {"description": what, **of(ERROR)} for status, what in refusals.items()}
    ok = {"200": {"description": "The answer.", **of(answer)}}
    return {"requestBody": {"required": True, **of(request)}, "responses": ok | responses}


def page(document: Mapping[str, Any]) -> str:
    """/openapi.json as one HTML page: a table of fields for each path's request and answer."""
    parts = []
    for path, methods in document["paths"].items():
        for method, entry in methods.items():
            what = html.escape(entry.get("description") or entry.get("summary", ""))
            parts.append(f"<h2>{method.upper()} {html.escape(path)}</h2><p>{what}</p>")
            bodies = [("Request", entry.get("requestBody", {}))]
            bodies += [(f"{status}: {r['description']}", r) for status, r in entry["responses"].items()]
            for name, body in bodies:
                schema = body.get("content", {}).get("application/json", {}).get("schema", {})
                if rows := "".join(_rows(schema, "")):
                    parts.append(f"<h3>{html.escape(name)}</h3><table>{rows}</table>")
    style = (
        ":root{color-scheme:light dark}"
        "body{font:15px/1.5 system-ui,sans-serif;max-width:1000px;margin:0 auto;padding:24px}"
        "table{border-collapse:collapse;width:100%}"
        "td{padding:4px 10px;border-bottom:1px solid #8884;vertical-align:top}"
        "td:first-child{font-family:ui-monospace,monospace;white-space:nowrap}td:nth-child(2){white-space:nowrap}"
    )
    title = html.escape(f"{document['info']['title']} {document['info']['version']}")
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>{style}</style>'
        f"<h1>{title}</h1><p>The same for programs: /openapi.json.</p>{''.join(parts)}</html>"
    )


def _rows(schema: Schema, place: str) -> Iterator[str]:
    for name, field in schema.get("properties", {}).items():
        kind = field.get("type") or " or ".join(one["type"] for one in field["oneOf"])
        needed = ", needed" if name in schema.get("required", ()) else ""
        cells = (place + name, kind + needed, field.get("description", ""))
        yield "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells) + "</tr>"
        yield from _rows(field, f"{place}{name}.")
        inner = field.get("items", {})
        for one in (inner, *inner.get("oneOf", ())):
            yield from _rows(one, f"{place}{name}[].")
