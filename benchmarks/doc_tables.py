"""Tables in docs/ that are made from the numbers of benchmarks/results: replaced whole, between two comment lines."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from usr_ray.evaluation.statistics import Judged

DOCS = Path(__file__).resolve().parent.parent / "docs"


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; all columns but the first to the right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def gap_text(gap: float, low: float, high: float) -> str:
    """A gap of AUC and its interval."""
    return f"{gap:+.4f} ({low:+.4f} to {high:+.4f})"


def judged_entry(one: Judged) -> dict[str, Any]:
    """A gap that there is, its interval, and whether it holds after its family's correction, as the JSON has them."""
    assert one.gap is not None
    numbers = {"gap": one.gap.value, "low": one.gap.low, "high": one.gap.high}
    return {name: round(value, 5) for name, value in numbers.items()} | {"holds": one.verdict in ("better", "worse")}


def judged_text(entry: Mapping[str, Any] | None) -> str:
    """A `judged_entry` in a table; empty of none."""
    if entry is None:
        return ""
    return gap_text(entry["gap"], entry["low"], entry["high"]) + (", holds" if entry["holds"] else "")


def put_table(document: str, name: str, text: str) -> None:
    """Write `text` between the lines `<!-- NAME -->` and `<!-- /NAME -->` of docs/DOCUMENT."""
    path = DOCS / document
    before = path.read_text(encoding="utf-8")
    pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
    if not pattern.search(before):
        raise SystemExit(f"{path} has no place for a table: write the lines <!-- {name} --> and <!-- /{name} -->")
    path.write_text(pattern.sub(lambda m: m[1] + text + "\n" + m[2], before), encoding="utf-8")


def show(text: str, output: Path, *, document: str, place: Path) -> None:
    """Print the table of a report; only that of a report in its own place goes into the document."""
    print(text)
    if output == place:
        put_table(document, place.stem, text)


def record(report: Mapping[str, Any], text: str, output: Path, *, document: str, place: Path) -> None:
    """Write the report as JSON and `show` its table."""
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(report, indent=2) + "\n")
    show(text, output, document=document, place=place)
