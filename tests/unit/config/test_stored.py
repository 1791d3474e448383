"""Shapes of stored JSON: the first place that does not fit, in words, and the one line that names the file."""

from __future__ import annotations

from pathlib import Path

import pytest

from usr_ray.config import ConfigError, UserError
from usr_ray.config.stored import DATES, NUMBER, REPORT, TIME, misfit, one_of, parse_json, read_json

pytestmark = pytest.mark.unit

SHAPE = {
    "name": str,
    "rate?": NUMBER,
    "when?": TIME,
    "kind?": one_of("step", "best"),
    "dates?": DATES,
    "files?": [{"bytes": int}],
    "cells?": {"all": dict, "*": {"auc": NUMBER}},
    "free?": object,
    "last?": ({"step": int}, None),
}


@pytest.mark.parametrize(
    "value",
    [
        {"name": ""},
        {"name": "a", "unknown": [1], "rate": 1, "free": None, "last": None},
        {"name": "a", "rate": None, "when": "2026-01-08T12:00:00+00:00", "kind": "best", "last": {"step": 3}},
        {"name": "a", "rate": 0.5, "dates": "2026-01-01:2026-01-02, 2026-01-05", "files": [], "free": {"x": 1}},
        {"name": "a", "files": [{"bytes": 1}, {"bytes": 2, "sha256": "x"}], "cells": {"all": {}, "s": {"auc": None}}},
    ],
)
def test_what_fits(value: object) -> None:
    assert misfit(value, SHAPE) == ""


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ([], "it is a list, needed an object"),
        (None, "it is null, needed an object"),
        ({}, "name is missing"),
        ({"name": 5}, "name is 5, needed a text"),
        ({"name": "a", "rate": "0.5"}, 'rate is "0.5", needed a number'),
        ({"name": "a", "rate": True}, "rate is true, needed a number"),  # in Python a kind of integer
        ({"name": "a", "when": "today"}, 'when is "today", needed a time such as 2026-01-08T12:00:00+00:00'),
        ({"name": "a", "kind": "worst"}, 'kind is "worst", needed one of step, best'),
        ({"name": "a", "dates": "2026-01-01:2026-01"}, 'dates is "2026-01-01:2026-01", needed dates such as'),
        ({"name": "a", "files": {}}, "files is an object, needed a list"),
        ({"name": "a", "files": [{"bytes": 1}, {"bytes": 1.5}]}, "files[1].bytes is 1.5, needed a whole number"),
        ({"name": "a", "cells": {"s": {"auc": 0.5}}}, "cells.all is missing"),
        ({"name": "a", "cells": {"all": {}, "s": {}}}, "cells.s.auc is missing"),
        ({"name": "a", "last": {"step": None}}, "last.step is null, needed a whole number"),
        ({"name": "a", "last": []}, "last is a list, needed an object"),
        ({"name": "a", "when": 61 * "x"}, f'when is "{59 * "x"}..., needed a time'),
    ],
)
def test_the_first_place_that_does_not_fit_is_named(value: object, problem: str) -> None:
    assert misfit(value, SHAPE).startswith(problem)


def test_a_file_that_cannot_be_used_is_one_line_with_its_way_out(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    for content, line in (
        (None, "cannot be read (No such file or directory); "),
        (b"", "is not readable JSON (Expecting value: "),
        (b'{"name": "a"', "is not readable JSON (Expecting ',' delimiter: "),
        (b"\xff\xfe{", "is not readable JSON ("),
        (b"[" * 100_000, "is not readable JSON ("),
        (b'{"name": 1}', "is damaged (name is 1, needed a text); "),
    ):
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(ConfigError) as raised:
            read_json(path, SHAPE, way_out="remove it", error=ConfigError)
        assert str(raised.value).startswith(f"{path}: {line}")
        assert str(raised.value).endswith("; remove it")
    assert parse_json('{"name": "a"}', SHAPE, where="x") == {"name": "a"}


def test_a_report_without_its_rows_is_refused() -> None:
    with pytest.raises(UserError, match=r"^r.json: is damaged \(rows is missing\); "):
        parse_json('{"date": "2026-01-07"}', REPORT, where="r.json")
