"""Whether a model and a samples table belong together: rows of one meaning, and ids that stand for the same values.

Every feature of a FeatureSpec carries fingerprints of its vocabulary: (rows of the embedding table, hash of the values
whose ids are below that), one for each build that let it grow. Vocabularies grow by appending, so a model and a table
belong together where the values of one are the first values of the other. The hash is the XOR of the MD5 of every
"id:value", cut to 120 bits: it needs no order, and a build adds its new values to the hash of the old ones.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable

import pyarrow as pa
import pyarrow.compute as pc

from usr_ray.config import Config, date_ranges, dates_in, first_difference, parse_dates
from usr_ray.data.manifest import DataError, Manifest, read_vocabularies
from usr_ray.data.mature import counted_in_training, usable_row_groups
from usr_ray.schema import HASHED, STANDARD, FeatureSpec, SparseFeature, fingerprint_text


def built_with(config: Config) -> str:
    """What decides the meaning of a row, as in the table's property and in Manifest.built_with."""
    return json.dumps(config.row_meaning(), sort_keys=True)


def check_config(config: Config, table: Manifest) -> None:
    """Refuse to train with another configuration than the table was built with.

    Raises:
        DataError: naming the first key that differs. Of a table that does not say, the scenarios alone are looked at.
    """
    there = json.loads(table.built_with) if table.built_with else {"scenarios": list(table.spec.scenarios)}
    if found := first_difference(there, config.row_meaning(), tuple(there) if not table.built_with else ("",)):
        key, of_table, here = found
        raise DataError(
            f"{config.key_of(key)}: the configuration has {here!r}, the table at {table.table_uri} has {of_table!r}; "
            "train with the configuration the table was built with"
        )
    asked, sides = config.features.history_item_features, table.spec.history_item_features
    # Else the events would carry the table's all the same.
    if config.model.event_sides and "*" not in asked and config.features.sides != sides:
        raise DataError(
            f"features.history_item_features: the configuration has {', '.join(asked) or 'none'}, the table at "
            f"{table.table_uri} has {', '.join(sides) or 'none'}; build a date with it, or set model.event_sides=false "
            "for events that carry none"
        )


def doubts(config: Config, train: Manifest, held_out: Manifest | None, *, first_counted: str | None) -> list[str]:
    """Warnings, a line each, of what gives other numbers than the configuration says without being an error.

    Args:
        first_counted: first date of the events that the table's counters know; None: there are no counters.
    """
    found = []
    if train.fitted:
        fitted = json.loads(train.fitted)
        on = dates_in(fitted["dates"])
        rebuild = f"(fitted on {fitted['dates']}); build a new --lake with the data.train_dates of this training"
        is_hashed = config.vocabulary.kind == "hash"  # then scales alone are fitted
        if (new := set(train.dates) - on) and not is_hashed:
            found.append(
                f"data.train_dates: values that only {date_ranges(new)} has are unknown ids, as the vocabularies were "
                f"not fitted on it {rebuild}, or build these dates once more"
            )
        # A day's model that goes on from the day before has a table that grew past its own dates, as it should.
        if held_out and not config.train.warm_start and (seen := set(held_out.dates) & on):
            found.append(
                f"data.eval_dates: the {'scales' if is_hashed else 'vocabularies'} of the table were fitted on "
                f"{date_ranges(seen)} too, which is held out {rebuild}; under jobs/daily.py it is by design"
            )
        if fitted["min_count"] != config.vocabulary.min_count and not is_hashed:
            found.append(
                f"vocabulary.min_count: the configuration has {config.vocabulary.min_count}, the table was last built "
                f"with {fitted['min_count']}, which holds"
            )
    last = parse_dates(config.data.train_dates or train.dates[-1], where="data.train_dates")[1]
    groups = usable_row_groups(train, counted_in_training(config, train))
    if idle := set(train.dates) - {train.files[ref.file].date for ref in groups}:
        hours = (train.spec.label_delay_us - config.order_wait_us) / 3.6e9
        others = "" if config.order_wait_us else ", or set data.final_labels='clicks' to learn from its clicks"
        found.append(
            f"data.train_dates: no row of {date_ranges(idle)} is trained on, as its labels are not final by the end of "
            f"{last} (they close after {hours:g} hours) or were not in its build; end the training dates later{others}"
        )
    if first_counted is not None and train.dates[0] <= first_counted:
        found.append(
            f"counters: nothing lies behind {train.dates[0]}, the first date trained on, so that they are 0 there and "
            "mean more each day; set counters.warmup_days, or begin the logs earlier"
        )
    return found


