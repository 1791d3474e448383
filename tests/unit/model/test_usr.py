"""The whole model: against a row-by-row reference, its switches, and what must hold on every batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn

from tests.unit.random_batches import NO_CL, PLAIN, VECTORS, make_batch, make_config, make_spec, make_tables, rows
from tests.unit.slow_usr import SlowUsr
from usr_ray.config import BACKBONES, Config, ConfigError, ModelConfig
from usr_ray.data.batch import UsrBatch, UsrOutputs
from usr_ray.model.embedding import EmbeddingTables, Lookup
from usr_ray.model.multitask import REST_SHARE
from usr_ray.model.usr import UsrModel
from usr_ray.schema import FeatureSpec, VectorFeature
from usr_ray.training.loss import row_counts, usr_loss

pytestmark = pytest.mark.unit

SWITCHES: Mapping[str, dict] = {
    "all on": {},
    "no IE": {"interest": {"enabled": False}},
    "no FG": {"generator": {"enabled": False}},
    "no GLMT": {"multitask": {"enabled": False}},
    "variant B": {"multitask": {"variant": "B"}},
    "GLMT alone": {**PLAIN, "multitask": {"enabled": True}},
    "plain": PLAIN,
    "no interactions": {"interactions": False},
    "products of each history": {"interaction_histories": "each"},
}


def build(spec: FeatureSpec, config: ModelConfig, *, stirred: bool = True) -> tuple[UsrModel, EmbeddingTables]:
    """A model whose zero-initialised weights have moved too, as after some steps of training."""
    torch.manual_seed(0)
    model, tables = UsrModel(spec, config), make_tables(spec, config.embedding_dim, seed=0)
    if stirred:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
            for table in tables.tables.values():
                table[1:] *= 10
            if model.global_heads is not None:
                model.get_buffer(REST_SHARE).uniform_(0.1, 1)
    return model, tables


def as_double(value: UsrBatch | Lookup) -> UsrBatch | Lookup:
    if isinstance(value, UsrBatch):
        return value.map(lambda t: t.double() if t.is_floating_point() else t)
    tables = {n: dataclasses.replace(t, rows_UD=t.rows_UD.detach().double()) for n, t in value.tables.items()}
    vectors = {name: rows_UP.double() for name, rows_UP in value.vectors.items()}
    return dataclasses.replace(value, tables=tables, vectors=vectors)


def test_one_number_far_from_its_mean_leaves_the_other_rows_their_step() -> None:
    """A row a million deviations out, of 64, has the outputs of one that is 100 out; numbers of log1p have no bound."""
    spec = make_spec()
    price, load = spec.dense
    standard = dataclasses.replace(spec, dense=(dataclasses.replace(price, scale="standard"), load))
    batch = make_batch(standard, 64, seed=1, num_padding=0)

    def gradient(spec: FeatureSpec, *numbers: float) -> tuple[Tensor, float]:
        model, tables = build(spec, make_config(**PLAIN), stirred=False)
        dense_BF = batch.dense_BF.clone()
        dense_BF[7] = torch.tensor(numbers)
        own = dataclasses.replace(batch, dense_BF=dense_BF)
        outputs = model(own, tables.lookup(own))
        usr_loss(outputs, own, row_counts(own, 2, model.config), model.config).total.backward()
        norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
        return outputs.log_p_BT[7].detach(), float(norm)

    for sign in (1, -1):
        (far, far_norm), (at_bound, norm) = gradient(standard, sign * 1e6, 0.5), gradient(standard, sign * 100, 0.5)
        assert torch.equal(far, at_bound)
        assert far_norm == norm
        assert norm < 10, "train.gradient_clip leaves the step whole"
    assert gradient(spec, 1e6, 0.5)[1] > 1e3, "what it was"
    assert not torch.equal(gradient(standard, 0.5, 150.0)[0], gradient(standard, 0.5, 100.0)[0])


class Recorder(nn.Module):
    """Keeps what a module is given, and passes it on."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.seen = inner, None

    def forward(self, inputs):
        self.seen = inputs
        return self.inner(inputs)


