"""The loss: by hand, against loops, and the same however rows are spread over ranks."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.unit.model.test_contrastive import slow_loss
from tests.unit.random_batches import NO_CL, PLAIN, make_batch, make_config, make_spec, rows
from tests.unit.samples_table import FIRST_DATE, samples_spec, write_samples
from usr_ray.data.batch import UsrOutputs
from usr_ray.data.manifest import build_manifest
from usr_ray.data.reader import Reading, SampleReader
from usr_ray.model.embedding import EmbeddingTables
from usr_ray.model.multitask import global_outputs
from usr_ray.model.usr import UsrModel
from usr_ray.schema import OPEN_LABEL
from usr_ray.training.loss import LossTerms, row_counts, usr_loss
from usr_ray.training.rows import training_batches

pytestmark = pytest.mark.unit


def outputs_of(probs: list[list[float]], global_probs: list[list[float]] | None = None) -> UsrOutputs:
    p, g = torch.tensor(probs), None if global_probs is None else torch.tensor(global_probs)
    return UsrOutputs(p.log(), (1 - p).log(), None if g is None else g.log(), None if g is None else (1 - g).log())


def hand_batch():
    """Search, recommendation, search and a row of weight 0 that would spoil every mean."""
    batch = rows(make_batch(make_spec(), 6, max_length=0, num_padding=0), [0, 1, 2, 3])
    return replace(
        batch,
        labels_BT=torch.tensor([[1.0, 0, 1, 1], [0, 0, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1]]),
        weights_B=torch.tensor([1.0, 1, 1, 0]),
    )


def test_each_cell_is_the_mean_over_its_own_rows() -> None:
    probs = [[0.5, 0.2], [0.1, 0.3], [0.25, 0.4], [0.01, 0.01]]
    global_probs = [[0.6, 0.3], [0.7, 0.35], [0.5, 0.45], [0.01, 0.01]]
    batch, config = hand_batch(), make_config(multitask={"alpha": 0.5}, contrastive=NO_CL)
    counts_C = row_counts(batch, 2, config)
    assert counts_C.tolist() == [2, 1, 3], "by scenario, then all"
    terms = usr_loss(outputs_of(probs, global_probs), batch, counts_C, config)
    log = math.log
    cells = [[-(log(0.5) + log(0.75)) / 2, -(log(0.8) + log(0.6)) / 2], [-log(0.9), -log(0.7)]]
    torch.testing.assert_close(terms.cells_ST, torch.tensor(cells))
    overall = [-(log(0.6) + log(0.7) + log(0.5)) / 3, -(log(0.3) + log(0.65) + log(0.55)) / 3]
    torch.testing.assert_close(terms.global_T, torch.tensor(overall))
    assert float(terms.total) == pytest.approx(sum(map(sum, cells)) + 0.5 * sum(overall), rel=1e-5)


def test_weights_by_rows_let_every_row_count_the_same() -> None:
    probs = [[0.5, 0.2], [0.1, 0.3], [0.25, 0.4], [0.01, 0.01]]
    batch, config = hand_batch(), make_config(contrastive=NO_CL, scenario_weights="rows")
    terms = usr_loss(outputs_of(probs), batch, row_counts(batch, 2, config), config)
    log = math.log
    over_rows = -(log(0.5) + log(0.9) + log(0.75) + log(0.8) + log(0.7) + log(0.6)) / 3
    assert float(terms.total) == pytest.approx(2 * over_rows, rel=1e-5), "two scenarios, as with equal weights"
    assert float(terms.cells_ST[1, 0]) == pytest.approx(-log(0.9), rel=1e-5), "what is logged stays a cell's own mean"


def test_a_label_that_no_log_knows_is_neither_a_row_nor_a_zero() -> None:
    """Recommendation knows no orders: no CTCVR cell of it, and a global CTCVR over the search rows alone."""
    probs = [[0.5, 0.2], [0.1, 0.3], [0.25, 0.4], [0.01, 0.01]]
    global_probs = [[0.6, 0.3], [0.7, 0.35], [0.5, 0.45], [0.01, 0.01]]
    batch, config = hand_batch(), make_config(multitask={"alpha": 0.5}, contrastive=NO_CL)
    counts_C, known = row_counts(batch, 2, config), ((True, True), (True, False))
    terms = usr_loss(outputs_of(probs, global_probs), batch, counts_C, config, known_labels=known)
    log = math.log
    cells = [[-(log(0.5) + log(0.75)) / 2, -(log(0.8) + log(0.6)) / 2], [-log(0.9), 0]]
    torch.testing.assert_close(terms.cells_ST, torch.tensor(cells))
    overall = [-(log(0.6) + log(0.7) + log(0.5)) / 3, -(log(0.3) + log(0.55)) / 2]
    torch.testing.assert_close(terms.global_T, torch.tensor(overall))
    assert float(terms.total) == pytest.approx(sum(map(sum, cells)) + 0.5 * sum(overall), rel=1e-5)
    rows = {name: int(rows) for name, (_, rows) in terms.by_row(("search", "recommendation")).items()}
    assert rows["loss/recommendation/ctcvr"] == 0, "it has no loss, not one of 0"
    assert (rows["loss/recommendation/ctr"], rows["loss/global/ctr"], rows["loss/global/ctcvr"]) == (1, 3, 2)


def test_an_open_order_teaches_nothing_and_its_click_teaches_as_before() -> None:
    """The third row's clicks are final and its orders are not (data.final_labels = "clicks")."""
    probs = [[0.5, 0.2], [0.1, 0.3], [0.25, 0.4], [0.01, 0.01]]
    global_probs = [[0.6, 0.3], [0.7, 0.35], [0.5, 0.45], [0.01, 0.01]]
    batch, config = hand_batch(), make_config(multitask={"alpha": 0.5}, contrastive=NO_CL)
    batch.labels_BT[2] = torch.tensor([0, OPEN_LABEL, 0, OPEN_LABEL])
    outputs = outputs_of(probs, global_probs)
    outputs.log_p_BT.requires_grad_()
    terms = usr_loss(outputs, batch, row_counts(batch, 2, config), config)
    log = math.log
    cells = [[-(log(0.5) + log(0.75)) / 2, -log(0.8) / 2], [-log(0.9), -log(0.7)]]
    torch.testing.assert_close(terms.cells_ST, torch.tensor(cells))
    overall = [-(log(0.6) + log(0.7) + log(0.5)) / 3, -(log(0.3) + log(0.65)) / 3]
    torch.testing.assert_close(terms.global_T, torch.tensor(overall))
    assert float(terms.total.detach()) == pytest.approx(sum(map(sum, cells)) + 0.5 * sum(overall), rel=1e-5)
    by_row = {name: (float(bce), int(n)) for name, (bce, n) in terms.by_row(("search", "recommendation")).items()}
    assert by_row["loss/search/ctr"] == (pytest.approx(-log(0.5) - log(0.75), rel=1e-5), 2)
    assert by_row["loss/search/ctcvr"] == (pytest.approx(-log(0.8), rel=1e-5), 1), "what is logged is the known row's"
    assert by_row["loss/global/ctcvr"] == (pytest.approx(-log(0.3) - log(0.65), rel=1e-5), 2)
    batch.labels_BT[0] = torch.tensor([1, OPEN_LABEL, 1, OPEN_LABEL])
    usr_loss(outputs, batch, row_counts(batch, 2, config), config).total.backward()
    assert outputs.log_p_BT.grad is not None
    assert outputs.log_p_BT.grad[[0, 2], 1].tolist() == [0, 0]
    assert outputs.log_p_BT.grad[0, 0] != 0


