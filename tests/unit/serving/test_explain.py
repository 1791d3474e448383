"""Effects of signals on a request, against a slow reference that replaces one value of one candidate at a time."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.unit.random_batches import make_lists
from tests.unit.samples_table import samples_spec
from usr_ray.schema import FIRST_ID, DenseFeature
from usr_ray.serving.explain import Explainer, effects_of
from usr_ray.serving.ranker import RequestError

pytestmark = pytest.mark.unit
SPEC = samples_spec()
CLICKED, QUERIED = SPEC.histories[0].item_ids, SPEC.histories[0].query_ids


def predict(inputs: Any) -> dict[str, Any]:
    """p_ctr that every signal has its part in, those of an item together with its brand."""
    item, brand = inputs["item_sparse"].T
    price = inputs["item_dense"][:, 0]
    user, query, hour = inputs["request_sparse"][0]
    own = 0.01 * item + 0.02 * brand + 0.003 * item * brand + 0.1 * price
    rest = 0.005 * user + 0.001 * query * item + 0.002 * hour + 0.04 * inputs["request_dense"][0, 0]
    return {"p_ctr": (own + rest + 0.01 * inputs[CLICKED].sum()).astype(np.float64)}


def inputs_of(num_candidates: int) -> dict[str, Any]:
    rng = np.random.default_rng(num_candidates)
    inputs = {
        "item_sparse": rng.integers(FIRST_ID, 8, (num_candidates, 2)),
        "item_dense": rng.normal(size=(num_candidates, 1)).astype(np.float32),
        "request_sparse": np.array([[5, 7, 3]]),
        "request_dense": np.array([[1.5]], dtype=np.float32),
    }
    for names in SPEC.histories:
        for name in (names.item_ids, names.actions, names.ages_s, names.query_ids):
            if name is not None:
                inputs[name] = np.zeros((1, SPEC.history_length), dtype=np.int64)
    inputs[SPEC.histories[0].actions][0, -2:] = 1, 2
    inputs[CLICKED][0, -2:] = 9, 4
    inputs[SPEC.histories[0].ages_s][0, -2:] = 60, 30
    inputs[QUERIED][0, -2:] = 0, 6
    return inputs


def replaced(inputs: dict[str, Any], name: str, row: int, column: int, value: Any) -> float:
    changed = inputs[name].copy()
    changed[row, column] = value
    return float(predict({**inputs, name: changed})["p_ctr"][row])


@pytest.mark.parametrize("num_candidates", [1, 2, 6])
def test_each_signal_s_effect_is_the_mean_change_with_the_others_values(num_candidates: int) -> None:
    inputs = inputs_of(num_candidates)
    found = effects_of(predict, inputs, SPEC)
    base = predict(inputs)["p_ctr"]
    for signal, name, column, default in (
        ("item_id", "item_sparse", 0, 1),
        ("brand", "item_sparse", 1, 0),
        ("price", "item_dense", 0, 0),
    ):
        for n in range(num_candidates):
            others = [inputs[name][m, column] for m in range(num_candidates) if m != n] or [default]
            mean = np.mean([replaced(inputs, name, n, column, value) for value in others])
            assert found[signal][n] == pytest.approx(base[n] - mean)
    items = inputs["item_sparse"][:, 0]
    np.testing.assert_allclose(found["user"], 0.005 * (5 - 1) + 0.04 * 1.5)  # the unknown user is 1
    np.testing.assert_allclose(found["query"], 0.007 * items)
    np.testing.assert_allclose(found["context"], 0.006)
    np.testing.assert_allclose(found["history of search"], 0.13)
    assert set(found) == {"item_id", "brand", "price", "user", "query", "context", "history of search"}


def test_tags_and_terms_are_signals_too() -> None:
    """Those of items by the others', whole; those of the request by nothing, with what else is its owner's."""
    spec = samples_spec(lists=make_lists(9))
    inputs = inputs_of(3) | {
        "tags_indices": np.array([[2, 3], [4, 0], [0, 0]]),
        "item_terms_indices": np.zeros((3, 4), dtype=np.int64),
        "hobbies_indices": np.array([[7, 0, 0]]),
        "intents_indices": np.zeros((1, 2), dtype=np.int64),
        "moods_indices": np.array([[5]]),
        "query_terms_indices": np.array([[3, 6, 0]]),
    }

    def with_lists(given: Any) -> dict[str, Any]:
        own = 0.01 * given["tags_indices"].sum(1) + 0.1 * given["item_terms_indices"].sum(1)
        shared = sum(given[f"{name}_indices"].sum() for name in ("hobbies", "moods", "query_terms"))
        return {"p_ctr": predict(given)["p_ctr"] + own + 0.001 * shared}

    found = effects_of(with_lists, inputs, spec)
    np.testing.assert_allclose(found["tags"], [0.05 - 0.02, 0.04 - 0.025, 0 - 0.045], atol=1e-12)
    np.testing.assert_allclose(found["item_terms"], 0, atol=1e-12)
    plain = effects_of(predict, inputs_of(3), SPEC)
    for owner, ids in (("user", 7), ("context", 5), ("query", 9)):
        np.testing.assert_allclose(found[owner] - plain[owner], 0.001 * ids, atol=1e-12)


def test_the_columns_of_a_counter_are_one_signal() -> None:
    names = ["counter_user_brand_1d_clicks", "counter_user_brand_all_ctr", "counter_item_7d_clicks"]
    more = [DenseFeature(name=name, column=name, owner="item") for name in names]
    spec = replace(SPEC, dense=(*SPEC.dense, *more))
    inputs = inputs_of(2)
    inputs["item_dense"] = np.column_stack([inputs["item_dense"], [[1, 10, 5], [3, 40, 5]]])

    def with_counters(given: Any) -> dict[str, Any]:
        return {"p_ctr": predict(given)["p_ctr"] + given["item_dense"][:, 1:].sum(1)}

    found = effects_of(with_counters, inputs, spec)
    assert {name for name in found if name.startswith("counter")} == {"counter_user_brand", "counter_item"}
    np.testing.assert_allclose(found["counter_user_brand"], [11 - 43, 43 - 11])
    np.testing.assert_allclose(found["counter_item"], 0, atol=1e-12)


def test_of_many_candidates_eight_others_stand_for_all() -> None:
    sizes = []

    def counted(inputs: Any) -> dict[str, Any]:
        sizes.append(len(inputs["item_sparse"]))
        return predict(inputs)

    effects_of(counted, inputs_of(30), SPEC)
    assert max(sizes) == 8 * 30


def explainer() -> Explainer:
    def answered(request: Any, encoded: Any, *, ranked: bool) -> dict[str, Any]:
        assert encoded[0] is encodings[-1][0]
        return {"items": [{"id": name} for name in request.candidates], "ranked": ranked}

    def encode(request: Any) -> Any:
        encodings.append((inputs_of(len(request.candidates)), {}, False))
        return encodings[-1]

    encodings: list[Any] = []

    names = {"item_id": {9: "shoe", 4: "hat"}, "query": {6: "hats"}}
    encoder = SimpleNamespace(spec=SPEC, values=lambda feature: names[feature])

    def checked(raw: Any) -> Any:
        return SimpleNamespace(candidates=raw["candidates"], time_us=0)

    ranker: Any = SimpleNamespace(
        encoder=encoder, checked=checked, answered=answered, predict=predict, encoded=encode, encodings=encodings
    )
    return Explainer(ranker)


def test_the_history_is_what_the_model_saw_and_every_candidate_is_explained() -> None:
    found = explainer()
    answer = found.answer({"candidates": ["a", "b"], "k": 1})
    assert len(found._ranker.encodings) == 1, "it is encoded once"
    assert answer["history"] == [
        {"scenario": "search", "action": "order", "item": "hat", "query": "hats", "age_s": 30.0},
        {"scenario": "search", "action": "click", "item": "shoe", "query": None, "age_s": 60.0},
    ]
    assert [item["id"] for item in answer["items"]] == ["a", "b"]
    assert answer["items"][0]["signals"]["context"] == pytest.approx(0.006)
    assert (answer["ranked"], answer["time"]) == (False, "1970-01-01T00:00:00+00:00")


def test_too_many_candidates_are_not_explained() -> None:
    with pytest.raises(RequestError, match=r"^candidates: 101; 100 are the most that are explained$"):
        explainer().answer({"candidates": ["a"] * 101})
