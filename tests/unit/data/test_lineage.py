"""A model and a lake belong together, or every job that would join them says why they do not, in one line."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.unit.export_runs import make_run, run_config
from tests.unit.samples_table import FIRST_DATE, named, samples_spec, write_samples, write_vocabularies
from tests.unit.test_cli import load_job
from usr_ray.cli import run_job
from usr_ray.config import Config, UserError, load_config
from usr_ray.data.lineage import built_with, check_config, difference, fingerprint
from usr_ray.data.manifest import Manifest, build_manifest, open_samples, read_vocabularies
from usr_ray.reporting.run import write_report
from usr_ray.schema import FeatureSpec
from usr_ray.serving.export import export_run
from usr_ray.training.state import TrainState
from usr_ray.training.warm_start import check_warm_start
from usr_ray.training.worker import LocalWorker

pytestmark = pytest.mark.unit

SMALL, GROWN, LARGE = (samples_spec(num_items=count) for count in (40, 50, 60))
OURS = named(SMALL, "v")
SAME, OTHER, LATER = "same ids", "other ids", "later ids"


def make_lake(folder: Path, spec: FeatureSpec, prefix: str, meaning: str = "") -> Path:
    write_samples(folder, spec, num_rows=120, num_days=3, built_with=meaning)
    write_vocabularies(folder, spec, prefix)
    return folder


@pytest.fixture(scope="module")
def lakes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The run's lake, one of as many users and items by other names, and the run's after some builds more."""
    root = tmp_path_factory.mktemp("lakes")
    meaning = built_with(run_config())
    return {
        SAME: make_lake(root / "same", OURS, "v", meaning),
        OTHER: make_lake(root / "other", named(SMALL, "w"), "w", meaning),
        LATER: make_lake(root / "later", named(LARGE, "v", OURS, named(GROWN, "v")), "v", meaning),
    }


