"""Row-wise Adagrad, the exchange and AdamW against slow plain references, on one rank and on two."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.unit.random_batches import make_config, make_spec
from tests.unit.two_ranks import run_ranks
from usr_ray.config import TrainConfig
from usr_ray.model.usr import UsrModel
from usr_ray.training.optimizers import (
    ROW_OPTIMIZERS,
    DenseAdamW,
    RowwiseAdagrad,
    RowwiseAdam,
    Update,
    exchange_tables,
    rate_scale,
    replica_hash,
    sum_by_id,
    sum_in_place,
)
from usr_ray.training.worker import LocalWorker

pytestmark = pytest.mark.unit

NUM_ROWS, DIM, BATCH, STEPS = 9, 3, 8, 6
RATE, EPS, DECAY = 0.1, 1e-6, 0.01


def start_tables() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {name: torch.randn(NUM_ROWS, DIM, generator=generator) for name in ("item", "user")}


def global_batch(step: int) -> dict[str, torch.Tensor]:
    """Row ids of each table with many doubles, padding among them, and a target for each row."""
    generator = torch.Generator().manual_seed(100 + step)
    ids = {name: torch.randint(0, NUM_ROWS, (BATCH,), generator=generator) for name in ("item", "user")}
    return ids | {"target": torch.randn(BATCH, DIM, generator=generator)}


def rows_of_rank(step: int, rank: int, world_size: int) -> slice:
    if world_size == 1:
        return slice(0, BATCH)
    # Step 2 gives rank 1 no rows at all, step 3 gives rank 0 none.
    middle = {2: BATCH, 3: 0}.get(step, BATCH // 2)
    return slice(0, middle) if rank == 0 else slice(middle, BATCH)


def train_tables(worker: LocalWorker, folder: Path, kind: str = "rowwise_adagrad") -> dict[str, torch.Tensor]:
    """Six steps on loss = sum over the global batch of |item + 2 user - target|^2 / BATCH."""
    tables = start_tables()
    optimizer = ROW_OPTIMIZERS[kind](tables, learning_rate=RATE, eps=EPS, weight_decay=DECAY)
    for step in range(STEPS):
        mine = rows_of_rank(step, worker.rank, worker.world_size)
        batch = {name: tensor[mine] for name, tensor in global_batch(step).items()}
        updates = {}
        rows: dict[str, torch.Tensor] = {}
        inverse: dict[str, torch.Tensor] = {}
        unique: dict[str, torch.Tensor] = {}
        for name in tables:
            unique[name], inverse[name] = torch.unique(batch[name], return_inverse=True)
            rows[name] = tables[name][unique[name]].requires_grad_()
        error = rows["item"][inverse["item"]] + 2 * rows["user"][inverse["user"]] - batch["target"]
        (error.square().sum() / BATCH).backward()
        for name in tables:
            gradient = rows[name].grad
            assert gradient is not None
            updates[name] = (unique[name], gradient)
        optimizer.step(exchange_tables(worker, updates))
    hashes = torch.tensor([replica_hash(tables), replica_hash(optimizer.state_tensors())])
    return tables | {f"sum_{n}": t for n, t in optimizer.state_tensors().items()} | {"hashes": hashes}


def dense_reference(kind: str) -> dict[str, torch.Tensor]:
    """The same six steps on whole tables in float64: autograd's dense gradients, rows of the batch chosen by a mask.

    Names as `train_tables` gives them.
    """
    tables = {name: table.double() for name, table in start_tables().items()}
    zeros = {n: torch.zeros(NUM_ROWS, dtype=torch.float64) for n in tables}
    sums, first, second, count = ({n: z.clone() for n, z in zeros.items()} for _ in range(4))
    first = {n: torch.zeros_like(t) for n, t in tables.items()}
    for step in range(STEPS):
        batch = global_batch(step)
        leaves = {n: t.clone().requires_grad_() for n, t in tables.items()}
        error = leaves["item"][batch["item"]] + 2 * leaves["user"][batch["user"]] - batch["target"].double()
        (error.square().sum() / BATCH).backward()
        for n in ("item", "user"):
            used = torch.zeros(NUM_ROWS, dtype=torch.bool)
            used[batch[n]] = True
            used[0] = False
            dense = leaves[n].grad
            assert dense is not None
            g = dense + DECAY * tables[n]
            mean_square = (g * g).sum(1) / DIM
            if kind == "rowwise_adagrad":
                sums[n] = torch.where(used, sums[n] + mean_square, sums[n])
                moved = tables[n] - RATE * g / (sums[n].sqrt() + EPS)[:, None]
            else:
                count[n] = torch.where(used, count[n] + 1, count[n])
                first[n] = torch.where(used[:, None], 0.9 * first[n] + 0.1 * g, first[n])
                second[n] = torch.where(used, 0.999 * second[n] + 0.001 * mean_square, second[n])
                mean = first[n] / (1 - 0.9 ** count[n])[:, None]
                moved = tables[n] - RATE * mean / ((second[n] / (1 - 0.999 ** count[n])).sqrt() + EPS)[:, None]
            tables[n] = torch.where(used[:, None], moved, tables[n])
    if kind == "rowwise_adagrad":
        return tables | {f"sum_{n}": sums[n] for n in tables}
    parts = {"first": first, "second": second, "count": count}
    return tables | {f"sum_{n}/{part}": t[n] for part, t in parts.items() for n in tables}


@pytest.mark.integration
@pytest.mark.parametrize("kind", ["rowwise_adagrad", "rowwise_adam"])
def test_one_and_two_ranks_take_the_steps_of_the_dense_reference(tmp_path: Path, kind: str) -> None:
    expected = dense_reference(kind)
    alone = train_tables(LocalWorker("cpu"), tmp_path, kind)
    first, second = run_ranks(functools.partial(train_tables, kind=kind), 2, tmp_path)
    for got in (alone, first, second):
        assert set(got) == {*expected, "hashes"}
        for name, tensor in expected.items():
            torch.testing.assert_close(got[name].double(), tensor, rtol=1e-5, atol=1e-6)
        for name, table in start_tables().items():
            assert torch.equal(got[name][0], table[0]), "padding must never move"
    for name in first:
        assert torch.equal(first[name], second[name]), f"replicas of {name} drifted apart"


def test_adam_corrects_its_bias_by_the_steps_of_the_row() -> None:
    """A first step is the learning rate times g / rms(g), at whatever step of the run the row is first seen."""
    table = torch.zeros(4, 2)
    optimizer = RowwiseAdam({"t": table}, learning_rate=0.5, eps=0.0)
    g = torch.tensor([[3.0, 4.0]])
    first_step = -0.5 * g[0] / math.sqrt((9 + 16) / 2)
    for _ in range(50):
        optimizer.step({"t": (torch.tensor([1]), g)})
    optimizer.step({"t": (torch.tensor([2]), g)})
    torch.testing.assert_close(table[2], first_step)
    assert optimizer.counts["t"].tolist() == [0, 50, 1, 0]
    # Equal gradients leave both corrected moments as they are: each of the 50 steps was of that size.
    torch.testing.assert_close(table[1], 50 * first_step, rtol=1e-4, atol=0.0)


class FakeRanks:
    """Rank 0 of a world whose other ranks always send the same rows."""

    def __init__(self, *others: torch.Tensor) -> None:
        self.world_size = 1 + len(others)
        self.others = others

    def all_gather_rows(self, rows: torch.Tensor) -> torch.Tensor:
        others = [o for o in self.others if o.dtype == rows.dtype]
        return torch.cat([rows, *others])


def test_exchange_sums_what_ranks_share_and_keeps_the_rest() -> None:
    worker = FakeRanks(torch.tensor([5, 2]), torch.tensor([[10.0], [20.0]]))
    ids, grads = exchange_tables(worker, {"t": (torch.tensor([2, 7]), torch.tensor([[1.0], [2.0]]))})["t"]
    assert ids.tolist() == [2, 5, 7]
    assert grads.tolist() == [[21.0], [10.0], [2.0]]


def test_exchange_of_nothing_on_every_rank_is_nothing() -> None:
    nothing = torch.zeros(0, dtype=torch.int64)
    ids, grads = exchange_tables(FakeRanks(nothing), {"t": (nothing, torch.zeros(0, 4))})["t"]
    assert (ids.shape, grads.shape) == ((0,), (0, 4))


def test_exchange_on_one_rank_hands_back_its_arguments() -> None:
    ids, grads = torch.tensor([3, 1]), torch.ones(2, 2)
    back = exchange_tables(FakeRanks(), {"t": (ids, grads)})["t"]
    assert back[0] is ids
    assert back[1] is grads


def test_doubled_ids_are_summed_in_the_order_they_stand_in() -> None:
    # In float32, (1e8 + 1) - 1e8 is 0 but (1e8 - 1e8) + 1 is 1: the order shows in the result.
    ids = torch.tensor([4, 9, 4, 4, 9])
    grads = torch.tensor([[1e8], [1e8], [1.0], [-1e8], [-1e8]])
    assert sum_by_id(ids, grads)[0].tolist() == [4, 9]
    assert sum_by_id(ids, grads)[1].tolist() == [[0.0], [0.0]]
    assert sum_by_id(ids[[0, 3, 2]], grads[[0, 3, 2]])[1].tolist() == [[1.0]]


def test_tables_of_one_exchange_do_not_mix() -> None:
    worker = FakeRanks(torch.tensor([1, (1 << 48) + 1]), torch.tensor([[100.0], [1000.0]]))
    updates: Mapping[str, Update] = {
        "b": (torch.tensor([1, 3]), torch.tensor([[3.0], [4.0]])),
        "a": (torch.tensor([1]), torch.tensor([[2.0]])),
    }
    out = exchange_tables(worker, updates)
    assert out["a"][0].tolist() == [1]
    assert out["a"][1].tolist() == [[102.0]]
    assert out["b"][0].tolist() == [1, 3]
    assert out["b"][1].tolist() == [[1003.0], [4.0]]


def test_the_sum_that_a_gpu_need_not_wait_for_gives_every_row_the_same_bits() -> None:
    g = torch.Generator().manual_seed(2)
    ids = torch.randint(0, 6, (40,), generator=g) + (torch.randint(0, 3, (40,), generator=g) << 48)
    grads = torch.randn(40, DIM, generator=g) * 1e4
    expected_ids, expected = sum_by_id(ids, grads)
    got_ids, got = sum_in_place(ids, grads)
    assert got_ids.shape == ids.shape
    is_row = got_ids % (1 << 48) != 0
    wanted = expected_ids % (1 << 48) != 0
    assert torch.equal(got_ids[is_row], expected_ids[wanted])
    assert torch.equal(got[is_row], expected[wanted])
    # Every place stays in its table's span, so that the tables can be cut apart by what the ranks sent.
    assert torch.equal(got_ids >> 48, ids.sort().values >> 48)
    empty_ids, empty = sum_in_place(ids[:0], grads[:0])
    assert (empty_ids.shape, empty.shape) == ((0,), (0, DIM))


@pytest.mark.parametrize("kind", ["rowwise_adagrad", "rowwise_adam"])
def test_the_exchange_and_the_step_ask_a_gpu_for_nothing(kind: str) -> None:
    """On meta tensors, which have no values: whatever the host would wait for fails."""
    with torch.device("meta"):
        ids, grads = sum_in_place(torch.zeros(40, dtype=torch.int64), torch.zeros(40, DIM))
        assert (ids.shape, grads.shape) == ((40,), (40, DIM))
        table = torch.zeros(NUM_ROWS, DIM)
    optimizer = ROW_OPTIMIZERS[kind]({"t": table}, learning_rate=0.1, weight_decay=DECAY)
    optimizer.step({"t": (ids[3:9], grads[3:9])}, scale=0.5)


@pytest.mark.parametrize("kind", ["rowwise_adagrad", "rowwise_adam"])
def test_padding_ids_in_an_update_change_nothing(kind: str) -> None:
    plain, padded = (ROW_OPTIMIZERS[kind](start_tables(), learning_rate=0.1, weight_decay=DECAY) for _ in range(2))
    for _ in range(2):
        plain.step({"item": (torch.tensor([2, 4]), torch.ones(2, DIM))})
        padded.step({"item": (torch.tensor([0, 2, 0, 4, 0]), torch.ones(5, DIM))})
    for name in plain.weights:
        assert torch.equal(plain.weights[name], padded.weights[name])
    for name, tensor in plain.state_tensors().items():
        assert torch.equal(tensor, padded.state_tensors()[name])


def test_a_step_neither_reads_nor_writes_rows_it_was_not_given() -> None:
    table = torch.full((5, 2), float("nan"))
    table[3] = 1.0
    optimizer = RowwiseAdagrad({"t": table}, learning_rate=0.5, eps=0.0)
    optimizer.step({"t": (torch.tensor([3]), torch.tensor([[3.0, 4.0]]))})
    root = math.sqrt((9 + 16) / 2)
    torch.testing.assert_close(table[3], torch.tensor([1 - 0.5 * 3 / root, 1 - 0.5 * 4 / root]))
    assert table[[0, 1, 2, 4]].isnan().all()
    assert optimizer.accumulators["t"].tolist() == [0, 0, 0, 12.5, 0]


@pytest.mark.parametrize("kind", ["rowwise_adagrad", "rowwise_adam"])
def test_rowwise_state_survives_a_checkpoint_bit_for_bit(kind: str) -> None:
    first = ROW_OPTIMIZERS[kind](start_tables(), learning_rate=0.1)
    update = {"item": (torch.tensor([2, 4]), torch.ones(2, DIM)), "user": (torch.tensor([1]), torch.ones(1, DIM))}
    first.step(update)
    second = ROW_OPTIMIZERS[kind]({n: w.clone() for n, w in first.weights.items()}, learning_rate=0.1)
    second.load_state_tensors({n: t.clone() for n, t in first.state_tensors().items()})
    first.step(update)
    second.step(update)
    for name in first.weights:
        assert torch.equal(first.weights[name], second.weights[name])
    for name, tensor in first.state_tensors().items():
        assert torch.equal(tensor, second.state_tensors()[name])


def dense_model() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))


def dense_loss(model: nn.Module, step: int) -> torch.Tensor:
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(step))
    return model(x).square().sum()


def test_adamw_takes_the_step_of_its_formula() -> None:
    """Step 0 under warm-up: moments are (1-b) g, bias correction undoes it, so w moves by scale * rate * sign(g)."""
    config = TrainConfig(learning_rate=0.01, weight_decay=0.5, gradient_clip=0.0, warmup_steps=4)
    model = dense_model()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = DenseAdamW(model, config)
    dense_loss(model, 0).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    norm = optimizer.step(scale=rate_scale(0, config, 10))
    rate = 0.01 / 4
    for name, parameter in model.named_parameters():
        decay = 0.5 if parameter.dim() > 1 else 0.0
        g = gradients[name]
        expected = before[name] * (1 - rate * decay) - rate * g / (g.abs() + 1e-8)
        torch.testing.assert_close(parameter.detach(), expected)
    torch.testing.assert_close(norm, torch.sqrt(sum(g.square().sum() for g in gradients.values())))  # type: ignore[arg-type]


SPARED = {
    "shared_bottom": {"backbone.towers.towers.biases_N1O.0", "backbone.towers.towers.biases_N1O.1"},
    "mmoe": {f"backbone.{part}.biases_N1O.{n}" for part in ("experts", "towers.towers") for n in (0, 1)},
    "m2m": {f"backbone.experts.biases_N1O.{n}" for n in (0, 1)},
    "apg": set(),
    "star": {"backbone.normalisation.gamma_SI", "backbone.normalisation.beta_SI"}
    | {
        f"backbone.{part}.layers.{n}.{name}"
        for part in ("bottom", "towers")
        for n in (0, 1)
        for name in ("bias_NO", "bias_SNO", "weight_SNIO")
    },
}
"""Parameters with more than one axis that are biases, norms or factors which begin at 1 (STAR, arXiv 2101.11427)."""


@pytest.mark.parametrize("backbone", SPARED)
def test_a_step_without_gradients_leaves_biases_norms_and_scenario_factors_as_they_are(backbone: str) -> None:
    """What a scenario without rows meets: only weights, which multiply activations, shrink by rate x decay."""
    model = UsrModel(make_spec(), make_config(backbone=backbone))
    for parameter in model.parameters():
        nn.init.constant_(parameter, 2.0)
        parameter.grad = torch.zeros_like(parameter)
    DenseAdamW(model, TrainConfig(learning_rate=0.1, weight_decay=0.5)).step()
    kept = {name for name, p in model.named_parameters() if bool((p == 2.0).all())}
    vectors = {name for name, p in model.named_parameters() if p.dim() <= 1}
    assert kept == vectors | SPARED[backbone]
    for name, parameter in model.named_parameters():
        if name not in kept:
            torch.testing.assert_close(parameter.detach(), torch.full_like(parameter, 2.0 * (1 - 0.1 * 0.5)))


def test_clipping_scales_all_gradients_to_the_bound() -> None:
    model = dense_model()
    optimizer = DenseAdamW(model, TrainConfig(gradient_clip=0.5))
    (100 * dense_loss(model, 0)).backward()
    assert optimizer.step() > 0.5
    norm = torch.sqrt(torch.stack([p.grad.square().sum() for p in model.parameters() if p.grad is not None]).sum())
    torch.testing.assert_close(norm, torch.tensor(0.5))


def test_adamw_state_survives_a_checkpoint_bit_for_bit() -> None:
    config = TrainConfig(learning_rate=0.05)

    def run(model: nn.Module, optimizer: DenseAdamW, steps: range) -> None:
        for step in steps:
            optimizer.zero_grad()
            dense_loss(model, step).backward()
            optimizer.step()

    model = dense_model()
    optimizer = DenseAdamW(model, config)
    run(model, optimizer, range(3))
    resumed = dense_model()
    resumed.load_state_dict({name: t.clone() for name, t in model.state_dict().items()})
    resumed_optimizer = DenseAdamW(resumed, config)
    resumed_optimizer.load_state_tensors({name: t.clone() for name, t in optimizer.state_tensors().items()})
    run(model, optimizer, range(3, 6))
    run(resumed, resumed_optimizer, range(3, 6))
    for mine, theirs in zip(model.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("none", {0: 0.25, 1: 0.5, 3: 1.0, 4: 1.0, 99: 1.0}),
        # 8 steps after the warm-up: step 6 has gone 2 of them, step 8 half the way.
        ("linear", {0: 0.25, 3: 1.0, 4: 1.0, 6: 0.75, 8: 0.5, 11: 0.125, 12: 0.0, 13: 0.0}),
        ("cosine", {0: 0.25, 3: 1.0, 4: 1.0, 6: (1 + 0.5**0.5) / 2, 8: 0.5, 10: (1 - 0.5**0.5) / 2, 12: 0.0, 13: 0.0}),
    ],
)
def test_rates_rise_in_the_warm_up_and_fall_by_the_schedule(schedule: str, expected: dict[int, float]) -> None:
    config = TrainConfig(warmup_steps=4, schedule=schedule)
    assert {step: rate_scale(step, config, 12) for step in expected} == pytest.approx(expected)
    assert rate_scale(0, TrainConfig(schedule=schedule), 12) == 1.0


def test_the_replica_hash_sees_every_bit() -> None:
    tensors = {"w": torch.randn(50, 3), "half": torch.randn(7).bfloat16(), "empty": torch.zeros(0)}
    start = replica_hash(tensors)
    assert replica_hash(dict(reversed(tensors.items()))) == start
    seen = {start}
    for row in range(50):
        changed = tensors["w"].clone()
        changed[row, row % 3] = torch.nextafter(changed[row, row % 3], torch.tensor(9.0))
        seen.add(replica_hash(tensors | {"w": changed}))
    swapped = tensors["w"][[1, 0, *range(2, 50)]]
    seen.add(replica_hash(tensors | {"w": swapped}))
    seen.add(replica_hash(tensors | {"half": -tensors["half"]}))
    assert len(seen) == 53
