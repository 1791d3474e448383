"""Table, plot and plan of benchmarks/build_samples.py from its JSON, into docs/scale.md. Not a benchmark itself."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from build_samples_data import BOT_IMPRESSIONS

from benchmarks.doc_tables import markdown
from usr_ray.files import write_whole

PAGE, PLOT = "scale.md", "images/build_samples.png"
BEGIN, END = (
    "<!-- written by benchmarks/build_samples.py -->",
    "<!-- end of what benchmarks/build_samples.py writes -->",
)
NAMES = {"ours": "our job", "spark_sql": "plain Spark SQL", "duckdb": "DuckDB"}
COLOURS = {"ours": "#2a78d6", "spark_sql": "#eb6834", "duckdb": "#1baf7a"}
PAPER_IMPRESSIONS = 10_000_000_000
CORES_AN_EXECUTOR, FILE_BYTES, PARTITION_BYTES = 4, 256 << 20, 128 << 20
"""Of the plan: executors of four cores, files of 256 MB, shuffle partitions of 128 MB."""

SMALL = 200_000
"""Impressions of the smallest size, which is built as `usr-ray` builds it."""
AIMS = {
    ("duckdb", 1_000_000): 3.0,
    ("duckdb", 10_000_000): 1.0,
    ("spark_sql", 1_000_000): 0.33,
    ("spark_sql", 3_000_000): 0.33,
}
"""(rival, impressions) -> the most that our wall time is to be of its."""

Row = dict[str, Any]
Cell = tuple[str, int, bool]


def medians(runs: list[Row]) -> dict[Cell, Row]:
    """(system, impressions, bot) -> the run of the median wall time, and how many there were."""
    cells: dict[Cell, list[Row]] = {}
    for run in runs:
        cells.setdefault((run["system"], run["impressions"], run["bot"]), []).append(run)
    result = {}
    for cell, found in sorted(cells.items(), key=lambda pair: (pair[0][1], pair[0][2], list(NAMES).index(pair[0][0]))):
        middle = statistics.median_low(run["wall_s"] for run in found)
        chosen = next(run for run in found if run["wall_s"] == middle)
        result[cell] = chosen | {"runs": len(found), "cpu_s": statistics.median(run["cpu_s"] for run in found)}
    return result


def table(cells: dict[Cell, Row]) -> list[str]:
    """One line a system and size."""
    lines = [
        "| impressions | system | runs | wall s | processor s | rows/s | peak memory GB | shuffled MB | B shuffled an "
        "impression | spilled MB | output MB |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for (system, size, bot), row in cells.items():
        spark = row.get("spark")
        shuffled = (
            "| | |"
            if spark is None
            else (
                f"{spark['shuffle_write_bytes'] / 1e6:,.0f} | {spark['shuffle_write_bytes'] / size:,.0f} | "
                f"{spark['spilled_disk_bytes'] / 1e6:,.0f} |"
            )
        )
        lines.append(
            f"| {size / 1e6:g} M{' + bot' if bot else ''} | {NAMES[system]} | {row['runs']} | {row['wall_s']:.0f} | "
            f"{row['cpu_s']:.0f} | {num_rows(size, bot) / row['wall_s']:,.0f} | {row['peak_bytes'] / 1e9:.2f} | "
            f"{shuffled} {row['output_bytes'] / 1e6:,.0f} |"
        )
    return lines


def counters_table(result: Mapping[str, Any]) -> str:
    """One line a run of --counters; how much more processor time than the same system and size without."""
    base = {(r["system"], r["impressions"]): r["cpu_s"] for r in result["runs"] if not r["counters"]}
    lines = []
    for run in result["runs"]:
        kind = (
            "half of all impressions of one item"
            if run["hot"]
            else f"{run['counters']} columns"
            if run["counters"]
            else "none"
        )
        ratio = f"{run['cpu_s'] / base[run['system'], run['impressions']]:.2f}" if run["counters"] else ""
        cells = [f"{run['cpu_s']:.0f}", ratio, f"{run['wall_s']:.0f}", f"{run['peak_bytes'] / 1e9:.2f}"]
        lines.append([f"{run['impressions'] / 1e6:g} M", NAMES[run["system"]], kind, *cells])
    head = ["processor s", "of those without", "wall s", "peak memory GB"]
    return markdown(["impressions", "system", "counters", *head], lines)


def num_rows(size: int, bot: bool) -> int:
    """Samples of a size, the bot's included."""
    return size + (BOT_IMPRESSIONS if bot else 0)