@pytest.fixture(scope="module")
def run_dir(lakes: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_run(tmp_path_factory.mktemp("run"), lakes[SAME])
    build_manifest(lakes[SAME], dates=(FIRST_DATE, FIRST_DATE)).save(folder / "manifest-train.json")
    (folder / "config.json").write_text(json.dumps({"config": run_config().to_dict()}))
    return folder


def table(spec: FeatureSpec, meaning: str = "") -> Manifest:
    return Manifest(
        table_uri="lake/samples", version=0, spec=spec, files=(), built_with=meaning, item_features=(), sha256=""
    )


def test_a_fingerprint_is_the_xor_of_the_values_digests(lakes: dict[str, Path]) -> None:
    entries = read_vocabularies(lakes[SAME])
    assert entries.num_rows == 30 + 40 + 20 + 6
    for feature in OURS.sparse:
        if feature.name != "event_hour":
            assert fingerprint(entries, feature.name, feature.num_embeddings) == feature.fingerprints[-1]
    shuffled = entries.take(list(range(entries.num_rows))[::-1])
    assert fingerprint(shuffled, "brand", 8) == OURS.sparse_feature("brand").fingerprints[-1]


@pytest.mark.parametrize(
    ("model", "now", "is_same"),
    [
        (OURS, OURS, True),
        (OURS, named(SMALL, "w"), False),
        (OURS, named(GROWN, "v", OURS), True),
        (OURS, named(LARGE, "w", named(GROWN, "w"), named(SMALL, "w")), False),
        (named(GROWN, "v", OURS), OURS, True),  # the lake as it was before it grew
        (named(GROWN, "v", OURS), named(SMALL, "w"), False),
        (named(GROWN, "v"), OURS, False),  # larger, and it never had the lake's size: nothing says they are the same
        (SMALL, OURS, True),  # a model older than fingerprints: nothing to hold against it
    ],
)
def test_the_values_of_one_are_the_first_of_the_other(model: FeatureSpec, now: FeatureSpec, is_same: bool) -> None:
    found = difference(model, "", table(now))
    assert (found is None) == is_same
    if found:
        assert found.startswith("the ids of ")
        assert "in the samples table stand for other values than those the model was trained with (" in found


@pytest.mark.parametrize(("name", "prefix"), [(SAME, "v"), (OTHER, "w")])
def test_where_the_fingerprints_do_not_tell_the_lakes_own_values_do(
    lakes: dict[str, Path], tmp_path: Path, name: str, prefix: str
) -> None:
    """As after more builds than a table keeps fingerprints of."""
    grown = open_samples(make_lake(tmp_path, named(GROWN, prefix), prefix))
    assert dict(grown.spec.sparse_feature("item_id").fingerprints).keys() == {52}
    assert (difference(dataclasses.replace(OURS, sparse=OURS.sparse[1:2]), "", items_alone(grown)) is None) == (
        name == SAME
    )


def items_alone(manifest: Manifest) -> Manifest:
    return dataclasses.replace(manifest, spec=dataclasses.replace(manifest.spec, sparse=manifest.spec.sparse[1:2]))


def hashed(num_buckets: int) -> FeatureSpec:
    of_table = [
        dataclasses.replace(f, num_embeddings=num_buckets, fingerprints=((num_buckets, "xxhash64"),))
        for f in SMALL.sparse
    ]
    return dataclasses.replace(SMALL, sparse=tuple(of_table))


def test_hashed_ids_belong_together_by_their_parameters() -> None:
    assert difference(hashed(64), "", table(hashed(64))) is None
    for model, now in ((hashed(64), hashed(65)), (hashed(42), OURS), (OURS, hashed(1000))):
        assert str(difference(model, "", table(now))).startswith("the ids of user_id in the samples table stand for")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        (
            "labels.click_window=2 hours",
            "labels.click_window of the samples table is 7200 s, but the model was trained",
        ),
        ("histories.length=20", "histories.length of the samples table is 20, but the model was trained with 50"),
        ('scenarios=["recommendation", "search"]', "scenarios of the samples table is recommendation, search, but"),
        ('query_scenarios=["recommendation"]', "query_scenarios of the samples table is recommendation, but the model"),
        ("vocabulary.kind=hash", "vocabulary.kind of the samples table is hash, but the model was trained with fit"),
        ("labels.global_span=day", "labels.global_span of the samples table is day, but the model was trained with"),
        ("counters.defaults=true", "counters.item.events of the samples table is impressions, clicks, orders, but"),
        ('features.user_numbers=["age"]', "features.user_numbers of the samples table is age, but the model was"),
    ],
)
def test_another_configuration_of_the_build_is_another_meaning(override: str, words: str) -> None:
    before, now = load_config(None), load_config(None, [override])
    assert str(difference(OURS, built_with(before), table(OURS, built_with(now)))).startswith(words)
    with pytest.raises(UserError, match=r"the configuration has .*, the table at lake/samples has .*; train with"):
        check_config(before, table(OURS, built_with(now)))
    check_config(now, table(OURS, built_with(now)))


def test_the_key_of_other_windows_is_that_of_all_default_counters() -> None:
    asked = ("counters.defaults=true", 'counters.windows=["1d", "all"]')
    told = (
        r"^counters.windows: the configuration has \['all'\], the table at lake/samples has \['1d', 'all'\]; train with"
    )
    with pytest.raises(UserError, match=told):
        check_config(load_config(None, asked[:1]), table(OURS, built_with(load_config(None, asked))))


@pytest.mark.parametrize(
    "override",
    ["labels.click_window=60 minutes", "vocabulary.min_count=7", "train.seed=3", "counters.warmup_days=3"],
)
def test_what_does_not_change_a_row_does_not_matter(override: str) -> None:
    config = load_config(None, [override])
    check_config(config, table(OURS, built_with(load_config(None))))
    assert difference(OURS, built_with(config), table(OURS, built_with(load_config(None)))) is None


