"""The report holds the numbers it is given, needs no network, and says why what is missing is missing."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest

from jobs import report as job
from usr_ray.cli import run_job
from usr_ray.config import Config, dates_in
from usr_ray.evaluation.files import write_metrics, write_predictions
from usr_ray.evaluation.metrics import Predictions, metrics_by_scenario
from usr_ray.reporting.lake import cold_part, funnel
from usr_ray.reporting.page import DASH
from usr_ray.reporting.run import _facts, importance_section, model_name, why_undefined, write_report
from usr_ray.runs.evaluations import write_evaluation
from usr_ray.runs.read import read_history, read_run

pytestmark = pytest.mark.integration

SCENARIOS = ("search", "recommendation")
COMMAND = ["python", "jobs/train.py", "--set", "data.name=<b>&'x'"]


def make_predictions(*, seed=0, num_rows=600):
    """No order in search, so that CTCVR is undefined there."""
    rng = np.random.default_rng(seed)
    scenario_N = rng.integers(0, 2, num_rows)
    click_N = rng.random(num_rows) < 0.3
    order_N = click_N & (scenario_N == 1) & (rng.random(num_rows) < 0.5)
    labels = np.stack([click_N, order_N, click_N, order_N], axis=1).astype(np.float32)
    probs = np.clip(0.2 + 0.3 * labels[:, :2] + 0.2 * rng.random((num_rows, 2)), 0, 1)
    return Predictions(
        row_number_N=np.arange(num_rows),
        scenario_N=scenario_N,
        labels_NT=labels,
        probs_NT=probs,
        global_probs_NT=None,
        user_key_N=rng.integers(0, 30, num_rows),
        request_key_N=np.arange(num_rows) // 5,
        item_id_N=rng.integers(1, 20, num_rows),
        history_length_N=rng.integers(0, 30, num_rows),
    )


def write_record(run_dir, **changes):
    record = {
        "config": Config.from_dict({"data": {"train_dates": "2026-01-01:2026-01-06"}}).to_dict(),
        "created": "2026-01-09T10:00:00+00:00",
        "ended": "2026-01-09T11:02:30+00:00",
        "status": "finished",
        "step": 1234,
        "attempts": [{"started": "2026-01-09T10:00:00+00:00", "command": COMMAND}],
        "table": {"uri": "/data/lake/samples", "version": 41},
        "manifests": {"train": {"num_rows": 98_765}},
        "packages": {"usr_ray": "9.8.7", "torch": "2.14.1"},
        "shuffle": {"order": "by_date", "neighbour_distance": 0.254, "correlation": 0.874},
    }
    (run_dir / "config.json").write_text(json.dumps(record | changes))


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """A run that was trained and evaluated."""
    folder = tmp_path_factory.mktemp("run")
    write_record(folder)
    lines = [
        {
            "kind": "train",
            "step": s,
            "loss": 1 / s,
            "loss/search/ctr": 0.3,
            "loss/global/ctr": 0.0,
            "samples_per_s": 5e4,
        }
        for s in (10, 20, 30)
    ]
    (folder / "history.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    model, baseline = make_predictions(), make_predictions(seed=1)
    baseline = Predictions(
        **{n: getattr(model, n) for n in Predictions.__dataclass_fields__ if n != "probs_NT"},
        probs_NT=np.random.default_rng(2).random((len(model), 2)),
    )
    splits = {
        "eval": metrics_by_scenario(model, SCENARIOS),
        "eval_popularity": metrics_by_scenario(baseline, SCENARIOS),
    }
    write_metrics(folder / "evaluation-2026-01-07_2026-01-08.json", splits)
    about = {"dates": "2026-01-07:2026-01-08", "checkpoint": "best-00001000", "table_version": 42}
    write_predictions(folder / "predictions.parquet", model, SCENARIOS, baseline=baseline, about=about)
    return folder


@pytest.fixture(scope="module")
def lake(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lake")
    (folder / "reports").mkdir()
    for date in ("2026-01-07", "2026-01-08"):
        (folder / "reports" / f"{date}.json").write_text(json.dumps(etl_report(date)))
    return folder


def etl_report(date, **changes):
    row = {"impressions": 1000, "clicks": 120, "orders": 9, "clicks_global": 160, "orders_global": 12, "mature": 500}
    return {
        "date": date,
        "table_version": 1,
        "rows": {
            "search_impressions": {"rows_in": 1011, "duplicates": 11, "rejects": 0, "used": 1000},
            "recommendation_impressions": {"rows_in": 1000, "duplicates": 0, "rejects": 0, "used": 1000},
            "orders": {"rows_in": 25, "duplicates": 1, "rejects": 6, "used": 18},
        },
        "rejects": {"orders": {"without_click": 6}},
        "undated": {
            "rows": {"orders": {"rows_in": 3, "duplicates": 0, "rejects": 3, "used": 0}},
            "rejects": {"orders": {"unreadable_event_time": 3}},
        },
        "scenarios": {s: row | {"click_rate": 0.12} for s in SCENARIOS},
    } | changes


class Page(HTMLParser):
    """Text of a page without what is only drawn, and a check that every element is closed."""

    VOID = ("meta", "br", "img", "link", "input", "hr")

    def __init__(self, text):
        super().__init__()
        self.open, self.words, self.ids, self.links = [], [], [], []
        self.feed(text)
        assert self.open == []
        self.text = re.sub(r"\s+", " ", " ".join(self.words))

    def handle_starttag(self, tag, attributes):
        names = dict(attributes)
        self.ids += [names["id"]] if "id" in names else []
        self.links += [value for name, value in attributes if name in ("src", "href", "srcset", "action", "data")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not {"style", "svg"} & set(self.open):
            self.words.append(data)


@pytest.fixture(scope="module")
def page(run_dir, lake):
    """The whole report, written once."""
    return write_report(run_dir, lake).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def text(page):
    return Page(page).text


def text_of(run_dir, lake=None):
    return Page(write_report(run_dir, lake).read_text(encoding="utf-8")).text


def test_the_numbers_of_the_run_are_there(run_dir, text):
    metrics = json.loads((run_dir / "evaluation-2026-01-07_2026-01-08.json").read_text())
    for split in metrics.values():
        for cell in ("search", "recommendation", "all"):
            for key, decimals in (("auc", 4), ("gauc", 4), ("log_loss", 4), ("pcoc", 3)):
                assert f"{split[cell]['ctr'][key]:.{decimals}f}" in text
    assert str(metrics["eval"]["search"]["ctr"]["num_positives"]) in text
    for fact in (
        "USR on SharedBottom",
        "version 42",
        "best-00001000",
        "1,234",
        "1 h 02 min",
        "98,765 rows",
        "9.8.7",
        "by_date: neighbours 25% as far apart as in a full shuffle",
        "2026-01-09 10:00 UTC",
        "2026-01-07 to 2026-01-08",
        "/data/lake/samples",
    ):
        assert fact in text
    assert "The model ranks held-out clicks with an AUC of" in text


def test_what_a_user_wrote_is_text_not_html(text):
    assert """jobs/train.py --set 'data.name=<b>&'"'"'x'"'"''""" in text


def test_nothing_is_loaded_from_anywhere(page):
    assert "http:" not in page
    assert "https:" not in page
    assert "@import" not in page
    assert "<script" not in page
    assert set(re.findall(r"url\((.)", page)) <= {"#"}
    parsed = Page(page)
    assert all(link.startswith("#") for link in parsed.links)
    assert len(parsed.ids) == len(set(parsed.ids))


def test_plots_follow_the_theme(page):
    drawings = re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL)
    assert len(drawings) == 3 + 4 + 2  # curves, calibration, ROC
    for drawing in drawings:
        assert not re.search(r"#[0-9a-fA-F]{6}\b(?![\w-])", re.sub(r'(href="|url\()#[\w-]+', "", drawing))
        assert "<style" not in drawing
        assert "var(--" in drawing


def test_undefined_metrics_are_dashes_with_a_reason(text):
    assert "undefined: no positive row" in text  # CTCVR in search
    assert "undefined: the model has no global heads" in text
    assert "CTCVR in search (no positive row)" in text
    assert "nan" not in text.lower()
    assert "None" not in text


def test_baseline_is_beside_the_model_with_a_verdict(text):
    assert text.count("popularity ") >= 8
    assert "▲ beats popularity" in text
    assert (
        "It beats the popularity baseline in every scenario and task that can be compared" in text
    )  # not search CTCVR


@pytest.mark.integration
def test_rows_of_one_user_have_a_baseline_and_no_interval(tmp_path):
    write_record(tmp_path)
    model = replace(make_predictions(), user_key_N=np.zeros(len(make_predictions()), dtype=np.int64))
    splits = {"eval": metrics_by_scenario(model, SCENARIOS), "eval_popularity": metrics_by_scenario(model, SCENARIOS)}
    write_metrics(tmp_path / "evaluation-2026-01-07_2026-01-08.json", splits)
    write_predictions(tmp_path / "predictions.parquet", model, SCENARIOS, baseline=model, about={"step": 3})
    text = text_of(tmp_path)
    assert text.count("no interval: one user has all rows of a label") == 3, "search CTCVR has no positive row"
    assert "no baseline to compare with" not in text
    assert "which may be chance" not in text, "one user does not say how far chance goes"


def test_a_run_without_evaluation_says_what_to_do(tmp_path):
    write_record(tmp_path, ended=None, status="running", packages={})
    text = text_of(tmp_path)
    assert "The run has not been evaluated yet." in text
    going_on = "the run is not finished. Where it was stopped, go on with python jobs/train.py --set 'data.name=<b>&'"
    command = f"python jobs/evaluate.py --run-dir {tmp_path} --lake /data/lake --dates"
    assert f"""No metrics yet: {going_on}"'"'x'"'"''. Then evaluate the run with {command} A:B, dates after""" in text
    assert f"{command} A:B, dates after 2026-01-06." in text
    assert "not yet" in text
    data = {"train_dates": "2026-01-01:2026-01-06", "eval_dates": "2026-01-07:2026-01-08"}
    write_record(tmp_path, config=Config.from_dict({"data": data}).to_dict())
    assert f"No metrics yet: evaluate the run with {command} 2026-01-07:2026-01-08." in text_of(tmp_path)


def test_metrics_of_training_serve_until_there_is_an_evaluation(tmp_path):
    write_record(tmp_path)
    cells = metrics_by_scenario(make_predictions(), SCENARIOS)
    write_metrics(tmp_path / "metrics.json", {"eval": cells})
    text = text_of(tmp_path)
    assert "From metrics.json: 600 impressions" in text
    assert f"{cells['search']['ctr']['auc']:.4f}" in text


def test_settings_that_a_resumed_run_changed_are_told(tmp_path):
    """The configuration beside them is the newest attempt's alone."""
    changes = ({}, {"ray.num_workers": [2, 4]}, {"train.learning_rate": [0.01, 0.001], "train.num_epochs": [1, 3]})
    attempts = [{"command": ["train"], "changed": changed} for changed in changes]
    record = {"config": {"scenarios": ["search"]}, "attempts": attempts}
    (tmp_path / "config.json").write_text(json.dumps(record))
    facts = {name: value for name, value, _ in _facts(read_run(tmp_path))}
    assert facts["Attempts"] == "3, resumed 2 times"
    assert facts["Settings changed"] == "train.learning_rate from 0.01 to 0.001; train.num_epochs from 1 to 3"


