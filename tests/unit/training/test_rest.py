"""The share of p_g - p_k: by hand, from labels that training counts, and as a run keeps it."""

from __future__ import annotations

import dataclasses
import datetime as dt
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from deltalake import DeltaTable

from tests.unit.random_batches import make_batch, make_spec
from tests.unit.samples_table import FIRST_DATE, samples_spec
from tests.unit.training.test_loop import make_config, run
from usr_ray.config import end_of_us
from usr_ray.data.manifest import Manifest
from usr_ray.model.multitask import global_outputs
from usr_ray.model.usr import UsrModel
from usr_ray.schema import SAMPLES
from usr_ray.training.evaluate import evaluate, load_run
from usr_ray.training.loop import TrainResult
from usr_ray.training.rest import Rest, rest_rates, rest_sums, shares_of
from usr_ray.training.worker import LocalWorker

pytestmark = pytest.mark.integration


@pytest.mark.parametrize("variant", ["A", "B"])
@pytest.mark.parametrize("unknown", [(), ("search",)])
def test_rates_are_those_of_the_rows_and_labels_that_training_counts(
    lake: Path, manifests: tuple[Manifest, Manifest], variant: str, unknown: tuple[str, ...]
) -> None:
    manifest = dataclasses.replace(
        manifests[0], spec=dataclasses.replace(manifests[0].spec, no_order_scenarios=unknown)
    )
    config = make_config(
        data={"train_dates": "2026-01-01:2026-01-03", "final_labels": "clicks"}, model_multitask={"variant": variant}
    )
    cut_off = end_of_us(FIRST_DATE + dt.timedelta(days=2))
    expected = [[0.0, 0.0], [0.0, 0.0]]
    rows = [[0, 0], [0, 0]]
    table = DeltaTable(str(lake / SAMPLES)).to_pyarrow_table()
    times = table["event_time"].cast("int64").to_pylist()
    for row, time_us in zip(table.to_pylist(), times, strict=True):
        for task, wait_h in (("click", 1), ("order", 25)):
            t = int(task == "order")
            k = row["scenario_index"]
            if not row["is_mature"] or time_us + wait_h * 3_600_000_000 > cut_off:
                continue
            if task == "order" and row["scenario"] in unknown:
                continue
            own = 0 if (task == "order" and variant == "B") else row[f"is_{task}"]
            rows[k][t] += 1
            expected[k][t] += row[f"is_{task}_global"] - own
    assert (rows[0][1] == 0) == bool(unknown)
    assert rows[1][1] < rows[1][0]
    wanted = [[(expected[k][t] + 0.5) / (rows[k][t] + 1) for t in range(2)] for k in range(2)]
    if unknown:
        wanted[0][1] = np.nan  # no label says anything
    np.testing.assert_allclose(rest_rates(config, manifest), wanted, rtol=1e-6)


@pytest.mark.parametrize("variant", ["A", "B"])
def test_sums_are_those_of_a_loop_over_the_rows_with_weight(variant: str) -> None:
    spec = make_spec()
    batch = make_batch(spec, 40, seed=3)
    torch.manual_seed(0)
    outputs = global_outputs(torch.randn(len(batch), 2), torch.randn(len(batch), 2), variant)
    assert outputs.log_p_global_BT is not None
    found = rest_sums(outputs, batch, 2, variant)
    assert (batch.weights_B == 0).any()
    expected = torch.zeros(2, 3, dtype=torch.float64)
    for row in range(len(batch)):
        if batch.weights_B[row] > 0:
            k, own, everywhere = (
                int(batch.scenario_B[row]),
                outputs.log_p_BT[row].exp(),
                outputs.log_p_global_BT[row].exp(),
            )
            expected[k] += torch.tensor(
                [1, everywhere[0] - own[0], everywhere[1] - (own[1] if variant == "A" else 0)], dtype=torch.float64
            )
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_shares_of_few_rows_are_mostly_those_of_all_and_without_a_label_they_stay() -> None:
    nan = math.nan
    rates = torch.tensor([[0.1, 0.02], [0.2, nan], [0.4, 0.1]], dtype=torch.float64)
    # rows, then the sums of p_g - p_k
    sums = torch.tensor([[950, 190, 38], [50, 40, 10], [0, 0, 0]], dtype=torch.float64)
    before = torch.tensor([[0.9, 0.9], [0.9, 0.3], [0.9, 0.9]])
    # Clicks: own 950 * 0.1 / 190 = 0.5 and 50 * 0.2 / 40 = 0.25; all (95 + 10) / 230. Orders: own 19 / 38 = all.
    clicks = 105 / 230
    wanted = [[(950 * 0.5 + 50 * clicks) / 1000, 0.5], [(50 * 0.25 + 50 * clicks) / 100, 0.3], [clicks, 0.5]]
    torch.testing.assert_close(shares_of(rates, sums, before), torch.tensor(wanted, dtype=torch.float64))
    nothing = shares_of(rates, torch.zeros(3, 3, dtype=torch.float64), before)
    torch.testing.assert_close(nothing, torch.tensor([[1, 1], [1, 0.3], [1, 1]], dtype=torch.float64))
    above = shares_of(rates, sums * torch.tensor([1, 0.01, 0.01]), before)
    torch.testing.assert_close(above, torch.tensor([[1, 1], [1, 0.3], [1, 1]], dtype=torch.float64))


