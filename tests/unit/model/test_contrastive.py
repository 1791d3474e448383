"""Contrastive terms: against loops, by hand, and independent of where a row stands."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tests.unit.random_batches import make_batch, make_spec, rows
from usr_ray.model.contrastive import contrastive_sums, event_mask, feature_mask
from usr_ray.model.history import list_events

pytestmark = pytest.mark.unit


def cos(a: Tensor, b: Tensor) -> float:
    return float(a @ b) / (math.sqrt(float(a @ a) * float(b @ b)) or 1)


def slow_loss(
    vectors: Tensor, twins: Tensor, valid: list[bool], users: list[int], group_size: int, tau: float
) -> float:
    num_rows, num_views, _ = vectors.shape
    total = 0.0
    for row in range(num_rows):
        group = range(row // group_size * group_size, min(row // group_size * group_size + group_size, num_rows))
        for view in range(num_views):
            if not valid[row]:
                continue
            positive = math.exp(cos(vectors[row, view], twins[row, view]) / tau)
            negatives = sum(
                math.exp(cos(vectors[row, view], vectors[other, other_view]) / tau)
                for other in group
                if valid[other]
                for other_view in range(num_views)
                if other_view != view or users[other] != users[row]
            )
            total -= math.log(positive / (positive + negatives))
    return total


def everyone(num_rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows that are valid and count, each of a user of its own."""
    yes = torch.ones(num_rows, dtype=torch.bool)
    return yes, yes, torch.arange(num_rows)


@pytest.mark.parametrize("num_views", [1, 2, 3, 5])
@pytest.mark.parametrize("num_rows", [8, 10])
def test_the_loss_equals_its_loops(num_views: int, num_rows: int) -> None:
    torch.manual_seed(0)
    vectors, twins = (torch.randn(num_rows, num_views, 3, dtype=torch.float64) for _ in range(2))
    valid_B = torch.arange(num_rows) % 3 != 1
    users_B = torch.arange(num_rows) // 2
    loss, _ = contrastive_sums(vectors, twins, valid_B, valid_B, users_B, group_size=4, temperature=0.3)
    assert float(loss) == pytest.approx(slow_loss(vectors, twins, valid_B.tolist(), users_B.tolist(), 4, 0.3), rel=1e-5)


def test_twins_that_keep_some_columns_equal_those_vectors() -> None:
    torch.manual_seed(0)
    vectors, kept = torch.randn(10, 2, 6, dtype=torch.float64), (torch.rand(10, 6) < 0.6).double()
    kept[3] = 0
    valid_B, users_B = torch.arange(10) % 3 != 1, torch.arange(10) // 2

    def loss(vectors: Tensor) -> Tensor:
        return contrastive_sums(vectors, None, valid_B, valid_B, users_B, group_size=4, temperature=0.3, kept_RD=kept)[
            0
        ]

    expected = slow_loss(vectors, vectors * kept.unsqueeze(1), valid_B.tolist(), users_B.tolist(), 4, 0.3)
    assert float(loss(vectors)) == pytest.approx(expected, rel=1e-5)
    assert torch.autograd.gradcheck(loss, vectors.requires_grad_())


def test_one_row_and_two_views_by_hand() -> None:
    vectors = torch.tensor([[[2.0, 0.0], [0.0, 3.0]]])
    twins = torch.tensor([[[5.0, 0.0], [-1.0, 0.0]]])
    loss, variance_S = contrastive_sums(vectors, twins, *everyone(1), group_size=1, temperature=0.5)
    # View 0: cos 1 with its twin, cos 0 with view 1. View 1: cos 0 with its twin, cos 0 with view 0.
    assert float(loss) == pytest.approx(math.log(1 + math.exp(-2)) + math.log(2), rel=1e-5)
    assert variance_S.tolist() == pytest.approx([0, 0], abs=1e-5), "one row has no variance"


def test_rows_of_one_user_are_no_negatives_inside_a_view() -> None:
    """Two equal rows, one view: with one user there is no negative at all, with two the other row is one."""
    vectors = torch.tensor([[[1.0, 0.0]], [[1.0, 0.0]]])
    valid = torch.ones(2, dtype=torch.bool)

    def loss(users: list[int]) -> float:
        sums = contrastive_sums(vectors, vectors, valid, valid, torch.tensor(users), group_size=2, temperature=1.0)
        return float(sums[0])

    assert loss([7, 7]) == pytest.approx(0, abs=1e-15)
    assert loss([7, 8]) == pytest.approx(2 * math.log(2), rel=1e-5)


def test_a_view_of_one_constant_vector_costs_the_log_of_the_group_and_spread_ones_less() -> None:
    """The first form's minimum, one vector a view and opposite ones for two views, is no minimum any more."""
    generator = torch.Generator().manual_seed(0)
    constant = torch.tensor([[1.0, *[0.0] * 15], [-1.0, *[0.0] * 15]]).expand(64, 2, 16)
    spread = torch.randn(64, 2, 16, generator=generator)

    def mean(vectors: Tensor) -> float:
        return float(contrastive_sums(vectors, vectors, *everyone(64), group_size=64, temperature=0.2)[0]) / 128

    # Its twin at cos 1, 63 rows of its view at cos 1, 64 vectors of the other at cos -1.
    assert mean(constant) == pytest.approx(math.log(64 + 64 * math.exp(-10)), rel=1e-4)
    assert mean(spread) < 2