def test_resumed_steps_count_once_and_a_torn_line_not_at_all(tmp_path):
    path = tmp_path / "history.jsonl"
    path.write_text(
        '{"step": 20, "loss": 2}\n{"step": 10, "loss": 3}\n{"step": 20, "loss": 1}\n'
        '{"kind": "eval", "step": 20, "search/ctr/auc": 0.6}\n{"step": 30, "lo'
    )
    rows = read_history(path)
    assert [(row["step"], row.get("loss")) for row in rows] == [(10, 3), (20, 1), (20, None)]
    assert read_history(tmp_path / "none") == []


def test_etl_sums_add_up_and_undated_rows_count_once(lake):
    reports = [json.loads(path.read_text()) for path in sorted((lake / "reports").iterdir())]
    found = funnel(reports, SCENARIOS)
    by_name = {line["name"]: line for line in found["logs"]}
    assert by_name["orders"] == {
        "name": "orders",
        "rows_in": 53,
        "duplicates": 2,
        "rejected": 15,
        "kept": 36,
        "missing": 0,
        "adds_up": True,
        "is_total": False,
    }
    assert by_name["all logs"]["rows_in"] == 2 * (1011 + 1000 + 25) + 3
    assert [adds_up for _, adds_up in found["checks"]] == [True, True]
    assert found["checks"][0][0] == "impressions kept 2,000 + 2,000 = 4,000, samples 4,000"
    assert [(r["name"], r["count"]) for r in found["rejects"]] == [
        ("orders: without click", 12),
        ("orders: unreadable event time", 3),
    ]
    assert found["num_rejects"] == 15
    search = found["scenarios"][0]
    assert [(s["name"], s["count"]) for s in search["stages"]][:3] == [
        ("impressions", 2000),
        ("clicked in any scenario", 320),
        ("clicked in this one", 240),
    ]
    assert "P(click | click in any scenario) = 75.0%" in search["note"]
    assert "50.0% of the rows have final labels" in search["note"]


