"""A column that knows the click: by its order, by being there at all, by one value; and columns that do not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from deltalake import DeltaTable

from tests.unit.export_runs import run_config
from tests.unit.samples_table import samples_spec, write_samples
from usr_ray.data.manifest import build_manifest
from usr_ray.runs.plan import plan_run
from usr_ray.runs.telltale import _how, binned, telltales

pytestmark = pytest.mark.unit

HOUR_US = 3_600_000_000


def told(lake: Path) -> list[str]:
    return telltales(run_config(), build_manifest(lake, dates=None))


@pytest.fixture
def lake(tmp_path: Path) -> Path:
    write_samples(tmp_path, samples_spec(label_delay_us=HOUR_US), num_rows=1000, num_days=4)
    return tmp_path


def test_a_number_that_only_clicked_rows_have_is_named(lake: Path) -> None:
    """It is null, and so 0, elsewhere, and of both signs where it is there: no order of its values tells the click."""
    assert told(lake) == []
    DeltaTable(lake / "samples").update(
        updates={"age_scaled": "CASE WHEN is_click = 1 THEN age_scaled - 0.5 ELSE 0 END"}
    )
    (line,) = told(lake)
    assert line == (
        "features: age alone tells is_click (AUC 1.000); what is written after the click is no feature: take it out, "
        "or log what was known when the item was shown"
    )
    assert plan_run(run_config(), lake, lake / "run").doubts[-1] == line


def test_a_category_that_says_the_label_is_named(lake: Path) -> None:
    DeltaTable(lake / "samples").update(updates={"brand_index": "CAST(2 + is_order AS BIGINT)"})
    lines = told(lake)
    assert [line.partition(";")[0] for line in lines] == ["features: brand alone tells is_order (AUC 1.000)"]


def test_one_value_whose_rows_are_all_clicked_is_told_of_the_rows_own_columns_alone() -> None:
    """Some clicked rows say "added to the basket": an AUC of 0.55, but no row that does is not clicked."""
    label_N = np.zeros(5000)
    label_N[:1000] = 1
    id_N = np.full(5000, 2)
    id_N[:100] = 3
    assert _how(label_N, id_N, is_of_row=True) == "all 100 rows of one value have it"
    assert _how(label_N, id_N, is_of_row=False) == "", "a user may click on everything"
    id_N[4999] = 3
    assert _how(label_N, id_N, is_of_row=True) == ""
    id_N[:] = 2
    id_N[:12] = 3
    assert _how(label_N, id_N, is_of_row=True) == "", "too few, which chance may give"


def test_features_that_say_much_and_values_that_are_one_row_each_are_none() -> None:
    generator = np.random.default_rng(0)
    probability_N = generator.beta(0.6, 0.6, 20_000)
    label_N = (generator.random(20_000) < probability_N).astype(np.float32)
    assert _how(label_N, binned(label_N, probability_N), is_of_row=False) == "", "the best of all models: AUC 0.9"
    assert _how(label_N, np.arange(20_000), is_of_row=True) == ""
    assert _how(label_N, binned(label_N, 1.5 * label_N + probability_N), is_of_row=False).startswith("AUC 1.0")
    rare_N = (np.arange(20_000) % 500 == 0).astype(np.float32)
    assert _how(rare_N, generator.integers(2, 600, 20_000), is_of_row=True) == "", "40 orders are in 40 of 600 values"
    areas = [_how(label_N, generator.integers(2, 1000, 20_000), is_of_row=False) for _ in range(20)]
    assert areas == [""] * 20
