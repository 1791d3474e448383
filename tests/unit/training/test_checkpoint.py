"""Checkpoints are whole or absent, survive torn files, crashes and full disks, and run no code when read."""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import resource
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from usr_ray.training import checkpoint
from usr_ray.training.checkpoint import CheckpointError, CheckpointStore

pytestmark = pytest.mark.unit

STATE = {"cursor": {"manifest": "ab", "epoch": 1, "step": 7}, "note": "é"}


def tensors_of(value: float) -> dict[str, torch.Tensor]:
    base = torch.arange(12.0).reshape(3, 4) + value
    return {
        "float": base,
        "half": base.to(torch.bfloat16),
        "ids": torch.tensor([2**62, -1]),
        "flag": torch.tensor([True, False]),
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 4),
        "transposed": base.T,
        "slice": base[1:],
    }


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(tmp_path / "checkpoints", keep_last=2)


def names(store: CheckpointStore) -> list[str]:
    return sorted(p.name for p in store.directory.iterdir())


def test_what_is_saved_comes_back_bit_for_bit(store: CheckpointStore) -> None:
    path = store.save(7, tensors_of(0.1), STATE)
    assert path == store.directory / "step-00000007"
    found = store.newest_valid()
    assert found is not None
    assert (found.path, found.step, found.state) == (path, 7, STATE)
    for name, expected in tensors_of(0.1).items():
        assert found.tensors[name].dtype == expected.dtype, name
        assert torch.equal(found.tensors[name], expected), name


@pytest.mark.integration
def test_the_checksums_are_those_of_coreutils(store: CheckpointStore) -> None:
    path = store.save(1, tensors_of(0), STATE)
    done = subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("OK") == 2


def test_no_checkpoint_is_none(store: CheckpointStore) -> None:
    assert store.newest_valid() is None
    assert store.best_valid() is None
    assert store.steps() == []


def test_the_last_k_stay_and_the_best_stays_besides(store: CheckpointStore) -> None:
    for step in (10, 20):
        store.save(step, tensors_of(step), STATE)
        store.save(step, tensors_of(step), STATE, best=True)
    for step in (30, 40):
        store.save(step, tensors_of(step), STATE)
    assert names(store) == ["best-00000020", "step-00000030", "step-00000040"]
    best = store.best_valid()
    assert best is not None
    assert torch.equal(best.tensors["float"], tensors_of(20)["float"])


def test_the_same_step_again_replaces_the_former(store: CheckpointStore) -> None:
    store.save(5, tensors_of(0), STATE)
    store.save(5, tensors_of(1), {"second": True})
    found = store.newest_valid()
    assert found is not None
    assert found.state == {"second": True}
    assert torch.equal(found.tensors["float"], tensors_of(1)["float"])
    assert names(store) == ["step-00000005"]


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.parametrize("file", ["tensors.safetensors", "state.json", "SHA256SUMS"])
@pytest.mark.parametrize("harm", [cut, flip, os.unlink])
def test_a_torn_checkpoint_is_passed_over_with_a_warning(
    store: CheckpointStore, caplog: pytest.LogCaptureFixture, file: str, harm: object
) -> None:
    store.save(10, tensors_of(10), STATE)
    newest = store.save(20, tensors_of(20), STATE)
    assert newest is not None
    harm(newest / file)  # type: ignore[operator]
    found = store.newest_valid()
    assert found is not None
    assert found.step == 10
    assert "step-00000020" in caplog.text
    assert "use an older one" in caplog.text


def test_a_torn_newer_step_goes_once_the_run_has_moved_on(store: CheckpointStore) -> None:
    store.save(10, tensors_of(10), STATE)
    torn = store.save(30, tensors_of(30), STATE)
    assert torn is not None
    cut(torn / "state.json")
    store.save(20, tensors_of(20), STATE)  # resumed from 10
    assert store.steps() == [10, 20]