def test_etl_sums_that_differ_are_marked(tmp_path, lake):
    write_record(tmp_path)
    broken = etl_report("2026-01-09", rows={"orders": {"rows_in": 10, "duplicates": 1, "rejects": 0, "used": 4}})
    (tmp_path / "reports").mkdir()
    (tmp_path / "reports" / "2026-01-09.json").write_text(json.dumps(broken))
    text = text_of(tmp_path, tmp_path)
    assert "+5 rows unaccounted" in text
    assert "samples 2,000: these differ" in text


def test_global_labels_that_say_nothing_new_are_a_warning():
    row = {"impressions": 100, "clicks": 100, "orders": 3, "clicks_global": 101, "orders_global": 6, "mature": 100}
    found = funnel([etl_report("2026-01-07", scenarios={"search": row})], SCENARIOS)
    assert len(found["warnings"]) == 1
    assert "Search: 99.0% of the rows clicked in any scenario were clicked in this one" in found["warnings"][0]


def cold(impressions, unknown_item, new_item, unknown_query=None, with_query=0):
    share = {"unknown_item": unknown_item / impressions, "no_history": 0.5, "new_item": None, "unknown_query": None}
    return {
        "impressions": impressions,
        "unknown_user": 0,
        "unknown_item": unknown_item,
        "no_history": impressions // 2,
        "new_user": 0,
        "new_item": new_item,
        "unknown_query": unknown_query,
        "with_query": with_query,
        "share": share,
    }


