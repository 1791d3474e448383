"""The contract between Spark and Ray: scenarios, tasks, columns and the FeatureSpec. Standard library only.

Spark writes the samples table in exactly these columns; the reader, the model and the loss read them back by the
same names. A column is added here first, then in `docs/tables.md`.
"""

from __future__ import annotations

import itertools
import json
from dataclasses import asdict, dataclass
from typing import Any

PADDING_ID = 0
"""Encoded id of an empty place in a history or of a missing value (a recommendation row has no query)."""
UNKNOWN_ID = 1
"""Encoded id of a value the vocabulary did not admit."""
FIRST_ID = 2
"""Encoded id of the first admitted value."""

ACTION_CLICK = 1
ACTION_ORDER = 2
NUM_ACTIONS = 3
"""Padding, click, order."""

TASKS = ("ctr", "ctcvr")
"""Main tasks, in the order of every T axis. Task names are also the keys of metrics.json."""
OF_ORDERS = ("p_ctcvr", "p_ctcvr_global")
"""Probabilities that are null in scenarios whose orders nobody logs: no model can learn them there."""
LABELS = ("is_click", "is_order")
"""Label column of each task, in the order of TASKS."""
GLOBAL_LABELS = ("is_click_global", "is_order_global")
"""Global label column of each task, in the order of TASKS."""
ALL_LABELS = LABELS + GLOBAL_LABELS
"""The label axis of a batch (labels_BT): is_click, is_order, is_click_global, is_order_global."""
ORDERS = [1, 3]
"""Places of the labels of orders on that axis."""
LABEL_ORDER = (
    ("is_order", "is_click"),
    ("is_click", "is_click_global"),
    ("is_order", "is_order_global"),
    ("is_order_global", "is_click_global"),
)
"""Pairs (a, b) with a <= b on every row; checked by ETL (Delta CHECK) and by the decoder; the loss relies on it."""

OPEN_LABEL = -1.0
"""Stands in a training batch for a label that is not final when training starts (data.final_labels), which is no 0."""

SAMPLES = "samples"
VOCABULARIES = "vocabularies"
ITEM_FEATURES = "item_features"
VECTOR_TABLES = {"user": "user_vectors", "item": "item_vectors"}
"""Owner -> table of the vectors of users or of items."""
COUNTERS = "counters"
STATE = "state"
"""Table of what builds keep for later ones: every attributed click and order of a user, and counts of values."""
PAST_CLICK, PAST_ORDER = 4, 5
"""`kind` of an event in the state."""
REJECTS = "rejects"
REPORTS = "reports"
PINS = "pins"
"""Folder of a lake: one JSON file a run that has begun and not finished, with the samples' files that it reads."""
PARTITION_COLUMN = "impression_date"
IN_EXPERIMENT, NO_BUCKET, SEVERAL_BUCKETS, UNPLANNED_BUCKET = (
    "in the experiment",
    "no bucket",
    "several buckets",
    "unplanned",
)
"""Where the users of an experiment's counts stand (etl/build/experiment.py, evaluation/experiment.py)."""
EXPERIMENT_USERS = "\nusers"
"""Stands for a scenario in the rows that count users by status; no scenario can have this name."""
EXPERIMENT_ORDERS = "\norders"
"""The same for the scenarios together whose orders are logged, where those of others are not."""
CONFIG_PROPERTY = "usr_ray.etl_config"
"""Delta table property of the samples: the configuration keys that decide what a row means (Config.row_meaning)."""
FITTED_PROPERTY = "usr_ray.fitted"
"""Delta table property of the samples: JSON of the dates that vocabularies and scales were fitted on, and of the last
vocabulary.min_count."""
NULLS_PROPERTY = "usr_ray.null_values"
"""Delta table property of the samples: JSON of each log's `null_values`, as the newest build had them."""
FEATURE_SPEC_PROPERTY = "usr_ray.feature_spec"
"""Delta table property of `<lake>/samples` with the FeatureSpec as JSON.

It is set before the data it describes is committed: vocabularies only grow, so a spec that is early is safe and
one that is late would give ids outside the embedding tables.
"""
ITEM_FEATURES_PROPERTY = "usr_ray.item_features_version"
"""Delta table property of `<lake>/samples` with the version of `<lake>/item_features` that belongs to its rows."""
VECTORS_PROPERTIES = {owner: f"usr_ray.{table}_version" for owner, table in VECTOR_TABLES.items()}
"""Owner -> Delta table property of `<lake>/samples` with the version of its vectors that belongs to the rows."""


HASHED = "xxhash64"
"""Fingerprint of a feature whose ids are hashes of its values: with the number of buckets it says all."""
MAX_FINGERPRINTS = 64
"""Newest ones that a feature keeps."""


