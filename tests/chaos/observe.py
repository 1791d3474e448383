"""What a run did, read from what it left: the rows of every step, the weights, the lines it printed."""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import torch

from tests.chaos.inside import BATCHES
from usr_ray.runs.plan import load_manifest
from usr_ray.training.checkpoint import CheckpointStore

Rows = tuple[int, ...]


@dataclass(slots=True)
class Seen:
    """What was observed of one fault: each check with its verdict, and the words for the table."""

    checks: dict[str, bool] = field(default_factory=dict)
    words: list[str] = field(default_factory=list)
    skipped: str = ""
    """Why the fault was not tried; then there are no checks."""

    def note(self, check: str, is_right: bool, words: str) -> None:
        """Add one observation."""
        self.checks[check] = bool(is_right)
        self.words.append(words if is_right else f"WRONG: {words}")

    @property
    def is_right(self) -> bool:
        """Every check holds, and there is one."""
        return bool(self.checks) and all(self.checks.values())


def global_batches(case: Path) -> dict[int, list[Rows]]:
    """Step to the global batches that were drawn for it, one for each group of ranks that came to it whole.

    The rows of rank 0, then those of rank 1 and so on; padding (-1) included.
    """
    groups: dict[str, dict[int, dict[int, Rows]]] = defaultdict(lambda: defaultdict(dict))
    for path in sorted((case / BATCHES).glob("*.jsonl")):
        group, rank, _, world = path.stem.split("-")
        for line in path.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            groups[f"{group}-{world}"][row["step"]][int(rank)] = tuple(row["rows"])
    drawn: dict[int, list[Rows]] = defaultdict(list)
    for name, steps in groups.items():
        world = int(name.split("-")[1])
        for step, ranks in steps.items():
            if len(ranks) == world:
                drawn[step].append(tuple(row for rank in range(world) for row in ranks[rank]))
    return dict(drawn)


def note_batches(seen: Seen, case: Path, unbroken: Path) -> None:
    """Every step drew the unbroken run's global batch, however often it was drawn; each row once an epoch."""
    expected = {step: drawn[0] for step, drawn in global_batches(unbroken).items()}
    found = global_batches(case)
    again = sum(len(drawn) - 1 for drawn in found.values())
    others = [step for step, drawn in found.items() if any(rows != expected.get(step) for rows in drawn)]
    lost = sorted(set(expected) - set(found))
    text = f"{len(found)} global batches the same" + (f" ({again} of them drawn again)" if again else "")
    if others or lost:
        text = f"other rows in steps {others[:5]}, no batch for steps {lost[:5]}"
    seen.note("batches", not others and not lost, text)


def note_rows(seen: Seen, case: Path, run_dir: Path, *, num_epochs: int) -> None:
    """Each row that is read is in exactly one batch of each epoch."""
    manifest = load_manifest(run_dir, "train")
    steps = global_batches(case)
    per_epoch = len(steps) // num_epochs
    counts = [
        Counter(row for step in range(n * per_epoch, (n + 1) * per_epoch) for row in steps[step][-1] if row >= 0)
        for n in range(num_epochs)
    ]
    # Whole row groups are read or left out, and in this table none is left out for being immature as a whole.
    known = {ref.first_row: ref.row_group.num_rows for ref in manifest.row_groups()}
    read = {row for first, count in known.items() if first in counts[0] for row in range(first, first + count)}
    once = all(set(count) == read and set(count.values()) == {1} for count in counts)
    seen.note("rows", once and bool(read), f"{len(read):,} rows once an epoch")


def weights(run_dir: Path) -> tuple[int, dict[str, torch.Tensor]]:
    """Step and tensors of the newest whole checkpoint: model, embedding tables, both optimisers."""
    checkpoint = CheckpointStore(run_dir / "checkpoints").newest_valid()
    return (checkpoint.step, checkpoint.tensors) if checkpoint else (0, {})


def digest(tensors: dict[str, torch.Tensor]) -> str:
    """SHA-256 of names, types, shapes and bits."""
    sha = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        sha.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        sha.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
    return sha.hexdigest()


def note_weights(seen: Seen, run_dir: Path, unbroken: Path, *, tolerance: float = 0.0) -> None:
    """The final weights are the unbroken run's: bit for bit, or within `tolerance` if sums have another order."""
    (step, found), (last, expected) = weights(run_dir), weights(unbroken)
    if digest(found) == digest(expected) and step == last:
        seen.note("weights", True, f"weights equal ({digest(found)[:8]})")
        return
    if step != last or set(found) != set(expected):
        seen.note("weights", False, f"the newest checkpoint is of step {step}, not {last}")
        return
    far = max(float((found[n] - expected[n]).abs().max()) for n in found if found[n].is_floating_point())
    within = tolerance > 0 and far <= tolerance
    seen.note("weights", within, f"weights differ by at most {far:.1e}" + (f" (<= {tolerance:g})" if within else ""))