@pytest.mark.parametrize("switches", SWITCHES.values(), ids=SWITCHES)
@pytest.mark.parametrize(
    ("num_scenarios", "sides", "vectors"),
    [
        (1, (), ()),
        (2, (), ()),
        (3, (), ()),
        (2, ("brand",), ()),
        (3, ("brand", "kind"), ()),
        (2, (), VECTORS),
        (3, ("brand",), VECTORS[:2]),
    ],
)
@torch.no_grad()
def test_heads_are_given_what_the_formulas_say(
    switches: dict, num_scenarios: int, sides: tuple[str, ...], vectors: tuple[VectorFeature, ...]
) -> None:
    queries = ("search", "feed") if num_scenarios == 3 else ("search",)
    spec = make_spec(num_scenarios, query_scenarios=queries, sides=sides, vectors=vectors)
    config = make_config(**switches)
    model, tables = build(spec, config)
    model.double().eval()
    batch = as_double(make_batch(spec))
    slow = SlowUsr(model, tables, spec)
    model.backbone = Recorder(model.backbone)
    if model.global_heads is not None:
        model.global_heads = Recorder(model.global_heads)
    outputs = model(batch, as_double(tables.lookup(batch)))
    expected = [slow.row(batch, row) for row in range(len(batch))]
    found = [(model.backbone.seen.x_BD, [row.x for row in expected])]
    if model.global_heads is not None:
        found.append((model.global_heads.seen, [row.joined for row in expected]))
    if outputs.interests_BSD is not None:
        found.append((outputs.interests_BSD, [torch.stack(row.i) for row in expected]))
    if outputs.features_BSD is not None:
        found.append((outputs.features_BSD, [torch.stack(row.f_views) for row in expected]))
    for of_rows, of_each in found:
        torch.testing.assert_close(of_rows, torch.stack(of_each), rtol=1e-9, atol=1e-9)
    seen = model.backbone.seen
    e_BE = model.scenario_embedding_SE[batch.scenario_B]
    torch.testing.assert_close(seen.scenario_embedding_BE, e_BE)
    if model.trigger is None:
        context_BC = torch.stack([slow.features(batch, row)[1] for row in range(len(batch))])
        query_BD = torch.stack([slow.query(int(q)) for q in batch.sparse_BF[:, 2]])
        torch.testing.assert_close(seen.trigger_BZ, torch.cat([e_BE, query_BD, context_BC], dim=1))
    else:
        assert torch.equal(seen.trigger_BZ, seen.x_BD[:, -config.trigger_dim :])