def test_nothing_the_model_says_of_an_unknown_label_moves_it() -> None:
    batch, config, known = hand_batch(), make_config(contrastive=NO_CL), ((True, True), (True, False))
    logits_BT, global_BT = torch.zeros(4, 2, requires_grad=True), torch.zeros(4, 2, requires_grad=True)
    outputs = global_outputs(logits_BT, global_BT, "B")
    usr_loss(outputs, batch, row_counts(batch, 2, config), config, known_labels=known).total.backward()
    assert logits_BT.grad is not None
    assert global_BT.grad is not None
    assert logits_BT.grad[1, 1] == 0, "b_k of the masked row"
    assert global_BT.grad[1, 1] == 0, "b_g of the masked row"
    assert (logits_BT.grad[[0, 2]] != 0).all()
    assert logits_BT.grad[1, 0] != 0, "its click still teaches"


def test_no_scenario_with_orders_leaves_clicks_alone_in_the_loss() -> None:
    batch, config, known = hand_batch(), make_config(contrastive=NO_CL), ((True, False), (True, False))
    global_probs = [[0.6, 0.3], [0.7, 0.35], [0.5, 0.45], [0.01, 0.01]]
    terms = usr_loss(
        outputs_of([[0.5, 0.2]] * 4, global_probs),
        batch,
        row_counts(batch, 2, config),
        config,
        known_labels=known,
    )
    assert terms.cells_ST[:, 1].tolist() == [0, 0]
    assert terms.global_T[1] == 0
    assert terms.total.isfinite()


def test_without_glmt_there_is_no_global_term() -> None:
    batch = hand_batch()
    config = make_config(contrastive=NO_CL)
    terms = usr_loss(outputs_of([[0.5, 0.2]] * 4), batch, row_counts(batch, 2, config), config)
    assert terms.global_T.tolist() == [0, 0]
    assert terms.global_rows_T.tolist() == [0, 0]
    torch.testing.assert_close(terms.total, terms.cells_ST.sum())