@pytest.mark.parametrize(
    ("asked", "there", "is_good"), [("*", "brand", True), ("", "brand", False), ("brand", "", False), ("", "", True)]
)
def test_sides_that_the_table_does_not_have_so_are_refused(asked: str, there: str, is_good: bool) -> None:
    wanted = json.dumps([asked] if asked else [])
    config = load_config(None, ('features.item_categories=["brand"]', f"features.history_item_features={wanted}"))
    of_table = table(samples_spec(sides=[there] if there else []), built_with(config))
    if is_good:
        check_config(config, of_table)
        return
    told = f"the configuration has {asked or 'none'}, the table at .* has {there or 'none'}"
    with pytest.raises(UserError, match=f"features.history_item_features: {told}; build a date"):
        check_config(config, of_table)
    check_config(dataclasses.replace(config, model=dataclasses.replace(config.model, event_sides=False)), of_table)


def by_job(name: str, *more: str) -> Callable[[Path, Path, Path], int]:
    def job(run_dir: Path, lake: Path, output: Path) -> int:
        words = ["--run-dir", run_dir, "--lake", lake, *more, *(["--output", output] if name != "evaluate" else [])]
        return run_job(load_job(name).main, [str(word) for word in words])

    return job


def by_warm_start(run_dir: Path, lake: Path, output: Path) -> int:
    config = run_config()
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, warm_start=str(run_dir)))
    manifest = build_manifest(lake, dates=(FIRST_DATE, FIRST_DATE))

    def main(argv: list[str]) -> None:
        check_warm_start(config, manifest)
        TrainState(config, manifest, LocalWorker("cpu"), order="").warm_start(str(run_dir), LocalWorker("cpu"))

    return run_job(main, [])


JOINS = {
    "evaluate": by_job("evaluate", "--dates", "2026-01-02"),
    "score": by_job("score", "--dates", "2026-01-02"),
    "export": by_job("export"),
    "report": by_job("report"),
    "warm start": by_warm_start,
}


@pytest.mark.integration
@pytest.mark.parametrize("name", JOINS)
def test_every_job_that_joins_a_model_and_a_lake_refuses_another_lakes_ids(
    name: str, lakes: dict[str, Path], run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert JOINS[name](run_dir, lakes[OTHER], tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "the ids of user_id in the samples table stand for other values than those the model was trained" in error
    assert list(tmp_path.iterdir()) == []
    if name != "export":  # it takes minutes; its vocabularies: the next test
        assert JOINS[name](run_dir, lakes[LATER], tmp_path / "out") == 0, "grown since"


@pytest.mark.integration
def test_an_export_holds_its_lakes_vocabularies_to_the_run(
    lakes: dict[str, Path], run_dir: Path, tmp_path: Path
) -> None:
    """The samples say one thing, the vocabularies beside them are others: exchanged, or fitted anew."""
    lake = make_lake(tmp_path / "lake", OURS, "w", built_with(run_config()))
    with pytest.raises(UserError, match="its vocabulary of user_id holds other values than those the model was"):
        export_run(run_dir, tmp_path / "out", lake)


@pytest.mark.integration
def test_a_report_takes_a_lake_without_samples(run_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "lake").mkdir()
    assert write_report(run_dir, tmp_path / "lake", tmp_path / "r.html").is_file()


def test_other_labels_are_refused_as_other_ids_are(lakes: dict[str, Path], tmp_path: Path) -> None:
    config: Any = run_config()
    other = Config.from_dict({**config.to_dict(), "labels": {"order_window": "2 hours"}})
    run = make_run(tmp_path / "run", lakes[SAME])
    lake = make_lake(tmp_path / "lake", OURS, "v", built_with(other))
    with pytest.raises(UserError, match=r"^--lake: labels.order_window of the samples table is 7200 s, but the model"):
        load_job("evaluate").main(["--run-dir", str(run), "--lake", str(lake), "--dates", "2026-01-02"])
