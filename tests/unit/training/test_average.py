"""Averaged weights: the closed form of untouched rows against an average taken of every row in every step."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.unit.model.test_embedding import LargestTensor
from usr_ray.config import ConfigError, TrainConfig
from usr_ray.training.average import DenseAverage, RowAverages, averaged_rows, averaged_tensors, kept_share

pytestmark = pytest.mark.unit


def slow_average(history: list[torch.Tensor], decay: float) -> torch.Tensor:
    """Of the weights after steps 1, 2, ..: their mean in the first 1 / (1 - decay) steps, then exponential."""
    window, average = round(1 / (1 - decay)), torch.zeros_like(history[0])
    for step, weights in enumerate(history, start=1):
        share = (step - 1) / step if step <= window else decay
        average = share * average + (1 - share) * weights
    return average


def test_shares_by_hand() -> None:
    # The window of 0.75 is four steps: 1/2 and 2/3 and 3/4 are the decays of steps 2, 3 and 4, then 3/4 again.
    since = torch.tensor([0, 1, 2, 3, 4, 5, 6])
    assert kept_share(0.75, since, 3).tolist()[:4] == pytest.approx([0, 1 / 3, 2 / 3, 1])
    assert kept_share(0.75, since, 6).tolist() == pytest.approx([0, 9 / 64, 9 / 32, 27 / 64, 9 / 16, 3 / 4, 1])
    assert float(kept_share(0.99, torch.tensor(5), 100_000)) == 0, "no overflow, no NaN"


@pytest.mark.parametrize("decay", [0.5, 0.75, 0.95])
def test_rows_that_are_seldom_used_have_the_average_of_every_step(decay: float) -> None:
    generator = torch.Generator().manual_seed(0)
    weights = {"a": torch.randn(9, 3, generator=generator), "b": torch.randn(4, 3, generator=generator)}
    rows, history = RowAverages(weights, decay), {name: [] for name in weights}
    for step in range(40):
        updates = {
            "a": (torch.randperm(8, generator=generator)[: step % 4], torch.empty(0)),  # row 8 is never used
            "b": (torch.tensor([1]) if step in (0, 7, 30) else torch.empty(0, dtype=torch.int64), torch.empty(0)),
        }
        rows.catch_up(updates, step)
        for name, (ids_U, _) in updates.items():
            weights[name][ids_U] += torch.randn(len(ids_U), 3, generator=generator)
        rows.take_in(updates, step + 1)
        for name, table in weights.items():
            history[name].append(table.clone())
            found = averaged_rows(table, rows.averages[name], rows.steps[name], decay, step + 1)
            torch.testing.assert_close(found, slow_average(history[name], decay), rtol=1e-4, atol=1e-5)


def test_a_modules_floats_are_averaged_and_swapped_to_the_bit() -> None:
    module = nn.BatchNorm1d(3)
    average, history = DenseAverage(module, 0.75), []
    for step in range(12):
        for tensor in module.state_dict().values():
            tensor.copy_(torch.randn(tensor.shape) * 9)
        average.take_in(step + 1)
        history.append(module.running_mean.clone())
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    average.swap()
    torch.testing.assert_close(module.running_mean, slow_average(history, 0.75))
    assert torch.equal(module.num_batches_tracked, before["num_batches_tracked"])
    average.swap()
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


def test_a_checkpoint_gives_averages_in_place_of_weights() -> None:
    tensors = {
        "model/w": torch.tensor([1.0]),
        "average_model/w": torch.tensor([2.0]),
        "tables/item": torch.tensor([[4.0], [4.0]]),
        "average/item": torch.tensor([[2.0], [2.0]]),
        "average_step/item": torch.tensor([0, 3], dtype=torch.int32),
    }
    found = averaged_tensors(tensors, 0.75, 4)
    assert found["model/w"].tolist() == [2.0]
    # The second row: 4 + 3/4 (2 - 4).
    assert found["tables/item"].tolist() == [[4.0], [2.5]]
    assert averaged_tensors(tensors, 0.0, 4)["model/w"].tolist() == [1.0]


def test_no_tensor_of_a_step_grows_with_the_table() -> None:
    rows = RowAverages({"a": torch.zeros(50_000, 2)}, 0.9)
    updates = {"a": (torch.tensor([3, 7]), torch.zeros(2, 2))}
    with LargestTensor() as seen:
        rows.catch_up(updates, 4)
        rows.take_in(updates, 5)
    assert 0 < seen.numel <= 8


def test_sharded_tables_have_no_averages() -> None:
    with pytest.raises(ConfigError, match=r"train.average 0.9 needs train.embedding_strategy 'replicated'"):
        TrainConfig(average=0.9, embedding_strategy="sharded")