def test_a_scenario_absent_everywhere_adds_nothing() -> None:
    batch = hand_batch()
    config = make_config()
    counts_C = row_counts(batch, 3, config)
    assert counts_C.tolist() == [2, 1, 0, 3]
    terms = usr_loss(outputs_of([[0.5, 0.2]] * 4), batch, counts_C, config)
    assert terms.cells_ST[2].tolist() == [0, 0]
    assert terms.total.isfinite()


def step(model: UsrModel, tables: EmbeddingTables, batch, counts_C, config, known=None) -> tuple[LossTerms, dict, dict]:
    """Loss terms and gradients of one rank."""
    model.zero_grad()
    lookup = tables.lookup(batch)
    terms = usr_loss(model(batch, lookup, 11), batch, counts_C, config, known_labels=known)
    terms.total.backward()
    dense = {n: p.grad.clone() for n, p in model.named_parameters()}
    sparse = {n: torch.zeros_like(t).index_add(0, *lookup.updates()[n]) for n, t in tables.tables.items()}
    return terms, dense, sparse


@pytest.mark.parametrize("cuts", [[8], [4, 16]], ids=["two ranks", "three ranks"])
@pytest.mark.parametrize(
    ("switches", "unknown"),
    [
        ({}, ()),
        ({"multitask": {"variant": "B"}}, ()),
        (PLAIN, ()),
        ({}, ("search",)),
        ({"contrastive": {"every_nth_group": 2}}, ()),
        ({"contrastive": {"every_nth_group": 9}}, ()),
    ],
    ids=["USR", "variant B", "plain", "search knows no orders", "every second group", "the first group alone"],
)
def test_shares_of_ranks_add_up_to_the_loss_and_gradients_of_one(
    cuts: list[int], switches: dict, unknown: tuple[str, ...]
) -> None:
    spec, config = replace(make_spec(), no_order_scenarios=unknown), make_config(**switches)
    batch = make_batch(spec, 20, num_padding=3)
    torch.manual_seed(0)
    model, tables = UsrModel(spec, config), EmbeddingTables(spec, 4, seed=0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
        for table in tables.tables.values():
            table[1:] *= 10
    edges = [0, *cuts, 20]
    parts = [replace(rows(batch, slice(a, b)), first_group=a // 4) for a, b in itertools.pairwise(edges)]
    counts_C = row_counts(batch, 2, config)
    assert torch.equal(sum(row_counts(p, 2, config) for p in parts), counts_C)
    whole_terms, *whole_grads = step(model, tables, batch, counts_C, config, spec.known_labels)
    shares = [step(model, tables, part, counts_C, config, spec.known_labels) for part in parts]
    for name, value in whole_terms.named(spec.scenarios).items():
        found = sum(s[0].named(spec.scenarios)[name] for s in shares)
        torch.testing.assert_close(found, value, rtol=1e-4, atol=1e-6)
    for name, pair in whole_terms.by_row(spec.scenarios).items():
        found = sum(torch.stack(s[0].by_row(spec.scenarios)[name]) for s in shares)
        torch.testing.assert_close(found, torch.stack(pair), rtol=1e-4, atol=1e-6)
    for number, grads in enumerate(whole_grads, start=1):
        for name, grad in grads.items():
            torch.testing.assert_close(sum(s[number][name] for s in shares), grad, rtol=1e-3, atol=1e-6)
    assert (whole_terms.cells_ST[0, 1] == 0) == bool(unknown)
    if not switches or "contrastive" in switches:
        assert whole_terms.contrastive_interest > 0
        assert whole_terms.contrastive_feature > 0
        assert 0 < whole_terms.variance_interest_S.min() <= whole_terms.variance_interest_S.max() < 1


@pytest.mark.parametrize(
    ("every_nth", "first_group", "taken"),
    [(1, 0, range(8)), (2, 0, range(4)), (2, 1, range(4, 8)), (3, 2, range(4, 8)), (4, 1, range(0))],
)
def test_contrastive_terms_are_means_over_the_rows_that_take_part_and_views(
    every_nth: int, first_group: int, taken: range
) -> None:
    torch.manual_seed(0)
    config = make_config(contrastive={"every_nth_group": every_nth})
    batch = replace(make_batch(make_spec(), 8, num_padding=1), first_group=first_group)
    vectors, kept = [torch.randn(8, 2, 3) for _ in range(3)], (torch.rand(8, 3) < 0.7).float()
    outputs = replace(
        outputs_of([[0.5, 0.5]] * 8),
        interests_BSD=vectors[0],
        interests_twin_RSD=vectors[1][taken] if taken else None,
        features_BSD=vectors[2],
        features_kept_RD=kept[taken] if taken else None,
    )
    counts_C = row_counts(batch, 2, config)
    num_counted = len(set(taken) & set(range(7)))
    assert float(counts_C[-1]) == num_counted
    terms = usr_loss(outputs, batch, counts_C, config)
    lengths_B = sum(h.offsets.diff() for h in batch.histories)
    with_events = ((lengths_B > 0) & (batch.weights_B > 0)).tolist()
    assert with_events.count(True) < 7, "row 0 has no events"
    takes_part = [row in taken for row in range(8)]
    with_events = [a and b for a, b in zip(with_events, takes_part, strict=True)]
    counted = [a and b for a, b in zip((batch.weights_B > 0).tolist(), takes_part, strict=True)]
    users = batch.user_key_B.tolist()
    tau, group = config.contrastive.temperature, config.contrastive.group_size
    # Rows without events are no anchors of CL(i), but count in the mean; padding counts in neither.
    interest = slow_loss(vectors[0], vectors[1], with_events, users, group, tau) / (max(num_counted, 1) * 2)
    feature = slow_loss(vectors[2], vectors[2] * kept.unsqueeze(1), counted, users, group, tau) / (
        max(num_counted, 1) * 2
    )
    assert float(terms.contrastive_interest) == pytest.approx(interest, rel=1e-4)
    assert float(terms.contrastive_feature) == pytest.approx(feature, rel=1e-4)
    cells = float(terms.cells_ST.sum())
    assert float(terms.total) == pytest.approx(cells + 0.3 * interest + 0.2 * feature, rel=1e-4)


def test_terms_have_names_for_every_scenario_and_task() -> None:
    batch = hand_batch()
    config = make_config()
    terms = usr_loss(outputs_of([[0.5, 0.2]] * 4), batch, row_counts(batch, 2, config), config)
    named, by_row = terms.named(("search", "recommendation")), terms.by_row(("search", "recommendation"))
    for name in ("loss/search/ctr", "loss/recommendation/ctcvr", "loss/global/ctr"):
        assert name in by_row
    for name in (
        "loss",
        "contrastive/interest",
        "contrastive/feature",
        "variance/interest/search",
        "variance/feature/recommendation",
    ):
        assert name in named
    values = [*named.values(), *(part for parts in by_row.values() for part in parts)]
    assert all(value.shape == () and not value.requires_grad for value in values)


def test_rows_without_weight_are_left_out_or_have_no_ids(tmp_path: Path) -> None:
    """Those of another scenario here: no step is to decay their ids. A batch of them alone becomes a row of padding."""
    write_samples(tmp_path, samples_spec(), num_rows=60, num_days=1)
    manifest = build_manifest(tmp_path, dates=(FIRST_DATE, FIRST_DATE))
    tables = EmbeddingTables(manifest.spec, 4, seed=0)
    reading = Reading(global_batch_size=8, group_size=4, order="file", only_scenario="search", mature_only=False)
    with SampleReader(manifest, reading) as reader:
        whole, own = (
            [
                batch
                for (batch, _), _ in training_batches(
                    reader,
                    tables,
                    epochs=range(1),
                    start_step=0,
                    config=make_config(),
                    of_a_size=of_a_size,
                )
            ]
            for of_a_size in (True, False)
        )
    assert [len(batch) for batch in whole] == [8] * len(whole)
    for padded, left in zip(whole, own, strict=True):
        counted_B = padded.weights_B > 0
        assert 0 < counted_B.sum() < 8
        assert torch.equal(left.row_number_B, padded.row_number_B[counted_B])
        assert torch.equal(left.sparse_BF, padded.sparse_BF[counted_B])
        lengths_B = padded.histories[0].offsets.diff()[counted_B]
        assert torch.equal(left.histories[0].offsets.diff(), lengths_B)
        assert left.weights_B.all()
        assert not padded.sparse_BF[~counted_B].any()
        for history in padded.histories:
            is_out_V = (~counted_B).repeat_interleave(history.offsets.diff())
            assert not history.item_ids_V[is_out_V].any()
            assert history.item_ids_V[~is_out_V].all()
    nobody = replace(whole[0], weights_B=torch.zeros(8))
    one = SimpleNamespace(reading=reading, manifest=manifest, batches=lambda *_, **__: iter([nobody]))
    (((left, _), counts_C),) = training_batches(
        one, tables, epochs=range(1), start_step=0, config=make_config(), of_a_size=False
    )
    assert (left.weights_B.tolist(), counts_C.tolist()) == ([0.0], [0.0, 0.0, 0.0])
    assert left.row_number_B.tolist() == [-1]
    assert not left.sparse_BF.any(), "padding: the step decays no row of a table"