@pytest.mark.integration
def test_cold_impressions_are_added_up_before_and_after_the_last_training_date():
    reports = [
        etl_report("2026-01-06", cold_start={"search": cold(100, 10, 0, 5, 50)}),
        etl_report("2026-01-08", cold_start={"search": cold(100, 40, None, 1, 10)})
        | {"vocabulary_coverage": {"item_id": 0.6}},
        etl_report("2026-01-07", cold_start={"search": cold(300, 20, 30, 0, 40)}),
        etl_report("2026-01-05"),
    ]
    part = cold_part(reports, SCENARIOS, "2026-01-01:2026-01-06")
    before, after = part["rows"]
    assert (before["scenario"], before["span"], before["impressions"]) == ("search", "to the last training date", 100)
    assert dict(zip(part["headings"], before["values"], strict=True)) == {
        "unknown user": "0.0%",
        "unknown item": "10.0%",
        "unknown query": "10.0%",
        "no history": "50.0%",
        "new user": "0.0%",
        "new item": "0.0%",
    }
    # 60 of 400; 1 of 50 queries; one date cannot say what is new.
    assert after["impressions"] == 400
    assert after["values"] == ["0.0%", "15.0%", "2.0%", "50.0%", "0.0%", DASH]
    titles = [plot.title for plot in part["plots"]]
    assert titles == [
        "Impressions with an unknown item",
        "Impressions with no history",
        "Values that have an id of their own",
    ]
    assert "06 Jan" in part["plots"][0].svg and "10%" in part["plots"][0].svg  # noqa: PT018
    assert [row["span"] for row in cold_part(reports, SCENARIOS, "")["rows"]] == ["all dates"]
    assert cold_part([etl_report("2026-01-05")], SCENARIOS, "") is None