def test_a_crash_while_writing_leaves_nothing_that_is_read_and_the_next_save_cleans_up(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.save(10, tensors_of(10), STATE)

    def killed(path: Path) -> None:
        os._exit(9)

    child = os.fork()
    if child == 0:
        monkeypatch.setattr(checkpoint, "sync", killed)
        store.save(20, tensors_of(20), STATE)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert any(".tmp-" in name for name in names(store)), "the crash must have left something, else this shows nothing"
    found = store.newest_valid()
    assert found is not None
    assert found.step == 10
    store.save(20, tensors_of(20), STATE)
    assert names(store) == ["step-00000010", "step-00000020"]


@pytest.fixture
def small_files() -> Iterator[None]:
    """No file may grow beyond 20 kB: the nearest to a full disk that a test may cause."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_storage_that_refuses_to_grow_keeps_the_older_checkpoint(
    store: CheckpointStore, caplog: pytest.LogCaptureFixture, small_files: None
) -> None:
    store.save(10, tensors_of(10), STATE)
    with caplog.at_level(logging.WARNING):
        assert store.save(20, {"table": torch.zeros(100_000)}, STATE) is None
    assert re.search(
        r"checkpoint of step 20 not written to \S+/checkpoints: the storage is full \(File too large; 0\.4 MB needed, "
        r"[\d,.]+ MB free\); training goes on and the earlier checkpoints stay: free space on this storage",
        caplog.text,
    )
    assert names(store) == ["step-00000010"]
    assert store.newest_valid() is not None
    assert store.save(30, tensors_of(30), STATE) is not None


def test_a_checkpoint_that_must_be_written_is_refused_in_one_line(store: CheckpointStore, small_files: None) -> None:
    store.save(10, tensors_of(10), STATE)
    with pytest.raises(CheckpointError, match=r"step 20 not written .*without it the run has no result: free space"):
        store.save(20, {"table": torch.zeros(100_000)}, STATE, must=True)
    assert names(store) == ["step-00000010"]


@pytest.mark.parametrize("file", ["state.json", "SHA256SUMS"])
def test_a_disk_full_at_any_file_leaves_nothing(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    def full(path: Path, text: str, encoding: str) -> int:
        if path.name == file:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return path.write_bytes(text.encode(encoding))

    monkeypatch.setattr(Path, "write_text", full)
    assert store.save(1, tensors_of(1), STATE) is None
    assert names(store) == []


def test_any_other_failure_to_write_is_raised_and_leaves_nothing(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(path: Path) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(checkpoint, "sync", broken)
    with pytest.raises(OSError, match="Input/output error"):
        store.save(1, tensors_of(1), STATE)
    assert names(store) == []


def test_a_state_that_is_not_json_is_refused_before_anything_is_written(store: CheckpointStore) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        store.save(1, tensors_of(1), {"loss": float("nan")})
    assert not store.directory.exists()


@pytest.mark.parametrize("name", ["../step-00000001", "/etc", "step-1", "step-00000001.tmp-ab", "..", ""])
def test_a_name_that_is_not_a_checkpoints_is_refused(store: CheckpointStore, name: str) -> None:
    with pytest.raises(CheckpointError, match="not a checkpoint's name; write step-<8 digits>"):
        store.load(name)


def test_a_missing_checkpoint_names_those_present(store: CheckpointStore) -> None:
    store.save(3, tensors_of(3), STATE)
    with pytest.raises(CheckpointError, match="no such directory; present: step-00000003"):
        store.load("step-00000004")


def test_a_link_out_of_the_store_is_refused(store: CheckpointStore, tmp_path: Path) -> None:
    path = store.save(3, tensors_of(3), STATE)
    assert path is not None
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="no such directory"):
        store.load("step-00000003")


def test_checksums_that_name_other_files_are_refused(store: CheckpointStore) -> None:
    path = store.save(3, tensors_of(3), STATE)
    assert path is not None
    (path / "SHA256SUMS").write_text(f"{'0' * 64}  ../../../etc/passwd\n", encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"expected state.json, tensors.safetensors and their SHA256SUMS, found"):
        store.load("step-00000003")


def test_the_state_is_readable_json(store: CheckpointStore) -> None:
    path = store.save(3, tensors_of(3), STATE)
    assert path is not None
    assert json.loads((path / "state.json").read_text(encoding="utf-8")) == STATE


def test_wrong_arguments_are_refused(store: CheckpointStore) -> None:
    with pytest.raises(ValueError, match="keep_last must be at least 1"):
        CheckpointStore(store.directory, keep_last=0)
    with pytest.raises(ValueError, match="step must not be negative"):
        store.save(-1, {}, {})
