"""The experiment's report: what it says, in which order, and what it refuses. Cells by hand, no JVM."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from usr_ray.config import Config, ConfigError, OnlineConfig, UserError, load_config
from usr_ray.evaluation.experiment import ALL, Cell, ExperimentCounts, counts_of, experiment_report
from usr_ray.reporting.experiment import report_lines, write_experiment_page
from usr_ray.schema import EXPERIMENT_ORDERS

pytestmark = pytest.mark.integration


def cell(*combinations: tuple[int, int, int, int]) -> Cell:
    """(impressions, clicks, orders, users), ..."""
    return Cell(*np.array(combinations, dtype=np.int64).T)


def experiment(a: Cell, b: Cell, **more: Any) -> ExperimentCounts:
    cells = {ALL: {"A": a, "B": b}, "search": {"A": a, "B": b}}
    return ExperimentCounts(cells=cells, num_users=a.num_users + b.num_users, **more)


A = cell((10, 0, 0, 800), (10, 1, 0, 150), (10, 2, 1, 50))
CLEARLY_BETTER = cell((10, 0, 0, 700), (10, 1, 0, 200), (10, 3, 1, 100))


def report(counts: ExperimentCounts, **keys: Any) -> dict[str, Any]:
    return experiment_report(counts, OnlineConfig(**({"num_resamples": 200} | keys)), dates="2026-01-01:2026-01-07")


def page_of(found: dict[str, Any], folder: Path) -> str:
    return write_experiment_page(folder / "online.html", found).read_text(encoding="utf-8")


def of(found: dict[str, Any], metric: str, scenario: str = "search") -> dict[str, Any]:
    return next(r for r in found["comparisons"] if (r["scenario"], r["metric"]) == (scenario, metric))


def test_numbers_of_a_bucket_and_a_comparison() -> None:
    found = report(experiment(A, CLEARLY_BETTER))
    side = found["buckets"]["B"]["search"]
    assert (side["num_users"], side["num_impressions"], side["num_clicks"], side["num_orders"]) == (
        1000,
        10_000,
        500,
        100,
    )
    assert (side["uctr"]["value"], side["ucvr"]["value"], side["ctr"]["value"]) == (0.3, 0.1, 0.05)
    assert of(found, "uctr")["difference"]["value"] == pytest.approx(0.1)
    assert of(found, "uctr")["lift"]["value"] == pytest.approx(0.5)
    assert of(found, "uctr")["verdict"] == "higher"
    assert len(found["comparisons"]) == 8  # one bucket, two scenarios (with all), four metrics
    assert [row["scenario"] for row in found["comparisons"]][::4] == [ALL, "search"]


def test_both_intervals_of_a_large_sample_nearly_agree() -> None:
    lift = of(report(experiment(A, CLEARLY_BETTER), num_resamples=2000), "ctr")["lift"]
    assert lift["bootstrap_low"] == pytest.approx(lift["low"], abs=0.06)
    assert lift["bootstrap_high"] == pytest.approx(lift["high"], abs=0.06)


def test_verdict_is_holms_not_the_single_p_values() -> None:
    b = cell((10, 0, 0, 761), (10, 1, 0, 189), (10, 2, 1, 50))
    row = of(report(experiment(A, b)), "uctr")
    assert row["p_value"] < 0.05 < row["p_value_holm"]
    assert row["verdict"] == "no difference shown"


def test_a_better_control_reads_lower() -> None:
    assert of(report(experiment(A, CLEARLY_BETTER), control="B"), "uctr")["verdict"] == "lower"


def test_few_users_get_no_verdict() -> None:
    a, b = cell((1, 0, 0, 500), (1, 1, 1, 9)), cell((1, 0, 0, 440), (1, 1, 1, 69))
    row = of(report(experiment(a, b)), "ucvr")
    assert row["p_value"] < 1e-9
    assert (row["verdict"], row["p_value_holm"]) == ("too few users", None)


def test_comparisons_that_can_have_no_verdict_do_not_weaken_the_others() -> None:
    counts = experiment(A, CLEARLY_BETTER)
    alone = of(report(counts), "ctr")["p_value_holm"]
    few = cell((1, 0, 0, 500), (1, 1, 1, 9))
    counts.cells["feed"] = {"A": few, "B": few}
    found = report(counts)
    assert of(found, "ctr")["p_value_holm"] == alone
    assert "Verdicts are Holm's over the 8 of 12 comparisons that can have one" in "\n".join(report_lines(found))


def test_rates_of_impressions_have_a_verdict_where_every_user_has_the_event() -> None:
    a, b = cell((200, 20, 0, 300), (200, 22, 1, 300)), cell((200, 24, 0, 300), (200, 26, 1, 300))
    found = report(experiment(a, b))
    assert of(found, "ctr")["verdict"] == "higher"
    assert of(found, "uctr")["verdict"] == "too few users", "nobody is without a click"


def test_orders_that_nobody_logs_are_not_known_which_is_not_0(tmp_path: Path) -> None:
    # The same clicks and orders a feed impression in both buckets; B moves half of search's impressions to the feed.
    both = {"A": cell((10, 1, 1, 50), (10, 1, 0, 950)), "B": cell((15, 2, 1, 75), (15, 1, 0, 925))}
    feed = {"A": cell((5, 1, 1, 50), (5, 0, 0, 950)), "B": cell((10, 2, 1, 100), (10, 1, 0, 900))}
    search = {"A": cell((10, 1, 0, 1000)), "B": cell((5, 1, 0, 1000))}
    cells = {ALL: both, EXPERIMENT_ORDERS: feed, "feed": feed, "search": search}
    found = report(ExperimentCounts(cells=cells, num_users=2000, without_orders=("search", "cart")))
    own, every = (found["buckets"]["A"][name] for name in ("search", ALL))
    assert own["num_orders"] is own["ucvr"]["value"] is own["ctcvr"]["bootstrap_low"] is None
    assert (own["ctr"]["value"], every["ctr"]["value"]) == (0.1, 0.1)
    assert (every["ctcvr"]["value"], every["ucvr"]["value"]) == (0.01, 0.05)  # 50 of 5,000 impressions, 1,000 users
    assert of(found, "ctcvr", ALL)["difference"] == of(found, "ctcvr", "feed")["difference"] | {
        name: of(found, "ctcvr", ALL)["difference"][name] for name in ("bootstrap_low", "bootstrap_high")
    }
    assert of(found, "ctcvr", ALL)["difference"]["value"] == 0.0
    assert [(r["scenario"], r["metric"]) for r in found["comparisons"] if r["scenario"] == "search"] == [
        ("search", "uctr"),
        ("search", "ctr"),
    ]
    assert list(found["sample_ratio"]) == [ALL, "feed", "search"]
    assert found["warnings"] == [
        "Nobody logs the orders of search (labels.no_order_scenarios): UCVR and CTCVR are not known there, and those "
        "of 'all' are of the users and impressions of the other scenarios."
    ]
    json.dumps(found, allow_nan=False)
    assert any("search    UCVR    A" in line and "10,000" in line for line in report_lines(found))
    page_of(found, tmp_path)
    # Where no scenario's orders are logged, nothing is said of them.
    none = report(ExperimentCounts(cells={ALL: search, "search": search}, num_users=2000, without_orders=("search",)))
    assert {row["metric"] for row in none["comparisons"]} == {"uctr", "ctr"}


def test_undefined_numbers_are_null_in_json() -> None:
    nothing = cell((5, 0, 0, 100))
    found = report(experiment(nothing, nothing))
    row = json.loads(json.dumps(found, allow_nan=False))["comparisons"][0]
    assert row["lift"] == dict.fromkeys(("value", "low", "high", "bootstrap_low", "bootstrap_high"))
    assert (row["p_value"], row["p_value_holm"]) == (None, None)


def test_it_says_that_it_runs_no_experiment(tmp_path: Path) -> None:
    found = report(experiment(A, CLEARLY_BETTER))
    assert "does not run an experiment" in report_lines(found)[0]
    assert "does not run an experiment" in page_of(found, tmp_path)


def test_a_sample_ratio_mismatch_comes_before_any_number_and_voids_every_verdict(tmp_path: Path) -> None:
    lost = cell((10, 0, 0, 500), (10, 1, 0, 200), (10, 3, 1, 100))
    found = report(experiment(A, lost))
    lines = report_lines(found)
    assert lines[2].startswith("WARNING: SAMPLE RATIO MISMATCH: users per bucket do not fit the equal shares")
    assert "A 1,000 for 900, B 800 for 900" in lines[2]
    assert {row["verdict"] for row in found["comparisons"]} == {"not valid: sample ratio"}
    page = page_of(found, tmp_path)
    assert page.index("SAMPLE RATIO MISMATCH") < page.index("<svg")


def test_planned_shares_decide_what_is_a_mismatch() -> None:
    lost = cell((10, 0, 0, 500), (10, 1, 0, 200), (10, 3, 1, 100))
    assert report(experiment(A, lost), shares={"A": 5, "B": 4})["warnings"] == []


def test_a_mismatch_in_one_scenario_voids_that_scenario_alone() -> None:
    counts = experiment(A, CLEARLY_BETTER)
    counts.cells["search"]["B"] = cell((10, 0, 0, 500), (10, 1, 0, 200))
    found = report(counts)
    assert found["warnings"][0].startswith("SAMPLE RATIO MISMATCH in search")
    assert of(found, "uctr")["verdict"] == "not valid: sample ratio"
    assert of(found, "uctr", ALL)["verdict"] == "higher"


def test_what_was_left_out_is_said() -> None:
    counts = experiment(
        A,
        CLEARLY_BETTER,
        several_buckets=40,
        no_bucket=7,
        unplanned={"C": 3},
        impressions_not_mature=11,
        without_column=("recommendation",),
    )
    text = "\n".join(report_lines(report(counts)))
    assert "40 users (2.0%) were seen in several buckets and are left out" in text
    assert "buckets that online.shares does not name are left out: C 3." in text
    assert "have no column 'bucket': recommendation." in text
    assert "40 seen in several buckets, 7 without one, 3 in unplanned ones" in text
    assert "11 whose labels are not final" in text


def test_no_bucket_one_bucket_or_an_unknown_control_is_refused_in_one_line() -> None:
    one = ExperimentCounts(cells={ALL: {"A": A}, "search": {"A": A}})
    with pytest.raises(
        UserError, match=r"--bucket-column bucket: users are in one bucket only, A; a comparison needs two"
    ):
        report(one)
    nobody = ExperimentCounts(no_bucket=3, several_buckets=2, unplanned={"C": 4}, impressions_not_mature=50)
    with pytest.raises(
        UserError,
        match=r"^--dates 2026-01-01:2026-01-07: no usable impression has a bucket in 'bucket' \(3 users have none, 2 "
        r"several; unplanned buckets: \{'C': 4\}; 50 impressions are not mature\); check the dates, the column and "
        r"online.shares$",
    ):
        report(nobody)
    with pytest.raises(UserError, match=r"--control X: no user is in this bucket; there are: A, B"):
        report(experiment(A, CLEARLY_BETTER), control="X")


def test_the_page_is_well_formed_and_escapes_what_the_data_names(tmp_path: Path) -> None:
    counts = ExperimentCounts(cells={ALL: {"A": A, "<b>&": CLEARLY_BETTER}})
    page = page_of(report(counts, control="A"), tmp_path)
    assert "<b>&" not in page
    assert "&lt;b&gt;&amp;" in page
    assert not re.search(r"https?://|<script|<link|<img", page)
    assert page.count("<svg") == 1
    drawn = page[page.index("<svg") : page.index("</svg>")]
    assert drawn.count("&lt;b&gt;&amp;") == 4  # a line for each metric


def test_the_plot_bears_comparisons_without_a_lift(tmp_path: Path) -> None:
    nothing = cell((5, 0, 0, 100))
    page = page_of(report(experiment(nothing, nothing)), tmp_path)
    assert page.count(">no lift: the control has no event<") == 8


def test_collected_rows_become_cells_and_an_account() -> None:
    names = ["status", "bucket", "scenario", "impressions", "clicks", "orders", "users", "not_mature", "without_bucket"]
    rows = [
        ("in the experiment", "A", ALL, 3, 1, 0, 2, 0, 0),
        ("in the experiment", "A", ALL, 1, 0, 0, 5, 0, 0),
        ("in the experiment", "B", ALL, 1, 1, 1, 4, 0, 0),
        ("in the experiment", "A", "\nusers", 0, 0, 0, 8, 6, 9),
        ("in the experiment", "B", "\nusers", 0, 0, 0, 4, 1, 0),
        ("no bucket", None, "\nusers", 0, 0, 0, 3, 0, 30),
        ("several buckets", None, "\nusers", 0, 0, 0, 2, 5, 5),
        ("unplanned", "C", "\nusers", 0, 0, 0, 1, 5, 5),
    ]
    found = counts_of(pa.table({name: [row[n] for row in rows] for n, name in enumerate(names)}))
    assert found.buckets == ["A", "B"]
    assert found.cells[ALL]["A"].num_users == 7
    assert (found.num_users, found.num_impressions) == (11, 3 * 2 + 5 + 4)
    assert (found.no_bucket, found.several_buckets, found.unplanned) == (3, 2, {"C": 1})
    assert (found.impressions_not_mature, found.impressions_without_bucket) == (7, 9)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("online.bucket_column=''", "online.bucket_column is empty; name a column of the impressions logs"),
        ("online.confidence=1.0", "online.confidence must be in [0.5, 1), got 1.0"),
        ("online.num_resamples=10", "online.num_resamples must be in [100, 1000000], got 10"),
        ("online.seed=-1", "online.seed must be in [0, 4294967295], got -1"),
        ("online.shares={A=0.5,B=0.0}", "online.shares.B must be in (0, 1e300], got 0.0"),
        ("online.shares={A=1}", "online.shares names one bucket, A; an experiment has two or more"),
    ],
)
def test_what_the_configuration_cannot_mean_is_refused(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        load_config(None, [override])


def test_a_control_outside_the_planned_shares_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"online.control 'C' is not in online.shares, which has: A, B"):
        load_config(None, ["online.shares={A=1,B=1}", "online.control=C"])


def test_the_section_survives_being_saved() -> None:
    config = load_config(None, ["online.shares={A=1,B=2}", "online.control=B"])
    assert Config.from_dict(config.to_dict()) == config