def test_orders_that_no_log_knows_are_words_and_no_zero():
    row = {
        "impressions": 100,
        "clicks": 10,
        "clicks_global": 20,
        "mature": 100,
        "orders": None,
        "orders_global": None,
        "p_order_given_order_global": None,
    }
    found = funnel([etl_report("2026-01-07", scenarios={"search": row})], SCENARIOS)
    search, other = found["scenarios"]
    assert [s["name"] for s in search["stages"]] == ["impressions", "clicked in any scenario", "clicked in this one"]
    assert "no orders in this source, so CTCVR is not trained here" in search["note"]
    assert len(other["stages"]) == 5
    cell = {"auc": None, "log_loss": None, "num_samples": 0, "num_positives": 0, "num_unknown": 100}
    assert why_undefined("auc", cell) == "no orders in this source: not known, which is not 0"


def test_the_model_is_named_by_the_parts_that_are_on():
    assert model_name({"model": {"backbone": "ple", "multitask": {"enabled": True}}}) == "PLE with GLMT"
    assert model_name({"model": {"backbone": "m2m"}}) == "M2M alone"


@pytest.mark.integration
def test_the_job_prints_where_the_report_is(run_dir, lake, capsys):
    assert run_job(job.main, ["--run-dir", str(run_dir), "--lake", str(lake)]) == 0
    assert str(run_dir / "report.html") in capsys.readouterr().out
    assert not list(run_dir.glob("*.partial"))


def noisy(seed):
    """Predictions whose AUC depends on the seed."""
    rows = make_predictions(seed=seed)
    return replace(rows, probs_NT=rows.probs_NT * np.random.default_rng(seed).random((len(rows), 1)))


def evaluate_again(run_dir, dates, seed, *, seen, **more):
    """An evaluation of another seed's predictions on some dates; its AUC of clicks."""
    name = dates.replace(":", "_")
    rows = noisy(seed)
    about = {"dates": dates, "checkpoint": "best-00001000", "manifest_sha256": f"m{seed}", **more}
    metrics = metrics_by_scenario(rows, SCENARIOS)
    splits = write_evaluation(
        run_dir, name, rows, SCENARIOS, metrics=metrics, baseline=None, about=about, seen=dates_in(seen)
    )
    return f"{next(iter(splits.values()))['search']['ctr']['auc']:.4f}"


@pytest.mark.integration
def test_an_evaluation_on_training_dates_is_never_headed_as_held_out(tmp_path):
    """A newer one on dates that were trained on does not take the place of the held-out one, nor of its rows."""
    write_record(tmp_path, trained_dates="2026-01-01:2026-01-06")
    seen = "2026-01-01:2026-01-06"
    held_out = evaluate_again(tmp_path, "2026-01-07:2026-01-08", 3, seen=seen)
    trained = evaluate_again(tmp_path, "2026-01-05:2026-01-07", 4, seen=seen)
    assert held_out != trained
    text = text_of(tmp_path)
    assert f"The model ranks held-out clicks with an AUC of {held_out} in search" in text
    assert "Held-out dates 2026-01-07 to 2026-01-08" in text
    assert "Held-out metrics From evaluation-2026-01-07_2026-01-08.json" in text
    assert (
        "evaluation-2026-01-05_2026-01-07.json 2026-01-05 to 2026-01-07 not held out: trained on 2026-01-05 to" in text
    )
    # The splits say it to every other reader.
    assert "eval" not in json.loads((tmp_path / "evaluation-2026-01-05_2026-01-07.json").read_text())
    for path in tmp_path.glob("*2026-01-07_2026-01-08*"):
        path.unlink()
    text = text_of(tmp_path)
    assert f"The model ranks clicks of dates that are not held out with an AUC of {trained} in search" in text
    assert "Metrics on dates that are not held out" in text
    assert "These are not held-out numbers: 2026-01-05 to 2026-01-07 was evaluated" in text
    assert "Evaluated on (not held out) 2026-01-05 to 2026-01-07" in text
    assert "held-out clicks" not in text
    assert "Held-out metrics" not in text


