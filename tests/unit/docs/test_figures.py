"""Figures in the documents are those of benchmarks/results: whole tables, and the numbers that sentences quote.

A sentence is given as it stands in the document, with `{}` for each number; what the numbers must be is computed from
the JSON. A number agrees when it is the computed one, rounded to the digits it is printed with.
"""

from __future__ import annotations

import functools
import json
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from benchmarks import (
    data_stall,
    embedding_wire,
    launchers,
    peers,
    reader,
    resume,
    serving,
    serving_load,
    table_size,
    usr_cost,
)

sys.path.append(str(Path(__file__).resolve().parents[3] / "benchmarks"))

import anchors
import build_samples_report
import learning_signals
import signal_cost
import study_joint
import study_parts
import study_worlds

pytestmark = pytest.mark.unit

ROOT = Path(__file__).resolve().parents[3]
RESULTS = ROOT / "benchmarks" / "results"
TABLES = {
    "speed": (usr_cost, reader, data_stall, launchers, peers, resume, signal_cost),
    "embeddings": (table_size, embedding_wire),
    "serving": (serving, serving_load),
    "learning": (anchors,),
    "study-results": (study_joint, study_parts, study_worlds),
}
"""Page -> the benchmarks whose tables it holds between the lines `<!-- NAME -->` and `<!-- /NAME -->`."""


NAMES = {"shared_bottom": "SharedBottom", "mmoe": "MMoE", "ple": "PLE", "star": "STAR", "m2m": "M2M", "apg": "APG"}


class Figure(NamedTuple):
    """A sentence of a page and what its numbers must be."""

    page: str
    text: str
    numbers: Callable[[], Sequence[float]]