def growth(cells: dict[Cell, Row]) -> list[str]:
    """Wall time and memory from size to size, our job."""
    lines = []
    for bot in (False, True):
        ours = {size: row for (system, size, with_bot), row in cells.items() if system == "ours" and with_bot == bot}
        for small, large in itertools.pairwise(sorted(ours)):
            a, b, rows = ours[small], ours[large], num_rows(large, bot) / num_rows(small, bot)
            lines.append(
                f"- {small / 1e6:g} M to {large / 1e6:g} M{', both with the bot' if bot else ''}: wall time "
                f"{b['wall_s'] / a['wall_s']:.2f}x for {rows:.2f}x the rows ({b['wall_s'] / a['wall_s'] / rows:.2f}x "
                f"linear), peak memory {b['peak_bytes'] / a['peak_bytes']:.2f}x."
            )
    return lines


def goals(cells: dict[Cell, Row]) -> list[str]:
    """Our job against its aims, then against each rival at every size."""
    lines = []

    def judged(what: str, value: float, aim: float, unit: str) -> None:
        verdict = "met" if value <= aim else "missed"
        lines.append(f"- {what}: {value:.{0 if unit == ' s' else 2}f}{unit} (aim: at most {aim:g}{unit}): {verdict}.")

    small = cells.get(("ours", SMALL, False))
    if small is not None:
        judged(f"{SMALL:,} impressions, as `usr-ray build-samples` builds them", small["wall_s"], 15, " s")
    line = fit(cells, "ours", "wall_s")
    if line is not None:
        judged("what a build costs without rows, by the fitted line", line[0], 15, " s")
    for rival in ("duckdb", "spark_sql"):
        for (system, size, bot), row in cells.items():
            ours = cells.get(("ours", size, bot))
            if system != rival or ours is None:
                continue
            wall, cpu = ours["wall_s"] / row["wall_s"], ours["cpu_s"] / row["cpu_s"]
            what = f"{size / 1e6:g} M{' + bot' if bot else ''}, against {NAMES[rival]} (processor time {cpu:.2f}x)"
            aim = AIMS.get((rival, size))
            if aim is None:
                lines.append(f"- {what}: {wall:.2f}x.")
            else:
                judged(what, wall, aim, "x")
    return lines


def fit(cells: dict[Cell, Row], system: str, value: str) -> tuple[float, float] | None:
    """Intercept and slope per million impressions of a system's wall or processor seconds; None below two sizes.

    Without the smallest size, which is built by another JVM's settings.
    """
    points = [
        (size / 1e6, row[value])
        for (name, size, bot), row in cells.items()
        if name == system and not bot and size > SMALL
    ]
    if len(points) < 2:
        return None
    millions, values = np.array(points).T
    slope, start = np.polyfit(millions, values, deg=1)
    return float(start), float(slope)