@pytest.fixture(scope="module", params=[0.0, 0.9], ids=["weights", "averages"])
def trained(
    request: pytest.FixtureRequest, manifests: tuple[Manifest, Manifest], tmp_path_factory: pytest.TempPathFactory
) -> tuple[TrainResult, Path]:
    folder = tmp_path_factory.mktemp("run")
    config = make_config(train_num_epochs=2, train_average=request.param, train_learning_rate=0.002)
    return run(config, manifests, folder), folder


def test_after_few_steps_the_rest_is_what_was_seen_and_the_scenarios_own_probabilities_stay(
    trained: tuple[TrainResult, Path], manifests: tuple[Manifest, Manifest]
) -> None:
    result, _ = trained
    state, worker = result.state, LocalWorker("cpu")
    share_ST = state.module.get_buffer("rest_share_ST")
    found_ST = share_ST.clone()
    assert ((found_ST > 0) & (found_ST < 0.7)).all(), "16 steps leave p_g far too high"
    scored = []
    for shares in (found_ST, torch.ones_like(found_ST)):
        share_ST.copy_(shares)
        with state.averaged():
            scored.append(evaluate(state.module, state.tables, manifests[0], worker, state.config).predictions)
    share_ST.copy_(found_ST)
    with_share, without = scored
    assert with_share is not None
    assert without is not None
    assert np.array_equal(with_share.probs_NT, without.probs_NT)
    rates_ST = rest_rates(state.config, manifests[0])
    for k in range(2):
        of_k = with_share.scenario_N == k
        rest_NT = (with_share.global_probs_NT - with_share.probs_NT)[of_k]
        # Rows that training does not count are among these: they move the mean a little.
        np.testing.assert_allclose(rest_NT.mean(axis=0), rates_ST[k], rtol=0.1)


def test_a_checkpoint_has_the_shares_as_they_are(trained: tuple[TrainResult, Path]) -> None:
    result, folder = trained
    loaded = load_run(folder).module.get_buffer("rest_share_ST")
    assert torch.equal(loaded, result.state.module.get_buffer("rest_share_ST"))


def test_training_does_not_see_the_shares(manifests: tuple[Manifest, Manifest], tmp_path: Path) -> None:
    config = make_config(train_num_epochs=2)
    found = run(config, (manifests[0], None), tmp_path / "fitted")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Rest, "fit", lambda _: None)
        plain = run(config, (manifests[0], None), tmp_path / "plain")
    mine, theirs = found.state.tensors(), plain.state.tensors()
    different = [name for name in mine if not torch.equal(mine[name], theirs[name])]
    assert different == ["model/rest_share_ST"]
    assert torch.equal(theirs["model/rest_share_ST"], torch.ones(2, 2))


def test_weights_of_an_older_version_have_shares_of_one() -> None:
    model = UsrModel(samples_spec(), make_config().model)
    older = {name: value for name, value in model.state_dict().items() if name != "rest_share_ST"}
    model.get_buffer("rest_share_ST").fill_(0.5)
    model.load_state_dict(older)
    assert torch.equal(model.get_buffer("rest_share_ST"), torch.ones(2, 2))
    without = UsrModel(samples_spec(), make_config(model_multitask={"enabled": False}).model)
    without.load_state_dict(without.state_dict())
    assert "rest_share_ST" not in without.state_dict()