@functools.cache
def result(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def in_process(num_candidates: int, way: str) -> float:
    """Median in milliseconds of benchmarks/serving.py."""
    return float(result("serving")["results"]["in_process"][str(num_candidates)][way]["p50_ms"])


def page(name: str) -> str:
    """The text of a page on one line."""
    path = ROOT / ("README.md" if name == "README" else f"docs/{name}.md")
    return " ".join(path.read_text(encoding="utf-8").split())


def quoted(text: str, name: str) -> list[str]:
    """The numbers that the sentence has on the page; it must be there, as often as it may, with the same numbers."""
    number = r"([+-]?\d[\d,]*(?:\.\d+)?)"
    found = set(re.findall(number.join(map(re.escape, text.split("{}"))), page(name)))
    assert found, f"{name} does not say: {text}"
    assert len(found) == 1, f"{name} says with different numbers: {text}"
    (numbers,) = found
    return [numbers] if isinstance(numbers, str) else list(numbers)


def agrees(printed: str, value: float) -> bool:
    digits = len(printed.partition(".")[2])
    return abs(float(printed.replace(",", "")) - value) <= 0.5 * 10**-digits + 1e-9


def builds() -> Any:
    """Medians of the runs of build_samples: (system, impressions, with the bot) -> row."""
    return build_samples_report.medians(result("build_samples")["runs"])


def seconds(system: str, millions: int, *, bot: bool = False, value: str = "wall_s") -> float:
    return float(builds()[system, millions * 10**6, bot][value])


def executors(hours: int) -> float:
    (found,) = re.findall(rf"done in {hours} h \| ([\d,]+) executors", "\n".join(build_samples_report.plan(builds())))
    return float(found.replace(",", ""))


def scores(model: str) -> list[float]:
    return [result("score")["results"][backbone][model]["latency_ratio"] for backbone in ("shared_bottom", "ple")]


def simulated(key: str, task: str, *, models: Sequence[str] = tuple(NAMES)) -> list[float]:
    """Gaps of the default world."""
    found = result("learning_simulated")["worlds"]["default"]["models"]
    return [found[f"{model} + USR"][key][task]["all"]["gap"] for model in models]


def over_plain(world: str, model: str) -> list[float]:
    """USR's gap in clicks in one of the simulated worlds."""
    return gap(result("learning_simulated")["worlds"][world]["models"][model]["over_plain"]["ctr"]["all"])


def click_auc(model: str) -> float:
    return float(result("learning_simulated")["worlds"]["default"]["models"][model]["auc"]["ctr"]["all"])


def step_ms(case: str, backbone: str, part: str) -> float:
    (row,) = (r for r in result("usr_cost")["results"] if (r["case"], r["backbone"]) == (case, backbone))
    return float(row["parts"][part]["cpu_ms"]["median"])


def in_world(study: str, world: str, cell: str = "all/ctr") -> list[float]:
    """USR over plain in a world of a study, and its interval."""
    (row,) = (r for r in result("study_worlds")["rows"] if (r["study"], r["world"]) == (study, world))
    found = row["cells"][cell]
    return [found["gap"], found["low"], found["high"]]


def anchored(world: str, *models: str) -> list[float]:
    """Held-out AUC, pooled: click and order of each model."""
    found = result("anchors")["worlds"][world]["models"]
    return [found[model]["auc"][task]["all"] for model in models for task in ("ctr", "ctcvr")]


def best_peer(world: str) -> list[float]:
    """Held-out AUC, click and order: of torch-rechub's five models the best in each."""
    models = result("anchors")["worlds"][world]["models"]
    peers = [models[f"torch-rechub, {name}"]["auc"] for name in ("SharedBottom", "MMoE", "PLE", "DCNv2", "DeepFM")]
    return [max(auc[task]["all"] for auc in peers) for task in ("ctr", "ctcvr")]


def part(study: str, gap_of: str, cell: str) -> list[float]:
    """A gap of the studies of the parts and its interval."""
    (row,) = (r for r in result("study_parts")["rows"] if (r["study"], r["gap_of"]) == (study, gap_of))
    found = row["cells"][cell]
    return [found["gap"], found["low"], found["high"]]


def over_trees(ours: str, task: str) -> list[float]:
    """Lead over LightGBM with the ETL's own counts, and its interval."""
    found = result("anchors")["worlds"]["kuairand, all earlier, counters of all days"]["models"]["LightGBM"]
    return gap(found[f"ours, {ours} over it"][task]["all"])


def joined(
    weights: str,
    scenario: str,
    pair: str,
    *,
    task: str = "ctr",
    backbone: str = "shared_bottom",
    carry: str = "every",
) -> list[float]:
    """A gap of the study joint, mean over its worlds, and its interval."""
    key = {"carry": carry, "backbone": backbone, "weights": weights, "scenario": scenario, "task": task}
    (row,) = (r for r in result("study_joint")["rows"] if key.items() <= r.items())
    found = row["gaps"][pair]
    return [found["gap"], found["low"], found["high"]]


def with_terms(task: str, scenario: str = "all") -> list[float]:
    """USR over plain, both with terms, in the world with needs."""
    return gap(
        result("anchors")["worlds"]["needs"]["models"]["ours, USR, with terms"]["over plain with terms"][task][scenario]
    )


def plain_over_usr(task: str) -> list[float]:
    """Plain minus USR in the static world."""
    return gap(result("anchors")["worlds"]["static"]["models"]["ours, USR"]["ours, plain over it"][task]["all"])


def turned(found: Sequence[float]) -> list[float]:
    """A gap whose interval's ends change places when its sign does."""
    value, low, high = found
    return [value, high, low]


def over_lightgbm(task: str) -> list[float]:
    """Gaps of our plain and USR models without terms over LightGBM in the world with needs."""
    found = result("anchors")["worlds"]["needs"]["models"]["LightGBM"]
    return [found[f"ours, {name} over it"][task]["all"]["gap"] for name in ("plain", "USR")]


def reader_seconds(way: str) -> float:
    return float(result("reader")["results"]["ways"][way]["cpu_seconds_per_million_rows"])


def wire_mb(strategy: str, workers: int, ids: int, dim: int) -> float:
    return embedding_wire.formula(strategy, ids, dim, workers) / 1e6


def kuairand(suffix: str, model: str, *path: str) -> Any:
    found = result(f"learning_kuairand{suffix}")["models"][model]
    return functools.reduce(lambda value, key: value[key], path, found)


def gaps(suffix: str, key: str, task: str, *, without: Sequence[str] = (), low: bool = False) -> list[float]:
    """Gaps of our models on all rows pooled, or the lower ends of their intervals."""
    models = result(f"learning_kuairand{suffix}")["models"]
    found = [m[key][task]["all"] for n, m in models.items() if n.startswith("ours") and n not in without and key in m]
    return [float(g["interval"][0] if low else g["gap"]) for g in found]


def ends(values: Sequence[float]) -> list[float]:
    return [min(values), max(values)]


def gap(found: Any) -> list[float]:
    """A gap and its interval."""
    return [found["gap"], *found["interval"]]


def signal(world: str, line: str, *tasks: str) -> list[float]:
    """What a kind of signal adds on the held-out days."""
    return [signal_gap(world, line, task)[0] for task in tasks]


def signal_gap(world: str, line: str, task: str = "ctr") -> list[float]:
    """The same with its interval."""
    return gap(result("learning_signals")["worlds"][world]["models"][line]["over_none"][task]["all"])


def learning_rows() -> Iterator[Figure]:
    """Rows of the table of six backbones on KuaiRand."""
    for key, name in NAMES.items():

        def row(key: str = key) -> list[float]:
            plain, usr = (kuairand("", f"ours, {key}{suffix}") for suffix in ("", " + USR"))
            numbers = [model["auc"][task]["all"] for model in (plain, usr) for task in ("ctr", "ctcvr")]
            return numbers + gap(usr["over_plain"]["ctr"]["all"]) + gap(usr["over_plain"]["ctcvr"]["all"])

        yield Figure("learning", f"| {name} | " + "{} / {} | " * 2 + "{} ({} to {}) | {} ({} to {}) |", row)


SIDES = ("search", "recommendation")
PLAIN_STAR = ("ours, star",)
FIGURES = [
    Figure(
        "README",
        "(simulated; terms for ours alone) | **{} / {}** | {} / {} | {} / {} | {} / {} | {} / {} |",
        lambda: [
            *anchored("needs", "ours, USR, with terms", "ours, plain, with terms", "logistic regression", "LightGBM"),
            *best_peer("needs"),
        ],
    ),
    Figure("README", "Without terms our plain model has {} / {} there", lambda: anchored("needs", "ours, plain")),
    Figure(
        "README",
        "fixed tastes (simulated) | **{}** / {} | {} / **{}** | {} / {} | {} / {} | {} / {} |",
        lambda: [
            *anchored("static", "ours, USR", "ours, plain", "logistic regression", "LightGBM"),
            *best_peer("static"),
        ],
    ),
    Figure(
        "README",
        "tabs as four scenarios | **{} / {}** | {} / {} | {} / {} | {} / {} | {} / {} |",
        lambda: [
            *anchored("kuairand", "ours, USR", "ours, plain", "logistic regression", "LightGBM"),
            *best_peer("kuairand"),
        ],
    ),
    Figure(
        "README",
        "{} s against {} s at 1 million impressions, {} against {} at 3 million, {} against {} at 10 million",
        lambda: [seconds(system, n) for n in (1, 3, 10) for system in ("duckdb", "ours")],
    ),
    Figure(
        "scale",
        "{}x plain Spark SQL at 3 million, {}x DuckDB's time at 10 million",
        lambda: [seconds("spark_sql", 3) / seconds("ours", 3), seconds("ours", 10) / seconds("duckdb", 10)],
    ),
    Figure(
        "scale",
        "At 1 million the aims are missed ({}x and {}x)",
        lambda: [seconds("spark_sql", 1) / seconds("ours", 1), seconds("ours", 1) / seconds("duckdb", 1)],
    ),
    Figure(
        "scale",
        "({} GB at 3 million, {} at 10:",
        lambda: [seconds("ours", n, value="peak_python_bytes") / 1e9 for n in (3, 10)],
    ),
    Figure(
        "scale",
        "The JVM grows to what it is given ({} and {} GB",
        lambda: [seconds("ours", n, value="peak_jvm_bytes") / 1e9 for n in (3, 10)],
    ),
    Figure(
        "scale",
        "with {} processor seconds per million, {} executors for one hour or {} for four",
        lambda: [build_samples_report.fit(builds(), "ours", "cpu_s")[1], executors(1), executors(4)],
    ),
    Figure(
        "serving",
        "a load of {} when this table's run was over",
        lambda: [result("serving")["machine"]["load_1_min"]],
    ),
    Figure(
        "serving",
        "the request-shaped program is {} times as fast as the same program on tiled rows, at one candidate {} times",
        lambda: [in_process(n, "model.onnx, tiled") / in_process(n, "request.onnx") for n in (500, 1)],
    ),
    Figure("serving", "Its median at 500 was {} ms", lambda: [in_process(500, "request.onnx")]),
    Figure(
        "serving",
        "the medians are {} to {} ms with one process of uvicorn, and {} to {} ms on Ray Serve",
        lambda: [
            number
            for way in ("HTTP", "Ray Serve")
            for number in ends([of["1"]["p50_ms"] for of in result("serving")["results"]["service"][way].values()])
        ],
    ),
    Figure(
        "serving",
        "ONNX is {} times as fast as the training model on a single row with SharedBottom and {} times with PLE",
        lambda: scores("exported, onnxruntime"),
    ),
    Figure("serving", "model.pt2 is {} and {} times as fast", lambda: scores("exported, torch")),
    Figure(
        "serving",
        "the two programs are {} to {} times as fast",
        lambda: ends(
            [
                ways[way]["throughput_ratio"]
                for ways in result("score")["results"].values()
                for way in ways
                if way != "training model"
            ]
        ),
    ),
    Figure(
        "speed",
        "Now CL(f) takes {} of {} ms in `large`",
        lambda: [
            step_ms("large", "shared_bottom", "USR") - step_ms("large", "shared_bottom", "all, without CL(f)"),
            step_ms("large", "shared_bottom", "USR"),
        ],
    ),
    Figure(
        "speed",
        "{} on top of {} for the decode to tensors",
        lambda: [
            reader_seconds("reader, shuffled") - reader_seconds("pyarrow decode to tensors"),
            reader_seconds("pyarrow decode to tensors"),
        ],
    ),
    Figure(
        "speed",
        "With four ranks and four shards a rank reads {} times as fast as a whole decode",
        lambda: [
            result("reader")["results"]["ways"]["reader, rank 0 of 4, 4 shards"]["ratio_to_pyarrow_decode_to_tensors"][
                "median"
            ]
        ],
    ),
    Figure(
        "embeddings",
        "the exchange of 250,000 ids of 32 values is {} MB per worker and step, against {} MB sharded",
        lambda: [wire_mb("replicated", 8, 250_000, 32), wire_mb("sharded", 8, 250_000, 32)],
    ),
    Figure(
        "learning",
        "All of ours except plain STAR are {} to {} above popularity in clicks (lower ends of the intervals from {})",
        lambda: [
            *ends(gaps("", "over_popularity", "ctr", without=PLAIN_STAR)),
            min(gaps("", "over_popularity", "ctr", without=PLAIN_STAR, low=True)),
        ],
    ),
    Figure(
        "learning",
        "Over the best peer they gain {} to {} in clicks (lower ends from {}) and {} to {} in long views",
        lambda: [
            *ends(gaps("", "over_best_peer", "ctr", without=PLAIN_STAR)),
            min(gaps("", "over_best_peer", "ctr", without=PLAIN_STAR, low=True)),
            *ends(gaps("", "over_best_peer", "ctcvr", without=PLAIN_STAR)),
        ],
    ),
    Figure(
        "learning",
        "In long views it gains {} to {} on SharedBottom, MMoE, PLE and APG",
        lambda: ends(gaps("", "over_plain", "ctcvr", without=("ours, star + USR", "ours, m2m + USR"))),
    ),
    Figure(
        "learning",
        "USR raises click AUC around SharedBottom, PLE, STAR and APG by {} to {}",
        lambda: ends(simulated("over_plain", "ctr", models=("shared_bottom", "ple", "star", "apg"))),
    ),
    Figure(
        "learning",
        "around MMoE by {} ({} to {}) and M2M by {} ({} to {})",
        lambda: [n for m in ("mmoe", "m2m") for n in over_plain("default", f"{m} + USR")],
    ),
    Figure(
        "learning",
        "{} ({} to {}) where the scenarios have the same tastes and {} ({} to {}) where cross exposures say nothing",
        lambda: [n for world in ("similarity-1", "noisy-global") for n in over_plain(world, "shared_bottom + USR")],
    ),
    Figure(
        "learning",
        "MMoE alone has {}, the best with USR {}",
        lambda: [click_auc("mmoe"), max(click_auc(f"{name} + USR") for name in NAMES)],
    ),
    Figure(
        "learning",
        "gain {} to {} over popularity (lower ends from {}) and {} to {} over the best peer (lower ends from {})",
        lambda: [
            n
            for key in ("over_popularity", "over_best_peer")
            for n in (
                *ends(gaps("_histories", key, "ctr", without=PLAIN_STAR)),
                min(gaps("_histories", key, "ctr", without=PLAIN_STAR, low=True)),
            )
        ],
    ),
    Figure(
        "learning",
        "gain {} in clicks and {} in long views on KuaiRand where the ETL sees",
        lambda: signal("kuairand, all earlier", "plain: counters of all days", "ctr", "ctcvr"),
    ),
    Figure(
        "learning",
        "gain {} (plain) to {} (USR) in clicks and {} to {} in orders, nearly all in search",
        lambda: [
            *signal("needs", "plain: sides, terms", "ctr"),
            *signal("needs", "USR: sides, terms", "ctr"),
            *signal("needs", "plain: sides, terms", "ctcvr"),
            *signal("needs", "USR: sides, terms", "ctcvr"),
        ],
    ),
    Figure(
        "learning",
        "log odds gain nothing sure on KuaiRand: {} in clicks ({} to {})",
        lambda: signal_gap("kuairand", "plain: log odds of counters"),
    ),
    Figure(
        "learning",
        "crosses lose {} ({} to {}) and buckets {}, which is not sure ({} to {})",
        lambda: [
            n
            for kind in ("crosses", "buckets")
            for value, *ends in [signal_gap("static", f"plain: {kind}")]
            for n in (-value, *ends)
        ],
    ),
    Figure(
        "learning",
        "it gains {} from all kinds ({} to {})",
        lambda: signal_gap("kuairand", "USR: all"),
    ),
    Figure(
        "learning",
        "USR over plain is {} in clicks ({} to {}) and {} in orders ({} to {})",
        lambda: [-n for task in ("ctr", "ctcvr") for n in turned(plain_over_usr(task))],
    ),
    Figure(
        "learning",
        "the nearest, DCNv2: {} ({} to {}) and {} ({} to {})",
        lambda: [
            n
            for task in ("ctr", "ctcvr")
            for n in gap(
                result("anchors")["worlds"]["kuairand"]["models"]["torch-rechub, DCNv2"]["ours, USR over it"][task][
                    "all"
                ]
            )
        ],
    ),
    Figure(
        "study-results",
        "changes by {} ({} to {}) in search and {} ({} to {}) in recommendation",
        lambda: [n for s in SIDES for n in part("ablation", "no_fg - usr", f"{s}/ctcvr")],
    ),
    Figure(
        "study-results",
        "without it orders lose {} in search and {} in recommendation",
        lambda: [-part("ablation", "no_fg - usr", f"{s}/ctcvr")[0] for s in SIDES],
    ),
    Figure(
        "study-results",
        "past events gain {} in search's clicks (+{} to +{}). Users that training has not seen lose",
        lambda: part("cold_start", "usr - plain, 21 or more past events", "search/ctr"),
    ),
    Figure(
        "study-results",
        "better clicks in recommendation ({}, {} to {}, before correction)",
        lambda: part("cold_start", "usr - plain, user new", "recommendation/ctr"),
    ),
    Figure(
        "study-results",
        "Without CL(f) alone recommendation's clicks lose 0.0046 ({} to {})",
        lambda: part("ablation", "no_cl_f - usr", "recommendation/ctr")[1:],
    ),
    Figure(
        "study-results",
        "SharedBottom gains {} (+{} to +{}) in search's clicks with variant A",
        lambda: part("glmt_only", "glmt_a - own, shared_bottom", "search/ctr"),
    ),
    Figure(
        "study-results",
        "{} ({} to +{}) where the scenarios' tastes have nothing in common, {} (+{} to +{}) at similarity 0.5, "
        "{} (+{} to +{}) at 0.75, and {} ({} to +{}) where they are the same",
        lambda: [n for world in ("0.0", "0.5", "0.75", "1.0") for n in in_world("similarity", world)],
    ),
    Figure(
        "study-results",
        "the gain of {} is {} (+{} to +{}) where the click in the other scenario says nothing of this row's in half of "
        "the cross exposures, {} (+{} to +{}) where it never does. Where nothing links the exposures, so that "
        "histories lack the item as well, {} ({} to +{}) is left",
        lambda: [
            in_world("label_quality", "0.5 clean")[0],
            *(
                n
                for what in ("flipped 0.5", "flipped 1.0", "lost 1.0")
                for n in in_world("label_quality", f"0.5 {what}")
            ),
        ],
    ),
    Figure(
        "study-results",
        "{} ({} to +{}) in clicks with two, +{} ({} to +{}) with three, +{} (+{} to +{}) with five, which holds",
        lambda: [n for world in ("2", "3", "5") for n in in_world("scenarios", world)],
    ),
    Figure(
        "study-results",
        "level in each, from {} to +{} ({} to +{})",
        lambda: [in_world("scenarios_kuairand", "2")[0], *in_world("scenarios_kuairand", "4")],
    ),
    Figure(
        "study-results",
        "in static worlds of the same size {} at similarity 0.5 against {} where all is alike, and {} with five "
        "scenarios against {} with two",
        lambda: [
            in_world(study, world)[0]
            for study, worlds in (("similarity", ("0.5", "1.0")), ("scenarios", ("5", "2")))
            for world in worlds
        ],
    ),
    Figure(
        "study-results",
        "on a plain MMoE {} (+{} to +{}) with variant B",
        lambda: part("glmt_only", "glmt_b - own, mmoe", "search/ctr"),
    ),
    Figure(
        "study-results",
        "32 are level, to +{} ({} to +{}); 8 loses {} in recommendation's clicks, 128 loses {} in search's clicks "
        "and {} in its",
        lambda: [
            *part("dimension", "32 - 16", "recommendation/ctr"),
            -part("dimension", "8 - 16", "recommendation/ctr")[0],
            *(-part("dimension", "128 - 16", f"search/{task}")[0] for task in ("ctr", "ctcvr")),
        ],
    ),
    Figure(
        "study-results",
        "equal, the default | {} ({} to {}) | {} ({} to {}) |",
        lambda: [n for s in reversed(SIDES) for n in joined("equal", s, "usr - separate")],
    ),
    Figure(
        "study-results",
        "by their rows | {} ({} to {}) | {} ({} to {}) |",
        lambda: [n for s in reversed(SIDES) for n in joined("rows", s, "usr - separate")],
    ),
    Figure(
        "study-results",
        "(APG {}, PLE {}, M2M {}, SharedBottom {}, MMoE {}; STAR {}), in the smaller one around four "
        "(APG {}, PLE {}, STAR {}, M2M {}; SharedBottom {} and MMoE {} have 0",
        lambda: [
            joined("equal", s, "usr - plain", backbone=b)[0]
            for s, order in zip(
                SIDES,
                ("apg ple m2m shared_bottom mmoe star", "apg ple star m2m shared_bottom mmoe"),
                strict=True,
            )
            for b in order.split()
        ],
    ),
    Figure(
        "study-results",
        "{} (SharedBottom), {} (MMoE), {} (PLE), {} (STAR), {} (M2M), {} (APG), all intervals above 0",
        lambda: [joined("equal", SIDES[1], "usr - separate", backbone=b, carry="0.5 and 1")[0] for b in NAMES],
    ),
    Figure(
        "study-results",
        "APG {}, PLE {} and M2M {}; STAR {} has 0 inside its interval ({} to {}). In the larger one APG {}, M2M {} and "
        "PLE {}; SharedBottom {} and MMoE {} have intervals above 0, STAR {}. After",
        lambda: [
            *(
                joined("equal", SIDES[1], "usr - plain", backbone=b, carry="0.5 and 1")[0]
                for b in ("apg", "ple", "m2m")
            ),
            *joined("equal", SIDES[1], "usr - plain", backbone="star", carry="0.5 and 1"),
            *(
                joined("equal", SIDES[0], "usr - plain", backbone=b, carry="0.5 and 1")[0]
                for b in ("apg", "m2m", "ple", "shared_bottom", "mmoe", "star")
            ),
        ],
    ),
    Figure("study-results", "{} ({} to {}), pooled over both scenarios", lambda: with_terms("ctr")),
    Figure(
        "learning",
        "{} ({} to {}) in clicks and {} ({} to {}) in orders, pooled over both scenarios",
        lambda: with_terms("ctr") + with_terms("ctcvr"),
    ),
    Figure(
        "learning",
        "clicks gain {} ({} to {}) in search and {} ({} to {}) in recommendation",
        lambda: [n for s in SIDES for n in with_terms("ctr", s)],
    ),
    Figure(
        "learning",
        "USR over it {} ({} to {}) in clicks and {} ({} to {}) in long views, the plain model {} ({} to {}) and {} "
        "({} to {})",
        lambda: [n for ours in ("USR", "plain") for task in ("ctr", "ctcvr") for n in over_trees(ours, task)],
    ),
    Figure(
        "learning",
        "LightGBM by about {} in clicks and {} to {} in orders",
        lambda: [over_lightgbm("ctr")[0], *ends(over_lightgbm("ctcvr"))],
    ),
    Figure(
        "README",
        "clicks {} with SharedBottom and {} to {} around five backbones of six, "
        "in the smaller one's {} to {} around four",
        lambda: [
            joined("equal", SIDES[0], "usr - plain")[0],
            *ends([joined("equal", SIDES[0], "usr - plain", backbone=b)[0] for b in NAMES if b != "star"]),
            *ends([joined("equal", SIDES[1], "usr - plain", backbone=b)[0] for b in ("apg", "ple", "star", "m2m")]),
        ],
    ),
    Figure(
        "README",
        "{} in clicks there with plain SharedBottom ({} with USR)",
        lambda: [joined("equal", SIDES[1], f"{way} - separate")[0] for way in ("plain", "usr")],
    ),
    *learning_rows(),
]


def test_USR_is_sure_round_the_backbones_that_the_pages_name() -> None:
    sure = {s: [b for b in NAMES if joined("equal", s, "usr - plain", backbone=b)[1] > 0] for s in SIDES}
    assert sure == {
        "search": ["shared_bottom", "mmoe", "ple", "m2m", "apg"],
        "recommendation": ["ple", "star", "m2m", "apg"],
    }


def test_leads_on_kuairand_are_sure_over_the_peers_that_the_page_names() -> None:
    def unsure(world: str, ours: str, task: str) -> list[str]:
        models = result("anchors")["worlds"][world]["models"]
        leads = {name: gap(m[f"ours, {ours} over it"][task]["all"]) for name, m in models.items() if name[:4] != "ours"}
        return [name.removeprefix("torch-rechub, ") for name, (_, low, _) in leads.items() if low <= 0]

    assert unsure("kuairand", "USR", "ctr") == unsure("kuairand", "USR", "ctcvr") == ["DCNv2"]
    assert unsure("kuairand", "plain", "ctr") == ["DCNv2"]
    assert unsure("kuairand", "plain", "ctcvr") == ["LightGBM", "SharedBottom", "MMoE", "PLE", "DCNv2", "DeepFM"]
    own = "kuairand, all earlier, counters of all days"
    for ours in ("USR", "plain"):
        assert unsure(own, ours, "ctr") == ["LightGBM", "DCNv2"]
        assert unsure(own, ours, "ctcvr") == ["LightGBM", "SharedBottom", "DCNv2"]


def test_no_gain_of_usr_in_clicks_is_sure_by_history_user_or_item_and_fg_excludes_0() -> None:
    """What docs/study-results.md says of the cold start and of FG."""
    cells = {
        (row["gap_of"], name): (cell["low"] > 0) - (cell["high"] < 0)
        for row in result("study_parts")["rows"]
        if row["study"] == "cold_start"
        for name, cell in row["cells"].items()
    }
    assert {key: side for key, side in cells.items() if side} == {
        ("usr - plain, 21 or more past events", "search/ctr"): 1,
        ("usr - plain, user new", "recommendation/ctr"): -1,
    }
    assert all(part("ablation", "no_fg - usr", f"{s}/ctcvr")[2] < 0 for s in SIDES)
    holding = {
        (row["gap_of"], name)
        for row in result("study_parts")["rows"]
        for name, cell in row["cells"].items()
        if cell["holds"]
    }
    assert holding == {
        ("8 - 16", "recommendation/ctr"),
        ("128 - 16", "search/ctr"),
        ("128 - 16", "search/ctcvr"),
    }, "gaps of the dimension alone"


def test_a_single_round_of_signal_cost_has_no_interval() -> None:
    ratio = {"median": 1.12, "low": 1.12, "high": 1.12, "coverage": 0.0}
    ways = {"tags": {"bytes_a_row": 30.3} | {f"{what}_ratio": ratio for what in ("reader", "plain", "usr")}}
    tables = [signal_cost.table({"settings": {"rounds": n}, "results": ways}) for n in (1, 7)]
    assert [t.splitlines()[-1] for t in tables] == [
        "| tags | 30 | 1.12x | 1.12x | 1.12x |",
        "| tags | 30 | 1.12 (1.12-1.12)x | 1.12 (1.12-1.12)x | 1.12 (1.12-1.12)x |",
    ]


@pytest.mark.parametrize(
    ("name", "benchmark"),
    [(p, b) for p, found in TABLES.items() for b in found],
    ids=lambda v: getattr(v, "__name__", v),
)
def test_a_table_is_the_one_that_the_benchmark_makes_of_its_results(name: str, benchmark: Any) -> None:
    stem = benchmark.RESULTS.stem
    text = (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")
    found = re.search(rf"<!-- {stem} -->\n(.*?)\n<!-- /{stem} -->", text, re.DOTALL)
    assert found is not None, f"{name}.md has no table {stem}"
    assert found[1] == benchmark.table(result(stem)), f"run benchmarks/{stem}.py, or put its table in place"


@pytest.mark.parametrize("world", result("learning_signals")["worlds"])
def test_the_tables_of_signals_are_those_of_their_results(world: str) -> None:
    table = learning_signals.table(result("learning_signals")["worlds"][world])
    assert f"<!-- learning_signals: {world} -->\n{table}\n<!--" in (ROOT / "docs" / "learning.md").read_text("utf-8")


@pytest.mark.integration
def test_the_page_of_scale_is_the_one_that_its_benchmark_writes(tmp_path: Path) -> None:
    shutil.copy(ROOT / "docs" / "scale.md", tmp_path)
    build_samples_report.write_report(result("build_samples"), tmp_path)
    assert (tmp_path / "scale.md").read_text(encoding="utf-8") == (ROOT / "docs" / "scale.md").read_text(
        encoding="utf-8"
    )


@pytest.mark.parametrize("figure", FIGURES, ids=lambda f: f"{f.page}: {f.text[:50]}")
def test_a_sentence_quotes_what_the_results_say(figure: Figure) -> None:
    printed, computed = quoted(figure.text, figure.page), list(figure.numbers())
    assert len(printed) == len(computed)
    assert [(p, c) for p, c in zip(printed, computed, strict=True) if not agrees(p, c)] == []


def test_a_figure_that_is_off_by_one_in_its_last_digit_is_found() -> None:
    assert agrees("58", 57.8)
    assert not agrees("58", 57.4)
    assert agrees("1,234.5", 1234.46)
    assert not agrees("-0.002", 0.002)