def plan(cells: dict[Cell, Row]) -> list[str]:
    """Ten billion impressions a day from our job's largest measured size: arithmetic on measured rates."""
    sizes = [size for system, size, bot in cells if system == "ours" and not bot]
    if not sizes:
        return []
    size = max(sizes)
    row = cells["ours", size, False]
    slope = (fit(cells, "ours", "cpu_s") or (0.0, row["cpu_s"] / size * 1e6))[1]
    scale = PAPER_IMPRESSIONS / size
    shuffled, output = row["spark"]["shuffle_write_bytes"] * scale, row["output_bytes"] * scale
    core_hours = slope * PAPER_IMPRESSIONS / 1e6 / 3600
    lines = [
        "| 10 billion impressions a day | value | how |",
        "|---|---|---|",
        f"| processor time | {core_hours:,.0f} core-hours | {slope:.1f} s a million, fitted up to {size / 1e6:g} M |",
        f"| shuffled | {shuffled / 1e12:.2f} TB | {shuffled / PAPER_IMPRESSIONS:.0f} B an impression |",
        f"| samples written | {output / 1e12:.2f} TB | {output / PAPER_IMPRESSIONS:.0f} B an impression |",
        f"| files of the date | {output / FILE_BYTES:,.0f} of 256 MB | 128 to 512 MB read well |",
        f"| shuffle partitions | {shuffled / PARTITION_BYTES:,.0f} of 128 MB | at least three a core |",
    ]
    for hours in (1, 2, 4):
        executors = -(-core_hours / hours / 0.7 // CORES_AN_EXECUTOR)
        lines.append(
            f"| done in {hours} h | {executors:,.0f} executors of {CORES_AN_EXECUTOR} cores | core-hours / hours / "
            f"{CORES_AN_EXECUTOR} / 0.7 (30 % kept for stragglers and lost machines) |"
        )
    return lines


def crossing(cells: dict[Cell, Row]) -> list[str]:
    """What one machine of two cores can do in a time, from the fitted lines."""
    lines = []
    for system, name in NAMES.items():
        line = fit(cells, system, "wall_s")
        if line is None:
            continue
        start, slope = line
        reach = "; ".join(f"{(hours * 3600 - start) / slope:,.0f} M in {hours} h" for hours in (1, 8))
        lines.append(f"- {name}: {start:.0f} s + {slope:.1f} s a million impressions; so {reach} on two cores.")
    return lines


def stages(cells: dict[Cell, Row]) -> list[str]:
    """What our job printed at the largest size: seconds since it started."""
    sizes = [size for system, size, bot in cells if system == "ours" and not bot]
    lines = cells["ours", max(sizes), False]["progress"] if sizes else []
    return ["```", *lines, "```"] if lines else []


def draw(cells: dict[Cell, Row], path: Path) -> None:
    """Wall time and peak memory over the impressions, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for system, name in NAMES.items():
        for bot in (False, True):
            rows = sorted((size, row) for (s, size, b), row in cells.items() if s == system and b == bot)
            if not rows:
                continue
            style: Mapping[str, Any] = {
                "color": COLOURS[system],
                "marker": "s" if bot else "o",
                "linestyle": "--" if bot else "-",
            }
            label = f"{name}{', with one user of 1 M events' if bot else ''}"
            millions = [size / 1e6 for size, _ in rows]
            left.plot(millions, [row["wall_s"] for _, row in rows], label=label, **style)
            right.plot(millions, [row["peak_bytes"] / 1e9 for _, row in rows], **style)
    left.set(xscale="log", yscale="log", title="wall time", xlabel="million impressions", ylabel="seconds, two cores")
    right.set(xscale="log", title="peak memory of all processes", xlabel="million impressions", ylabel="GB")
    right.set_ylim(bottom=0)
    ticks = sorted({size / 1e6 for _, size, _ in cells})
    for axes in (left, right):
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    left.legend(frameon=False, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def write_report(result: dict[str, Any], docs: Path) -> None:
    """Put the numbers of a result between the marks of docs/scale.md, and the plot beside it."""
    cells = medians(result["runs"])
    settings, versions = result["settings"], ", ".join(f"{k} {v}" for k, v in result["versions"].items())
    lines = [
        f"{result['date']}, {settings['cores']} cores ({result['machine']['processor']}), Spark's driver and DuckDB "
        f"with {settings['spark_driver_memory']} each; {versions}.",
        "",
        *table(cells),
        "",
        f"![Wall time and peak memory]({PLOT})",
    ]
    for title, part in (
        ("Against the aims", goals(cells)),
        ("How our job grows (aims: at most 1.1x linear, flat memory from 3 M to 10 M)", growth(cells)),
        ("Fitted lines", crossing(cells)),
        ("Arithmetic of the plan", plan(cells)),
        ("What our job printed at the largest size (seconds since its start)", stages(cells)),
    ):
        if part:
            lines += ["", f"### {title}", "", *part]
    draw(cells, docs / PLOT)
    page = docs / PAGE
    before, begin, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"{page}: the marks for the numbers are missing: {BEGIN} ... {END}")
    write_whole(page, before + BEGIN + "\n" + "\n".join(lines) + "\n" + END + after)
    print("\n".join(lines))