def fingerprint_text(halves: tuple[int, int]) -> str:
    """The 30 hex digits of a vocabulary's fingerprint (usr_ray/data/lineage.py), of its two halves of 60 bits."""
    return f"{halves[0]:015x}{halves[1]:015x}"


def index_column(feature: str) -> str:
    """Column of the encoded id (bigint) of a categorical feature."""
    return f"{feature}_index"


def list_column(feature: str) -> str:
    """Column of the encoded ids (array<bigint>) of tags or terms."""
    return f"{feature}_indices"


def cold_column(key: str) -> str:
    """Column (boolean) of a table of vectors: true where the vocabulary of `key` has the id for its vector alone."""
    return f"{key}_is_cold"


def scaled_column(feature: str) -> str:
    """Column of the scaled value (float) of a number feature."""
    return f"{feature}_scaled"


@dataclass(frozen=True, kw_only=True, slots=True)
class HistoryColumns:
    """Column names of one scenario's history; `query_ids` is None where the scenario has no queries."""

    scenario: str
    item_ids: str
    actions: str
    ages_s: str
    query_ids: str | None


def history_columns(scenario: str, *, has_query: bool) -> HistoryColumns:
    """Names of the history columns of `scenario`: `<scenario>_history_item_ids` and so on."""
    prefix = f"{scenario}_history"
    return HistoryColumns(
        scenario=scenario,
        item_ids=f"{prefix}_item_ids",
        actions=f"{prefix}_actions",
        ages_s=f"{prefix}_ages_s",
        query_ids=f"{prefix}_query_ids" if has_query else None,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class SparseFeature:
    """One categorical feature: its encoded column and the size of its embedding table."""

    name: str
    """Feature name, also the `feature` of the vocabularies table and the name of the embedding table."""
    column: str
    """Samples column with the encoded id (bigint, never null: 0 padding, 1 unknown)."""
    num_embeddings: int
    """Rows of the table: largest id + 1, padding and unknown included."""
    owner: str
    """'user', 'item', 'query' or 'context': what the feature describes."""
    fingerprints: tuple[tuple[int, str], ...] = ()
    """(num_embeddings, fingerprint of the values below it) after each build that added values, the newest last; of
    hashed ids (num_embeddings, HASHED). Empty for event_hour, which has no vocabulary, and in older tables."""
    edges: tuple[float, ...] | None = None
    """Lower edges of a number's buckets, ascending, without the first bucket's; None: values have ids."""

    @property
    def vocabulary(self) -> str:
        """Its `feature` in the vocabularies table."""
        return self.name

    @property
    def nothing(self) -> int:
        """Encoded id where there is no value: padding, or a number's own bucket of nulls."""
        return PADDING_ID if self.edges is None else UNKNOWN_ID


TERM = "term"
"""Vocabulary and embedding table of all terms, of queries and of items."""
QUERY_TERMS, ITEM_TERMS = "query_terms", "item_terms"


@dataclass(frozen=True, kw_only=True, slots=True)
class ListFeature(SparseFeature):
    """Tags or terms: several values a row, each once; its column (array<bigint>) holds no null and no padding."""

    table: str
    """Vocabulary and embedding table: its own name of tags, TERM of terms."""
    length: int
    """Most values of a row."""
    sources: tuple[str, ...]
    """Columns of the logs whose text it is made of."""

    @property
    def vocabulary(self) -> str:
        """See SparseFeature."""
        return self.table

    @property
    def key(self) -> str:
        """What decides the values: the id of a user or item, the query, or the column of the impression itself."""
        keys = {"user": "user_id", "item": "item_id"} | ({"query": "query"} if self.table == TERM else {})
        return keys.get(self.owner, self.name)


LOG1P, STANDARD, BUCKETS = "log1p", "standard", "buckets"
SCALES = (LOG1P, "none", STANDARD, BUCKETS)
"""How a number x becomes a column: sign(x) log1p(|x|); x itself; (x - mean) / deviation; or the id of its bucket."""
FITTED_SCALES = (STANDARD, BUCKETS)
"""Those that the values of the training dates decide."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DenseFeature:
    """One number feature, scaled by ETL; null became 0. A counter's name is that of its column."""

    name: str
    column: str
    owner: str
    """See SparseFeature."""
    scale: str = LOG1P
    """One of SCALES, but never BUCKETS: such a number is a sparse feature."""
    mean: float = 0.0
    deviation: float = 1.0
    """Fitted mean and deviation of STANDARD."""


@dataclass(frozen=True, kw_only=True, slots=True)
class VectorFeature:
    """A vector of each user or item, made elsewhere; held once an encoded id and never trained."""

    name: str
    """Also its column in the table of its owner's vectors."""
    owner: str
    """'user' or 'item'."""
    length: int
    scale: float = 1.0
    """Root mean square of the numbers that the first build found: the table holds vectors divided by it."""

    @property
    def key(self) -> str:
        """The feature whose ids it goes by, `user_id` or `item_id`."""
        return f"{self.owner}_id"


_AS_BEFORE = {"scale": LOG1P, "mean": 0.0, "deviation": 1.0}
_LATER_KEYS = ("history_item_features", "lists", "vectors")


@dataclass(frozen=True, kw_only=True, slots=True)
class FeatureSpec:
    """What a samples table offers a model. Saved as a table property, in each manifest and in each checkpoint."""

    scenarios: tuple[str, ...]
    query_scenarios: tuple[str, ...]
    sparse: tuple[SparseFeature, ...]
    """Always starts with user_id, item_id, query."""
    dense: tuple[DenseFeature, ...]
    history_length: int
    label_delay_us: int
    """W_g + W_o in microseconds: a row's labels are final this long after event_time."""
    label_day_span: bool = False
    """True for labels.global_span = "day": the delay then counts from the end of the impression's UTC day."""
    no_order_scenarios: tuple[str, ...] = ()
    """Scenarios whose logs have no orders (labels.no_order_scenarios): is_order and is_order_global are 0 on their
    rows because nobody looked, so neither the loss nor a metric takes them for labels."""
    history_item_features: tuple[str, ...] = ()
    """Sparse features of items that `<lake>/item_features` holds by encoded item id, for the events of histories."""
    lists: tuple[ListFeature, ...] = ()
    """Tags and terms; those of one vocabulary stand together."""
    vectors: tuple[VectorFeature, ...] = ()
    """Those of users come before those of items."""

    @property
    def vocabularies(self) -> dict[str, SparseFeature]:
        """Vocabulary, and so embedding table -> a feature of it, in the order of `sparse` and then `lists`."""
        return {feature.vocabulary: feature for feature in (*self.sparse, *self.lists)}

    @property
    def list_places(self) -> dict[str, tuple[int, int]]:
        """First column and end of each feature of `lists` where all of them stand side by side, padded."""
        ends = list(itertools.accumulate(feature.length for feature in self.lists))
        return {f.name: (end - f.length, end) for f, end in zip(self.lists, ends, strict=True)}

    @property
    def histories(self) -> tuple[HistoryColumns, ...]:
        """History columns, one entry a scenario, in the order of `scenarios`."""
        return tuple(history_columns(s, has_query=s in self.query_scenarios) for s in self.scenarios)

    @property
    def known_labels(self) -> tuple[tuple[bool, ...], ...]:
        """Whether rows of a scenario know the labels of a task, its own and its global one; (S, T), T as in TASKS."""
        return tuple(tuple(task == "ctr" or s not in self.no_order_scenarios for task in TASKS) for s in self.scenarios)

    def sparse_feature(self, name: str) -> SparseFeature:
        """The sparse feature called `name`; KeyError when the table has none."""
        for feature in self.sparse:
            if feature.name == name:
                return feature
        raise KeyError(name)

    def to_json(self) -> str:
        """One line of JSON with sorted keys; `from_json` reads it back equal."""
        raw = asdict(self)
        for name in _LATER_KEYS:
            if not raw[name]:  # as it was written before there was such a key: old checkpoints still fit their tables
                del raw[name]
        for feature in (*raw["sparse"], *raw.get("lists", ())):  # likewise
            if feature["edges"] is None:
                del feature["edges"]
        for feature in raw["dense"]:
            for name, default in _AS_BEFORE.items():
                if feature[name] == default:
                    del feature[name]
        return json.dumps(raw, sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> FeatureSpec:
        """Inverse of `to_json`. Raises ValueError when a field is missing or unknown."""
        raw: dict[str, Any] = json.loads(text)
        try:
            raw["sparse"] = tuple(SparseFeature(**_with_fingerprints(f)) for f in raw["sparse"])
            raw["lists"] = tuple(
                ListFeature(**{**_with_fingerprints(f), "sources": tuple(f["sources"])}) for f in raw.get("lists", ())
            )
            raw["vectors"] = tuple(VectorFeature(**f) for f in raw.get("vectors", ()))
            raw["dense"] = tuple(DenseFeature(**f) for f in raw["dense"])
            raw["scenarios"] = tuple(raw["scenarios"])
            raw["query_scenarios"] = tuple(raw["query_scenarios"])
            for name in ("no_order_scenarios", "history_item_features"):
                raw[name] = tuple(raw.get(name, ()))
            return cls(**raw)
        except (KeyError, TypeError) as error:
            raise ValueError(f"not a feature spec: {error}") from error


def _with_fingerprints(feature: dict[str, Any]) -> dict[str, Any]:
    edges = {"edges": tuple(feature["edges"])} if "edges" in feature else {}
    return {**feature, **edges, "fingerprints": tuple((n, h) for n, h in feature.get("fingerprints", ()))}