def test_invalid_rows_change_nothing() -> None:
    torch.manual_seed(0)
    vectors, twins = torch.randn(8, 2, 3), torch.randn(8, 2, 3)
    valid_B = torch.tensor([True] * 5 + [False] * 3)

    def sums() -> list[float]:
        loss, variance_S = contrastive_sums(
            vectors, twins, valid_B, valid_B, torch.arange(8), group_size=4, temperature=0.2
        )
        return [float(loss), *variance_S.tolist()]

    before = sums()
    vectors[5:], twins[5:] = 0, 9
    assert sums() == pytest.approx(before, rel=1e-5)


def test_zero_vectors_have_finite_gradients() -> None:
    vectors = torch.zeros(4, 2, 3, requires_grad=True)
    loss, _ = contrastive_sums(vectors, vectors.detach(), *everyone(4), group_size=4, temperature=0.2)
    loss.backward()
    assert vectors.grad is not None
    assert vectors.grad.isfinite().all()


def test_a_tiny_temperature_overflows_nothing() -> None:
    torch.manual_seed(0)
    vectors = torch.randn(4, 2, 3, requires_grad=True)
    loss, _ = contrastive_sums(vectors, -vectors.detach(), *everyone(4), group_size=4, temperature=0.002)
    loss.backward()
    assert loss.isfinite()
    assert vectors.grad is not None
    assert vectors.grad.isfinite().all()


def test_gradients_are_those_of_finite_differences() -> None:
    torch.manual_seed(0)
    vectors, twins = (torch.randn(5, 3, 2, dtype=torch.float64, requires_grad=True) for _ in range(2))
    valid_B = torch.tensor([True, True, False, True, True])
    assert torch.autograd.gradcheck(
        lambda v, t: contrastive_sums(v, t, valid_B, valid_B, torch.arange(5), group_size=4, temperature=0.5)[0],
        (vectors, twins),
    )


def test_variance_is_zero_when_a_view_has_collapsed_and_high_when_it_has_not() -> None:
    same = torch.tensor([3.0, 4.0]).expand(4, 2)
    spread = torch.tensor([[1.0, 0.0], [-2.0, 0.0], [0.0, 1.0], [0.0, -5.0]])
    _, variance_S = contrastive_sums(
        torch.stack([same, spread], dim=1), None, *everyone(4), group_size=4, temperature=1.0
    )
    # Unit vectors; the mean of the second view's is 0, so 1 - |mean|^2 = 1. Added up over 4 rows.
    assert variance_S.tolist() == pytest.approx([0.0, 4.0], abs=1e-4)


def test_masks_follow_the_row_and_not_its_place() -> None:
    spec = make_spec(3)
    batch = make_batch(spec, 12, num_padding=0)
    order = torch.tensor([7, 2, 9, 4])
    part = rows(batch, order)
    whole_V = event_mask(list_events(batch), batch.row_number_B, 5, 0.5)
    part_V = event_mask(list_events(part), part.row_number_B, 5, 0.5)
    firsts = torch.tensor([0, *[len(h.item_ids_V) for h in batch.histories]]).cumsum(0)
    expected = [
        whole_V[firsts[s] + h.offsets[b] : firsts[s] + h.offsets[b + 1]]
        for s, h in enumerate(batch.histories)
        for b in order.tolist()
    ]
    assert torch.equal(part_V, torch.cat(expected))
    widths = [2, 1, 3]
    whole_BC = feature_mask(widths, batch.row_number_B, 5, 0.5)
    assert torch.equal(feature_mask(widths, part.row_number_B, 5, 0.5), whole_BC[order])


def test_the_newest_event_always_stays_and_the_others_go_at_the_rate() -> None:
    batch = make_batch(make_spec(), 800, max_length=9, num_padding=0)
    events = list_events(batch)
    keep_V = event_mask(events, batch.row_number_B, 1, 0.3)
    newest_V = events.from_newest_V == 0
    assert keep_V[newest_V].all()
    assert float(keep_V[~newest_V].double().mean()) == pytest.approx(0.7, abs=0.03)


def test_a_features_columns_go_together_at_the_rate_and_change_with_the_step() -> None:
    numbers_B = torch.arange(2000)
    keep_BC = feature_mask([3, 1, 2], numbers_B, 1, 0.2)
    assert keep_BC.shape == (2000, 6)
    assert torch.equal(keep_BC[:, 0], keep_BC[:, 2])
    assert torch.equal(keep_BC[:, 4], keep_BC[:, 5])
    for column in (0, 3, 4):
        assert float(keep_BC[:, column].double().mean()) == pytest.approx(0.8, abs=0.03)
    assert not torch.equal(keep_BC, feature_mask([3, 1, 2], numbers_B, 2, 0.2))
    both = (keep_BC[:, 0] * keep_BC[:, 3]).double().mean()
    assert float(both) == pytest.approx(0.64, abs=0.03), "features are masked independently"
