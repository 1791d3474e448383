"""Hand-written operations equal their plain twins, values and gradients, in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.unit.random_batches import make_batch, make_config, make_spec
from usr_ray.data.batch import GroupShare
from usr_ray.model import ops
from usr_ray.model.embedding import EmbeddingTables
from usr_ray.model.ops import Groups, group_places, masked_attention, pool_sum, stable_order
from usr_ray.model.usr import UsrModel
from usr_ray.training.loss import row_counts, usr_loss

pytestmark = pytest.mark.unit


def same_with_plain(function: Callable[..., Tensor], arguments: list[Tensor]) -> None:
    """Values, and gradients of a weighted sum, with the operation and with its twin."""
    found = []
    for way in (ops.plain, lambda: ops.plain("none")):
        with way():
            value = function(*arguments)
        weights = torch.linspace(-1, 2, value.numel(), dtype=value.dtype).view_as(value)
        found.append([value, *torch.autograd.grad((value * weights).sum(), arguments)])
    assert all(t.dtype == torch.float64 for t in found[0])
    for by_twin, by_hand in zip(*found, strict=True):
        torch.testing.assert_close(by_hand, by_twin, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("num_keys", [100, 2**15 - 1, 70_000])
@pytest.mark.parametrize("size", [0, 1, 2**13 - 1, 2**13, 2**15 - 1, 2**15])
def test_the_order_of_keys_is_stable_for_any_number_of_them(size: int, num_keys: int) -> None:
    keys_V = torch.randint(0, num_keys, (size,), generator=torch.Generator().manual_seed(0))
    keys_V[size // 2 :: 7] = num_keys - 1
    expected = sorted(range(size), key=keys_V.tolist().__getitem__)
    assert stable_order(keys_V, num_keys).tolist() == expected


def test_pool_sum_equals_its_twin() -> None:
    generator = torch.Generator().manual_seed(0)
    group_V = torch.randint(0, 6, (40,), generator=generator)
    group_V[group_V == 4] = 1  # group 4 stays empty
    order_V = torch.argsort(group_V, stable=True)
    starts_G = torch.searchsorted(group_V[order_V], torch.arange(6))
    groups = Groups(group_V, order_V, starts_G)
    places = [group_places(torch.randint(0, n, (40,), generator=generator), n) for n in (5, 9)]
    weights = [torch.randn(n, 3, generator=generator, dtype=torch.float64, requires_grad=True) for n in (5, 9)]
    same_with_plain(lambda *w: pool_sum(w, places, groups), weights)


def test_masked_attention_equals_its_twin() -> None:
    generator = torch.Generator().manual_seed(0)
    valid_BML = torch.rand(5, 2, 7, generator=generator) < 0.6
    query, pairs = (
        torch.randn(*shape, generator=generator, dtype=torch.float64, requires_grad=True)
        for shape in ((5, 3, 4), (5, 7, 8))
    )
    same_with_plain(lambda q, p: masked_attention(q, p, valid_BML)[0], [query, pairs])


@pytest.mark.parametrize("first", [0, 1])
def test_a_share_of_the_rows_reads_once_more_and_all_gradients_are_its_twins(first: int) -> None:
    """Six groups of two rows; every second one reads again, with a mask of its own."""
    generator = torch.Generator().manual_seed(0)
    share = GroupShare(num_groups=6, group_size=2, first=first, step=2)
    valid_B1L, kept_RL = torch.rand(12, 1, 7, generator=generator) < 0.6, torch.rand(6, 7, generator=generator) < 0.4
    query, pairs = (
        torch.randn(*shape, generator=generator, dtype=torch.float64, requires_grad=True)
        for shape in ((12, 3, 4), (12, 7, 8))
    )

    def read(query_BVK: Tensor, pairs_BLK: Tensor) -> Tensor:
        all_B1VK, again_RVK = masked_attention(query_BVK, pairs_BLK, valid_B1L, share, kept_RL)
        assert again_RVK is not None
        return torch.cat([all_B1VK.flatten(), again_RVK.flatten()])

    same_with_plain(read, [query, pairs])
    rows = [row for row in range(12) if row // 2 % 2 == first]
    alone, _ = masked_attention(query[rows], pairs[rows], kept_RL.unsqueeze(1))
    torch.testing.assert_close(read(query, pairs)[-alone.numel() :], alone.flatten(), rtol=1e-12, atol=1e-12)


def test_the_switch_reaches_a_whole_step(monkeypatch: pytest.MonkeyPatch) -> None:
    spec, config = make_spec(), make_config()
    batch, tables = make_batch(spec), EmbeddingTables(spec, 4, seed=0)
    torch.manual_seed(0)
    model = UsrModel(spec, config)

    def loss() -> float:
        terms = usr_loss(model(batch, tables.lookup(batch), 1), batch, row_counts(batch, 2, config), config)
        return float(terms.total.detach())

    by_hand = loss()
    for name in ("_PoolSum", "_MaskedAttention"):
        monkeypatch.delattr(ops, name)
    with pytest.raises(NameError):
        loss()
    with ops.plain():
        assert loss() == pytest.approx(by_hand, rel=1e-6)


def test_torch_s_private_names_are_there_and_compute_what_is_public() -> None:
    """There is no public way to either with equal bits and speed; a torch that renames one must say so here."""
    for name, where in (
        ("_softmax_backward_data", "model/ops._softmax_gradient"),
        ("_foreach_lerp_", "training/average"),
    ):
        assert hasattr(torch, name), f"torch has no {name} any more: look up its new name, for usr_ray/{where}.py"
    generator = torch.Generator().manual_seed(0)
    score = torch.randn(3, 4, 50, generator=generator, requires_grad=True)
    weight, grad = score.softmax(dim=-1), torch.randn(3, 4, 50, generator=generator)
    (expected,) = torch.autograd.grad(weight, score, grad)
    assert torch.equal(ops._softmax_gradient(weight.detach(), grad), expected)
    old, new = (torch.randn(9, generator=generator) for _ in range(2))
    moved = old.clone()
    torch._foreach_lerp_([moved], [new], 0.25)
    assert torch.equal(moved, old.lerp(new, 0.25))
