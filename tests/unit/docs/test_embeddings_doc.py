"""docs/embeddings.md: its numbers are those of the formulae (test_figures.py has the measured tables)."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from benchmarks import embedding_wire, table_memory
from usr_ray.training.optimizers import ROW_OPTIMIZERS

pytestmark = pytest.mark.unit

DOC = Path(__file__).resolve().parents[3] / "docs" / "embeddings.md"


def table_of(name: str) -> str:
    found = re.search(rf"<!-- {name} -->\n(.*?)\n<!-- /{name} -->", DOC.read_text(encoding="utf-8"), re.DOTALL)
    assert found is not None, f"{DOC} has no table {name}"
    return found[1]


def test_the_memory_table_is_that_of_the_formulae() -> None:
    assert table_of("memory") == table_memory.table()
    # 100 million rows of 32 floats: 12.8 GB of weights, 0.4 GB of accumulators; Adam another 12.8 and 0.8.
    assert "| 100,000,000 x 32 | 13.2 | 26.4 | 6.6 | 1.6 |" in table_of("memory")


@pytest.mark.parametrize("optimizer", sorted(ROW_OPTIMIZERS))
def test_the_bytes_of_a_row_are_those_of_its_tensors(optimizer: str) -> None:
    table = torch.zeros(10, 16)
    state = ROW_OPTIMIZERS[optimizer]({"t": table}, learning_rate=0.1).state_tensors().values()
    assert table.nbytes + sum(t.nbytes for t in state) == 10 * table_memory.bytes_per_row(16, optimizer)


def test_the_wire_formulae_count_what_a_step_moves() -> None:
    """10 ids of 2 floats on 4 workers: 3 others send 8 + 8 bytes an id; or three quarters of 8 + 8 + 8 bytes an id."""
    assert embedding_wire.formula("replicated", 10, 2, 4) == 3 * 10 * 16
    assert embedding_wire.formula("sharded", 10, 2, 4) == 0.75 * 10 * 24


def test_measured_bytes_are_those_of_the_formulae() -> None:
    """Framing and the sizes that travel first are a few percent; a formula that forgot a part would miss by a third."""
    for entry in json.loads(embedding_wire.RESULTS.read_text(encoding="utf-8"))["results"]:
        assert entry["received_bytes"] == pytest.approx(entry["formula_bytes"], rel=0.1)
