"""A run that begins with another one's weights (train.warm_start): which checkpoint, and whether it fits."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from usr_ray.config import Config, ModelConfig, UserError, first_difference
from usr_ray.config.fields import complete
from usr_ray.data.lineage import built_with, difference
from usr_ray.data.manifest import Manifest
from usr_ray.model.unique import event_sides, event_vectors
from usr_ray.schema import FeatureSpec
from usr_ray.training.checkpoint import CHECKPOINTS, STATE, Checkpoint, CheckpointError, CheckpointStore

_NEW_KEYS = ("wide", "wide_buckets", "wide_l2", "pepnet_hidden", "interaction_histories")
_NEW = {key: getattr(ModelConfig(), key) for key in _NEW_KEYS}
_COME_SINCE: dict[str, Any] = {"model": _NEW, "features": {"crosses": []}}
"""Keys that older runs do not name, as these runs had them."""
_SHARE = "model.contrastive.every_nth_group"
"""No weight means another thing by it."""
_WAY_OUT = "name another, or set train.warm_start='' to begin afresh (jobs/daily.py: with another --work)"


def find_checkpoint(path: str) -> Checkpoint:
    """The checkpoint that `path` names: itself, or of a run directory the best one, else the newest whole one.

    Raises:
        CheckpointError: there is none.
    """
    folder = Path(path)
    if (folder / STATE).is_file():
        return CheckpointStore(folder.parent).load(folder.name)
    found = CheckpointStore(folder / CHECKPOINTS).chosen()
    if found is None:
        raise CheckpointError(
            f"train.warm_start {path}: is no run directory with a whole checkpoint, and no checkpoint; {_WAY_OUT}"
        )
    return found


def check_warm_start(config: Config, manifest: Manifest) -> None:
    """Refuse, before anything starts, what the workers would: reads the description of a checkpoint, not its tensors.

    Raises:
        CheckpointError: there is no checkpoint, or it is of another model or of other features.
    """
    path = config.train.warm_start
    of_a_run = [sorted(Path(path, CHECKPOINTS).glob(f"{kind}-*"), reverse=True) for kind in ("best", "step")]
    for folder in [Path(path), *of_a_run[0], *of_a_run[1]]:
        try:
            state = json.loads((folder / STATE).read_text(encoding="utf-8"))
        except (OSError, ValueError):  # torn, or being written: there may be a whole one
            continue
        problem = warm_start_refusal(state, path, config, manifest, may_read=True)
        if problem:
            raise CheckpointError(problem)
        return
    find_checkpoint(path)


def warm_start_refusal(
    state: Mapping[str, Any], path: str, config: Config, manifest: Manifest, *, may_read: bool = False
) -> str | None:
    """Why a run of `config` on `manifest` must not begin with the weights of a checkpoint: one line; None when it may.

    `state` is the checkpoint's. Its rows must mean what the table's do, but vocabularies may have grown since; its
    model, and with the optimisers' states the tables' optimiser, must be the configuration's. `may_read`: the lake's
    vocabularies, where the fingerprints alone do not tell.
    """
    try:
        old = FeatureSpec.from_json(json.dumps(state["spec"]))
        trained_with = Config.from_dict(Config.completed(state["config"]))
        saved = complete(state["config"], _COME_SINCE)
    except (KeyError, TypeError, ValueError, UserError) as error:
        return f"train.warm_start {path}: not written by this version ({error}); {_WAY_OUT}"
    problem = difference(old, built_with(trained_with), manifest, may_read=may_read)
    if problem:
        return f"train.warm_start {path}: {problem} ({manifest.table_uri}); {_WAY_OUT}"
    of_table = (*manifest.spec.sparse, *manifest.spec.lists)
    for feature, new in zip((*old.sparse, *old.lists), of_table, strict=True):
        if new.num_embeddings < feature.num_embeddings:
            return (
                f"train.warm_start {path}: {feature.name} had {feature.num_embeddings} ids, {manifest.table_uri} "
                f"version {manifest.version} has {new.num_embeddings}; vocabularies only grow, so this is an older "
                f"table; {_WAY_OUT}"
            )
    # What counts is what the events carried, however it was said.
    carried = (*event_sides(old, trained_with.model), *event_vectors(old, trained_with.model))
    wanted = (*event_sides(manifest.spec, config.model), *event_vectors(manifest.spec, config.model))
    if carried != wanted:
        sets = f"set model.event_sides to {str(bool(carried)).lower()}"
        if config.model.event_sides == bool(carried):  # it is the table that has changed
            sets = "build a date with the features.history_item_features of then"
        return (
            f"train.warm_start {path}: its history events carry {', '.join(carried) or 'none'} of the item's "
            f"categories and vectors, this run's {', '.join(wanted) or 'none'}; {sets}, or {_WAY_OUT}"
        )
    keys = ["model", "features.crosses", *(["train.embedding_optimizer"] if config.train.warm_start_optimizer else [])]
    if other := first_difference(saved, config.to_dict(), keys, but=["model.event_sides", _SHARE]):
        key, before, now = other
        return f"train.warm_start {path}: it has {key} = {before!r}, this run {now!r}; set it so, or {_WAY_OUT}"
    return None
