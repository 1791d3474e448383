"""GLMT: probabilities by hand, and logarithms that stay exact at the ends."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from usr_ray.config import MultitaskConfig
from usr_ray.model.multitask import GlobalHeads, global_outputs, scenario_outputs, with_rest

pytestmark = pytest.mark.unit


def sig(logit: float) -> float:
    return 1 / (1 + math.exp(-logit))


def test_probabilities_are_the_products_of_the_method() -> None:
    a_k, b_k, a_g, b_g = 0.3, -1.2, 0.8, 0.4
    own, both = torch.tensor([[a_k, b_k]]), torch.tensor([[a_g, b_g]])
    expected = {"A": sig(a_g) * sig(b_g) * sig(b_k), "B": sig(a_g) * sig(a_k) * sig(b_k)}
    for variant, ctcvr in expected.items():
        outputs = global_outputs(own, both, variant)
        torch.testing.assert_close(outputs.log_p_BT.exp(), torch.tensor([[sig(a_g) * sig(a_k), ctcvr]]))
        torch.testing.assert_close(
            outputs.log_not_p_BT, torch.tensor([[math.log(1 - sig(a_g) * sig(a_k)), math.log(1 - ctcvr)]])
        )
        assert outputs.log_p_global_BT is not None
        torch.testing.assert_close(outputs.log_p_global_BT.exp(), torch.tensor([[sig(a_g), sig(a_g) * sig(b_g)]]))
        assert outputs.log_not_p_global_BT is not None
        torch.testing.assert_close(
            outputs.log_not_p_global_BT.exp(), torch.tensor([[1 - sig(a_g), 1 - sig(a_g) * sig(b_g)]])
        )


@pytest.mark.parametrize("variant", ["A", "B"])
def test_the_rest_is_scaled_and_the_scenarios_own_probabilities_stay(variant: str) -> None:
    a_k, b_k, a_g, b_g = 0.3, -1.2, 0.8, 0.4
    whole = global_outputs(torch.tensor([[a_k, b_k]]), torch.tensor([[a_g, b_g]]), variant)
    found = with_rest(whole, torch.tensor([[0.25, 0.6]]), variant)
    assert torch.equal(found.log_p_BT, whole.log_p_BT)
    click, clicked_anywhere, ordered_anywhere = sig(a_g) * sig(a_k), sig(a_g), sig(a_g) * sig(b_g)
    order = ordered_anywhere * sig(b_k) if variant == "A" else 0
    expected = [click + 0.25 * (clicked_anywhere - click), order + 0.6 * (ordered_anywhere - order)]
    assert expected[1] < expected[0]
    assert found.log_p_global_BT is not None
    assert found.log_not_p_global_BT is not None
    torch.testing.assert_close(found.log_p_global_BT.exp(), torch.tensor([expected]))
    torch.testing.assert_close(found.log_not_p_global_BT.exp(), 1 - torch.tensor([expected]))


def test_a_click_anywhere_is_as_likely_as_an_order_anywhere() -> None:
    whole = global_outputs(torch.tensor([[-3.0, 3.0]]), torch.tensor([[0.0, 3.0]]), "A")
    found = with_rest(whole, torch.tensor([[0.01, 1.0]]), "A")
    order = sig(3) / 2
    assert order > sig(-3) / 2 + 0.01 * (0.5 - sig(-3) / 2)
    assert found.log_p_global_BT is not None
    assert found.log_not_p_global_BT is not None
    torch.testing.assert_close(found.log_p_global_BT.exp(), torch.tensor([[order, order]]))
    torch.testing.assert_close(found.log_not_p_global_BT.exp(), torch.tensor([[1 - order, 1 - order]]))


@pytest.mark.parametrize("variant", ["A", "B"])
@pytest.mark.parametrize("share", [1e-6, 0.3, 1.0])
def test_a_scaled_rest_is_a_probability_at_the_ends_too(share: float, variant: str) -> None:
    logits_N4 = torch.tensor(list(itertools.product((-1e4, -30.0, -1.0, 0.5, 30.0, 1e4), repeat=4)))
    whole = global_outputs(logits_N4[:, :2], logits_N4[:, 2:], variant)
    found = with_rest(whole, torch.full((len(logits_N4), 2), share), variant)
    assert found.log_p_global_BT is not None
    assert found.log_not_p_global_BT is not None
    assert whole.log_p_global_BT is not None
    for log in (found.log_p_global_BT, found.log_not_p_global_BT):
        assert not log.isnan().any()
        assert (log <= 0).all()
    torch.testing.assert_close(found.log_p_global_BT.exp() + found.log_not_p_global_BT.exp(), torch.ones_like(log))
    assert (found.log_p_global_BT <= whole.log_p_global_BT + 1e-6 * (1 + whole.log_p_global_BT.abs())).all()
    assert (found.log_p_global_BT[:, 0] >= whole.log_p_BT[:, 0]).all()
    assert (found.log_p_global_BT[:, 0] >= found.log_p_global_BT[:, 1]).all()
    assert variant == "B" or (found.log_p_global_BT[:, 1] >= whole.log_p_BT[:, 1]).all()
    if share == 1:
        torch.testing.assert_close(found.log_p_global_BT.exp(), whole.log_p_global_BT.exp())


def test_without_glmt_each_task_is_its_own_logits_sigmoid() -> None:
    outputs = scenario_outputs(torch.tensor([[0.3, -1.2]]))
    torch.testing.assert_close(outputs.log_p_BT.exp(), torch.tensor([[sig(0.3), sig(-1.2)]]))
    torch.testing.assert_close(outputs.log_not_p_BT.exp(), torch.tensor([[sig(-0.3), sig(1.2)]]))
    assert outputs.log_p_global_BT is None
    assert outputs.log_not_p_global_BT is None


def exact_log_not_p(*logits: float) -> float:
    """log(1 - p) as log1p(-p) for small p, else log(prod(1 + e^-x) - 1) - sum log(1 + e^-x), the product expanded."""
    if math.prod(map(sig, logits)) < 0.5:
        return math.log1p(-math.prod(map(sig, logits)))
    small = [math.exp(-x) for x in logits]
    expanded = sum(math.prod(c) for n in range(1, len(small) + 1) for c in itertools.combinations(small, n))
    return math.log(expanded) - sum(math.log1p(s) for s in small)


def product_of_three(x: Tensor, y: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """log p and log(1 - p) of sig(x) sig(y) sig(z): p_ctcvr,k of variant A, whose a_k is another."""
    outputs = global_outputs(torch.stack([torch.ones_like(z), z], 1), torch.stack([x, y], 1), "A")
    return outputs.log_p_BT[:, 1], outputs.log_not_p_BT[:, 1]


LEVELS = (-50.0, -20.0, -1.0, 0.0, 1.0, 20.0, 50.0)


@pytest.mark.parametrize("logits", itertools.combinations_with_replacement(LEVELS, 3))
def test_both_logarithms_are_exact_in_float32(logits: tuple[float, ...]) -> None:
    log_p, log_not_p = product_of_three(*(torch.tensor([x]) for x in logits))
    assert float(log_p) == pytest.approx(-sum(math.log1p(math.exp(-x)) for x in logits), rel=2e-6, abs=1e-30)
    assert float(log_not_p) == pytest.approx(exact_log_not_p(*logits), rel=2e-6, abs=1e-30)


@pytest.mark.parametrize("variant", ["A", "B"])
@pytest.mark.parametrize("logits", itertools.product((-30.0, 0.5, 30.0), repeat=4))
def test_every_probability_is_exact_in_float32(logits: tuple[float, ...], variant: str) -> None:
    a_k, b_k, a_g, b_g = logits
    outputs = global_outputs(torch.tensor([[a_k, b_k]]), torch.tensor([[a_g, b_g]]), variant)
    factors = [(a_g, a_k), (a_g, b_g if variant == "A" else a_k, b_k), (a_g,), (a_g, b_g)]
    assert outputs.log_p_global_BT is not None
    assert outputs.log_not_p_global_BT is not None
    log_p = torch.cat([outputs.log_p_BT, outputs.log_p_global_BT], 1)[0].tolist()
    log_not_p = torch.cat([outputs.log_not_p_BT, outputs.log_not_p_global_BT], 1)[0].tolist()
    assert log_p == pytest.approx([-sum(math.log1p(math.exp(-x)) for x in f) for f in factors], rel=2e-6)
    assert log_not_p == pytest.approx([exact_log_not_p(*f) for f in factors], rel=2e-6)


@pytest.mark.parametrize("signs", itertools.product((-1, 1), repeat=3))
@pytest.mark.parametrize("size", [50.0, 1e4])
def test_gradients_stay_finite_at_the_ends(signs: tuple[int, ...], size: float) -> None:
    logits = [torch.tensor([s * size], requires_grad=True) for s in signs]
    log_p, log_not_p = product_of_three(*logits)
    assert log_p.isfinite()
    assert log_not_p.isfinite()
    (log_p + log_not_p).sum().backward()
    assert all(x.grad is not None and x.grad.isfinite() and x.grad.abs() <= 2 for x in logits)


@pytest.mark.parametrize("variant", ["A", "B"])
def test_gradients_are_those_of_finite_differences(variant: str) -> None:
    own_BT, global_BT = (torch.randn(4, 2, dtype=torch.float64, requires_grad=True) for _ in range(2))

    def logs(own_BT: Tensor, global_BT: Tensor) -> tuple[Tensor | None, ...]:
        o = global_outputs(own_BT, global_BT, variant)
        return o.log_p_BT, o.log_not_p_BT, o.log_p_global_BT, o.log_not_p_global_BT

    assert torch.autograd.gradcheck(logs, (own_BT, global_BT))


def test_bfloat16_logits_are_widened_first() -> None:
    logits_BT = torch.tensor([[9.0, 9.0]], dtype=torch.bfloat16)
    for outputs in (global_outputs(logits_BT, logits_BT, "A"), scenario_outputs(logits_BT)):
        assert outputs.log_p_BT.dtype == outputs.log_not_p_BT.dtype == torch.float32
        assert outputs.log_p_BT[0, 0] < 0, "in bfloat16 a probability near 1 rounds to 1"


def test_global_heads_give_two_logits_of_both_signs() -> None:
    torch.manual_seed(0)
    logits_BT = GlobalHeads(6, MultitaskConfig(hidden=(5,)), dropout=0.0)(torch.randn(50, 6))
    assert logits_BT.shape == (50, 2)
    assert (logits_BT > 0).any(0).all()
    assert (logits_BT < 0).any(0).all()