def test_a_run_that_was_evaluated_before_evaluations_had_rows_of_their_own(tmp_path):
    """All of them wrote predictions.parquet: rows of other dates than the reported ones are not taken for theirs."""
    write_record(tmp_path)
    rows, other = noisy(3), noisy(4)
    write_metrics(tmp_path / "metrics.json", {"eval": metrics_by_scenario(rows, SCENARIOS)})
    name = tmp_path / "evaluation-2026-01-05_2026-01-05.json"
    write_metrics(name, {"eval": metrics_by_scenario(other, SCENARIOS)})
    write_predictions(tmp_path / "predictions.parquet", other, SCENARIOS, about={"dates": "2026-01-05:2026-01-05"})
    text = text_of(tmp_path)
    auc = metrics_by_scenario(rows, SCENARIOS)["search"]["ctr"]["auc"]
    assert f"held-out clicks with an AUC of {auc:.4f} in search" in text
    assert "ROC of CTR" not in text, "the rows that are there are of another date"


@pytest.mark.integration
def test_dates_without_rows_and_dates_that_chose_are_said_first(tmp_path):
    config = {"train": {"early_stopping": True}}
    manifests = {"train": {"dates": "2026-01-01:2026-01-03, 2026-01-05:2026-01-06", "num_rows": 1000}}
    write_record(tmp_path, manifests=manifests, trained_dates=manifests["train"]["dates"])
    record = json.loads((tmp_path / "config.json").read_text())
    record["config"].update(config)
    record["config"]["data"]["eval_dates"] = "2026-01-07:2026-01-08"
    (tmp_path / "config.json").write_text(json.dumps(record))
    evaluate_again(tmp_path, "2026-01-07:2026-01-08", 3, seen=manifests["train"]["dates"])
    text = text_of(tmp_path)
    assert "Training dates: of 2026-01-01 to 2026-01-06 the table had no rows of 2026-01-04." in text
    assert "Training dates 2026-01-01 to 2026-01-03 and 2026-01-05 to 2026-01-06 (1,000 rows in the table)" in text
    assert "2026-01-07 to 2026-01-08 also chose the epoch (train.early_stopping), which flatters." in text


@pytest.mark.integration
def test_rows_whose_labels_may_still_change_are_said_to_be_left_out(tmp_path):
    write_record(tmp_path)
    evaluate_again(tmp_path, "2026-01-07:2026-01-08", 3, seen="2026-01-06", table_rows=1234)
    text = text_of(tmp_path)
    assert "600 of 1,234 rows are evaluated: labels of the others may still change." in text
    evaluate_again(tmp_path, "2026-01-07:2026-01-08", 3, seen="2026-01-06", table_rows=600)
    assert "rows are evaluated" not in text_of(tmp_path)


def test_signals_stand_by_what_they_carry_in_whole_scenarios():
    """Not by the noise of a few cold rows."""

    def part(rows, scenario="search", **drops):
        found = {name: {"drop": drop, "low": drop - 0.1, "high": drop + 0.1} for name, drop in drops.items()}
        counts = {"num_rows": 9, "num_positives": 4, "auc": 0.7}
        return {"scenario": scenario, "rows": rows, **counts, "drops": found}

    parts = [part("unseen item", city=0.9, age=0.0), part("all", city=0.1, age=0.2)]
    parts.append(part("all", "recommendation", city=0.15, age=0.01))
    table = importance_section({"num_rows": 27, "parts": parts}, SCENARIOS).table
    assert [row.values[0] for row in table.rows[3:]] == ["age", "city"]


def refused(capsys, *arguments):
    assert run_job(job.main, [str(word) for word in arguments]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def test_user_errors_are_one_line(run_dir, tmp_path, capsys):
    assert "none: no such directory; name the --run-dir" in refused(capsys, "--run-dir", tmp_path / "none")
    assert "holds no config.json" in refused(capsys, "--run-dir", tmp_path)
    assert "--lake" in refused(capsys, "--run-dir", run_dir, "--lake", tmp_path / "none")
    write_record(tmp_path)
    write_metrics(tmp_path / "metrics.json", {"eval": metrics_by_scenario(make_predictions(), SCENARIOS)})
    (tmp_path / "predictions.parquet").write_text("torn")
    assert "predictions.parquet: cannot be read" in refused(capsys, "--run-dir", tmp_path)
    (tmp_path / "config.json").write_text("{")
    assert "config.json: is not readable JSON" in refused(capsys, "--run-dir", tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert "has no scenarios" in refused(capsys, "--run-dir", tmp_path)