def probabilities(outputs: UsrOutputs) -> Tensor:
    parts = [outputs.log_p_BT, outputs.log_not_p_BT]
    if outputs.log_p_global_BT is not None:
        parts += [outputs.log_p_global_BT, outputs.log_not_p_global_BT]
    return torch.cat(parts, dim=1)


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("switches", [{}, PLAIN], ids=["USR", "plain"])
def test_a_row_alone_scores_as_it_does_in_a_batch(backbone: str, switches: dict) -> None:
    spec = make_spec()
    model, tables = build(spec, make_config(backbone=backbone, **switches))
    model.eval()
    batch = make_batch(spec)
    together = probabilities(model(batch, tables.lookup(batch)))
    for row in range(len(batch) - 2):
        alone = rows(batch, [row])
        torch.testing.assert_close(
            probabilities(model(alone, tables.lookup(alone)))[0], together[row], rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("switches", SWITCHES.values(), ids=SWITCHES)
def test_every_parameter_is_saved_and_gets_a_gradient(switches: dict) -> None:
    spec, config = make_spec(), make_config(**switches)
    model, tables = build(spec, config)
    batch = make_batch(spec)
    usr_loss(model(batch, tables.lookup(batch), 1), batch, row_counts(batch, 2, config), config).total.backward()
    saved = model.state_dict()
    for name, parameter in model.named_parameters():
        assert name in saved
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name


@pytest.mark.parametrize("switches", SWITCHES.values(), ids=SWITCHES)
def test_a_batch_of_one_scenario_without_events_leaves_no_parameter_out(switches: dict) -> None:
    """DDP waits for every parameter; an absent scenario's gradient is zero, not missing."""
    spec, config = make_spec(), make_config(**switches)
    model, tables = build(spec, config)
    batch = rows(make_batch(spec, max_length=0), [1, 3, 5])
    usr_loss(model(batch, tables.lookup(batch)), batch, row_counts(batch, 2, config), config).total.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("num_scenarios", range(1, 9))
def test_any_number_of_scenarios_trains(num_scenarios: int) -> None:
    spec, config = make_spec(num_scenarios), make_config()
    model, tables = build(spec, config)
    batch = make_batch(spec, 16)
    outputs = model(batch, tables.lookup(batch))
    assert outputs.interests_BSD.shape == (16, num_scenarios, 4)
    assert (outputs.interests_twin_RSD is None) == (num_scenarios == 1)
    terms = usr_loss(outputs, batch, row_counts(batch, num_scenarios, config), config)
    assert terms.total.isfinite()


def test_views_start_equal_and_features_unscaled() -> None:
    spec = make_spec(3)
    model, tables = build(spec, make_config(), stirred=False)
    batch = make_batch(spec)
    outputs = model.eval()(batch, tables.lookup(batch))
    for view in (1, 2):
        torch.testing.assert_close(outputs.interests_BSD[:, view], outputs.interests_BSD[:, 0])
    slow = SlowUsr(model, tables, spec)
    for row in range(len(batch)):
        f = slow.features(batch, row)[0].float()
        torch.testing.assert_close(outputs.features_BSD[row], f.expand(3, -1))


def test_probabilities_keep_the_order_of_the_labels() -> None:
    spec = make_spec()
    for variant in "AB":
        model, tables = build(spec, make_config(multitask={"variant": variant}))
        batch = make_batch(spec, 64)
        outputs = model.eval()(batch, tables.lookup(batch))
        log_p_BT, log_p_global_BT = outputs.log_p_BT, outputs.log_p_global_BT
        assert (log_p_BT[:, 0] <= log_p_global_BT[:, 0]).all()
        assert (log_p_global_BT[:, 1] <= log_p_global_BT[:, 0]).all()
        # CTCVR of the scenario has two bounds; each variant keeps one of them by construction.
        bound_B = log_p_global_BT[:, 1] if variant == "A" else log_p_BT[:, 0]
        assert (log_p_BT[:, 1] <= bound_B).all()
        torch.testing.assert_close(outputs.log_p_BT.exp() + outputs.log_not_p_BT.exp(), torch.ones(64, 2))


def test_rows_without_a_query_see_past_queries_and_never_the_rows_own() -> None:
    """Changing the search history's query changes the search view of a recommendation row, not its other view."""
    spec = make_spec()
    model, tables = build(spec, make_config(interest={"enabled": False}))
    model.eval()
    batch = make_batch(spec, num_padding=0)
    row = next(b for b in range(1, 12, 2) if batch.histories[0].offsets[b] < batch.histories[0].offsets[b + 1])
    newest = int(batch.histories[0].offsets[row + 1]) - 1
    batch.histories[0].query_ids_V[newest] = 5
    before = model(batch, tables.lookup(batch)).features_BSD
    batch.histories[0].query_ids_V[newest] = 6
    after = model(batch, tables.lookup(batch)).features_BSD
    assert not torch.equal(before[row, 0], after[row, 0])
    assert torch.equal(before[row, 1], after[row, 1])
    others = [b for b in range(12) if b != row]
    assert torch.equal(before[others], after[others])


def test_twins_are_made_in_training_only_and_only_when_they_are_used() -> None:
    spec = make_spec()
    batch = make_batch(spec)

    def made(*, training: bool = True, **switches: object) -> tuple[bool, bool]:
        model, tables = build(spec, make_config(**switches))
        outputs = model.train(training)(batch, tables.lookup(batch), 1)
        return outputs.interests_twin_RSD is not None, outputs.features_kept_RD is not None

    assert made() == (True, True)
    assert made(training=False) == (False, False)
    assert made(contrastive=NO_CL) == (False, False)
    assert made(contrastive={"feature_weight": 0.0}) == (True, False)
    assert made(interest={"enabled": False}) == (False, True)
    assert made(generator={"enabled": False}) == (True, False)
    assert made(**PLAIN) == (False, False)


@pytest.mark.parametrize(("first_group", "taken"), [(0, [*range(4), *range(8, 12)]), (1, [*range(4, 8)])])
def test_the_twins_of_a_share_are_those_that_all_rows_would_have(first_group: int, taken: list[int]) -> None:
    spec = make_spec()
    model, tables = build(spec, make_config())
    share, _ = build(spec, make_config(contrastive={"every_nth_group": 2}))
    share.load_state_dict(model.state_dict())
    batch = dataclasses.replace(make_batch(spec, 12), first_group=first_group)
    every, some = (m(batch, tables.lookup(batch), 9) for m in (model, share))
    torch.testing.assert_close(some.interests_twin_RSD, every.interests_twin_RSD[taken])
    assert torch.equal(some.features_kept_RD, every.features_kept_RD[taken])
    torch.testing.assert_close(some.interests_BSD, every.interests_BSD)
    torch.testing.assert_close(some.features_BSD, every.features_BSD)
    with pytest.raises(ValueError, match="a batch of 11 rows is not of whole groups of 4"):
        share(rows(batch, slice(11)), tables.lookup(rows(batch, slice(11))), 9)


def test_an_interest_twin_equals_the_interest_without_the_masked_events() -> None:
    from usr_ray.model.contrastive import event_mask
    from usr_ray.model.history import list_events

    spec, config = make_spec(), make_config()
    model, tables = build(spec, config)
    batch = make_batch(spec)
    keep_V = event_mask(list_events(batch), batch.row_number_B, 9, config.contrastive.mask_rate)
    assert 0 < int(keep_V.sum()) < len(keep_V)
    twins = model(batch, tables.lookup(batch), 9).interests_twin_RSD
    first, histories = 0, []
    for h in batch.histories:
        keep = keep_V[first : first + len(h.item_ids_V)]
        first += len(h.item_ids_V)
        kept_before = torch.cat([torch.zeros(1, dtype=torch.int64), keep.long().cumsum(0)])
        queries = None if h.query_ids_V is None else h.query_ids_V[keep]
        histories.append(
            dataclasses.replace(
                h,
                item_ids_V=h.item_ids_V[keep],
                actions_V=h.actions_V[keep],
                ages_s_V=h.ages_s_V[keep],
                query_ids_V=queries,
                offsets=kept_before[h.offsets],
            )
        )
    # The trigger still sees all past queries, so compare rows that have a query of their own, or none at all.
    masked = dataclasses.replace(batch, histories=tuple(histories))
    model.trigger.num_recent = 1  # the newest query always stays
    with_all = model(batch, tables.lookup(batch), 9).interests_twin_RSD
    torch.testing.assert_close(
        model.eval()(masked, tables.lookup(masked)).interests_BSD, with_all, rtol=1e-4, atol=1e-5
    )
    own_query = batch.scenario_B == 0
    torch.testing.assert_close(with_all[own_query], twins[own_query])


@pytest.mark.parametrize("backbone", ["shared_bottom", "apg"])
def test_folding_changes_no_output_and_leaves_fewer_parameters(backbone: str) -> None:
    spec = make_spec()
    config = make_config(backbone=backbone, interest={"rank": 2, "over_parameterisation": 9}, apg_rank=2)
    model, tables = build(spec, config)
    batch = make_batch(spec)
    model.eval()
    folded = model.fold()
    torch.testing.assert_close(
        probabilities(folded(batch, tables.lookup(batch))), probabilities(model(batch, tables.lookup(batch)))
    )
    count = {m: sum(p.numel() for p in m.parameters()) for m in (model, folded)}
    assert count[folded] < count[model]
    assert all(name in model.state_dict() for name in UsrModel(spec, config).state_dict()), "the model itself is kept"


@pytest.mark.parametrize("switches", SWITCHES.values(), ids=SWITCHES)
def test_float32_agrees_with_float64(switches: dict) -> None:
    spec = make_spec()
    model, tables = build(spec, make_config(**switches))
    batch = make_batch(spec)
    single = probabilities(model.eval()(batch, tables.lookup(batch)))
    double = probabilities(model.double()(as_double(batch), as_double(tables.lookup(batch))))
    torch.testing.assert_close(single.double(), double, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("switches", SWITCHES.values(), ids=SWITCHES)
def test_bfloat16_autocast_gives_finite_float32_outputs_and_gradients(switches: dict) -> None:
    spec, config = make_spec(), make_config(**switches)
    model, tables = build(spec, config)
    batch = make_batch(spec)
    exact = probabilities(model(batch, tables.lookup(batch), 1))
    lookup = tables.lookup(batch)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = model(batch, lookup, 1)
        terms = usr_loss(outputs, batch, row_counts(batch, 2, config), config)
    terms.total.backward()
    assert terms.total.dtype == outputs.log_p_BT.dtype == outputs.log_not_p_BT.dtype == torch.float32
    torch.testing.assert_close(probabilities(outputs), exact, rtol=0.2, atol=0.2)
    assert all(p.grad.isfinite().all() for p in model.parameters())
    assert all(g.isfinite().all() for _, g in lookup.updates().values())


@pytest.mark.parametrize(
    ("section", "values", "message"),
    [
        ("interest", {"rank": 0}, r"model.interest.rank must be in [\[(][01].*, got 0"),
        (
            "interest",
            {"over_parameterisation": 0},
            r"model.interest.over_parameterisation must be in [\[(][01].*, got 0",
        ),
        (
            "interest",
            {"rank": 9, "over_parameterisation": 5},
            r"over_parameterisation \(5\) must not be below model.interest.rank \(9\): .* lose rank",
        ),
        ("generator", {"hidden": 0}, r"model.generator.hidden must be in [\[(][01].*, got 0"),
        ("multitask", {"alpha": -1.0}, r"model.multitask.alpha must be in [\[(][01].*, got -1.0"),
        (
            "contrastive",
            {"interest_weight": -1.0},
            r"model.contrastive.interest_weight must be in [\[(][01].*, got -1.0",
        ),
        ("contrastive", {"temperature": 0.0}, r"model.contrastive.temperature must be in \[0.002, .*, got 0.0"),
        ("contrastive", {"temperature": 0.001}, r"model.contrastive.temperature must be in \[0.002, .*, got 0.001"),
        ("contrastive", {"group_size": 0}, r"model.contrastive.group_size must be in [\[(][01].*, got 0"),
        ("contrastive", {"mask_rate": 1.0}, r"model.contrastive.mask_rate must be in \(0, 1\), got 1.0"),
    ],
)
def test_values_that_make_no_model_are_refused(section: str, values: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Config.from_dict({"model": {section: values}})


@pytest.mark.parametrize("key", ["embedding_dim", "trigger_dim", "recent_queries"])
def test_sizes_must_be_positive(key: str) -> None:
    with pytest.raises(ConfigError, match=rf"model.{key} must be in \[1, .*\], got 0"):
        Config.from_dict({"model": {key: 0}})