def warn(found: Iterable[str]) -> None:
    """Print what `doubts` found."""
    for doubt in found:
        print(f"warning: {doubt}", flush=True)


def difference(model: FeatureSpec, model_built_with: str, table: Manifest, *, may_read: bool = True) -> str | None:
    """In words, why rows of `table` mean something else to a model than those it was trained on; None: they do not.

    Args:
        model_built_with: `Manifest.built_with` of the rows that it was trained on; '' where that is not known.
        table: only its description is compared, its files are not looked at.
        may_read: read the lake's vocabularies where the fingerprints alone do not tell; False: let such ids pass.

    Raises:
        UserError: the vocabularies cannot be read.
    """
    of_table = _meaning(table.spec)
    rows = [(name, of_model, of_table[name]) for name, of_model in _meaning(model).items()]
    if model_built_with and table.built_with:  # first, since it names the configuration's own keys
        found = first_difference(json.loads(model_built_with), json.loads(table.built_with))
        rows = [*([found] if found else []), *rows]
    for name, trained, there in rows:
        if trained != there:
            return f"{name} of the samples table is {_words(there)}, but the model was trained with {_words(trained)}"
    for old, new in zip((*model.sparse, *model.lists), (*table.spec.sparse, *table.spec.lists), strict=True):
        same = _same_ids(old, new)
        if same is None:
            same = not may_read or _fingerprint_in(table, old) == old.fingerprints[-1]
        if not same:
            return (
                f"the ids of {old.name} in the samples table stand for other values than those the model was trained "
                f"with ({old.num_embeddings} and {new.num_embeddings} rows)"
            )
    return None


def _meaning(spec: FeatureSpec) -> dict[str, object]:
    """What a model's rows and a table's must have alike, by its name in words."""
    fitted = [f"{f.name} {f.mean} {f.deviation}" for f in spec.dense if f.scale == STANDARD]
    return {
        "scenarios": spec.scenarios,
        "query_scenarios": spec.query_scenarios,
        "categories": [f.name for f in spec.sparse],
        "numbers": [f.name for f in spec.dense],
        "what numbers were fitted to": fitted + [f"{f.name} {f.edges}" for f in spec.sparse if f.edges is not None],
        "tags and terms": [f"{f.name} ({f.length} of {', '.join(f.sources)})" for f in spec.lists],
        "vectors": [f"{f.name} ({f.length} over {f.scale})" for f in spec.vectors],
        "labels.no_order_scenarios": spec.no_order_scenarios,
        "histories.length": spec.history_length,
        "the labels' delay in microseconds": spec.label_delay_us,
        "labels.global_span": spec.label_day_span,
    }


def fingerprint(entries: pa.Table, feature: str, num_embeddings: int) -> tuple[int, str]:
    """num_embeddings, and a fingerprint of the feature's values whose ids are below it; `entries` as in the lake."""
    mask = pc.and_(pc.equal(entries["feature"], feature), pc.less(entries["id"], num_embeddings))
    rows = entries.filter(mask)
    return num_embeddings, fingerprint_text(_xor(zip(rows["id"].to_pylist(), rows["value"].to_pylist(), strict=True)))


def _xor(rows: Iterable[tuple[int, str]]) -> tuple[int, int]:
    high = low = 0
    for number, value in rows:
        digest = hashlib.md5(f"{number}:{value}".encode(), usedforsecurity=False).hexdigest()
        high ^= int(digest[:15], 16)
        low ^= int(digest[15:30], 16)
    return high, low


def _fingerprint_in(table: Manifest, feature: SparseFeature) -> tuple[int, str]:
    entries = read_vocabularies(table.table_uri.rpartition("/")[0], feature.vocabulary)
    return fingerprint(entries, feature.vocabulary, feature.num_embeddings)


def _same_ids(model: SparseFeature, table: SparseFeature) -> bool | None:
    """Whether the ids of one are the first ids of the other; None where the fingerprints do not tell."""
    ours, theirs = dict(model.fingerprints), dict(table.fingerprints)
    if not ours:  # event_hour, or a model that is older than fingerprints
        return True
    for rows in (model.num_embeddings, table.num_embeddings):
        if rows in ours and rows in theirs:
            return ours[rows] == theirs[rows]
    if HASHED in (*ours.values(), *theirs.values()) or model.num_embeddings > table.num_embeddings:
        return False
    return None


def _words(value: object) -> str:
    return (", ".join(map(str, value)) or "none") if isinstance(value, tuple | list) else str(value)
