"""The world with needs: what a need does by hand, what its dials do, and what the logs can tell of it."""

from __future__ import annotations

import filecmp
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from etl.sources.simulated import SimulatedDay, make_world, rows_of_day, simulate_days
from etl.sources.simulated_ceilings import AGES_S, RIDGE, WINDOW_S, Rows, area, ceilings, recent
from etl.sources.simulated_ceilings import _fitted as fitted
from etl.sources.simulated_needs import FIT, Needs, word
from etl.sources.simulated_world import World
from tests.unit.etl_sources.test_simulated import SMALL, recovered, write_logs
from usr_ray.config import DAY_US, Config, load_config

pytestmark = pytest.mark.integration

HOUR_US = 3_600_000_000


def config_of(*overrides: str) -> Config:
    return load_config(None, [*SMALL, 'simulated.world="needs"', *overrides])


def drawn(config: Config) -> tuple[World, list[SimulatedDay]]:
    world = make_world(config)
    return world, list(simulate_days(world, config))


def test_attribution_gives_back_exactly_the_drawn_labels(tmp_path: Path) -> None:
    config = config_of("simulated.num_users=40", "simulated.num_items=60", "simulated.late_rate=0.2")
    _, days = drawn(config)
    logs = write_logs(tmp_path / "logs", config)
    labels = recovered(logs, config)
    clicked, ordered = (np.concatenate([getattr(d.labels, n) for d in days]) for n in ("is_click_N", "is_order_N"))
    assert labels.is_click == {f"n{n}" for n in np.flatnonzero(clicked)}
    assert labels.is_order == {f"n{n}" for n in np.flatnonzero(ordered)}
    assert len(labels.is_order) > 80
    # Side tables: a row a need, a row an impression, the four ceilings of two scenarios and two tasks.
    needs = pq.read_table(logs / "needs").to_pylist()
    assert len(needs) > 50
    assert all(row["born_time"] < row["end_time"] for row in needs)
    assert {row["scenario"] for row in needs} == {"search", "recommendation"}
    truth = pq.read_table(logs / "truth").to_pydict()
    assert truth["need_log_odds"] == pytest.approx(np.concatenate([day.labels.bonus_N for day in days]).tolist())
    found = pq.read_table(logs / "ceilings").to_pylist()
    assert [(row["scenario"], row["task"]) for row in found] == [
        (scenario, task) for scenario in config.scenarios for task in ("ctr", "ctcvr")
    ]


def test_the_same_seed_writes_the_same_bytes(tmp_path: Path) -> None:
    first, second = (write_logs(tmp_path / name, config_of()) for name in "ab")
    files = sorted(path.relative_to(first) for path in first.rglob("*.parquet"))
    assert len(files) == 10
    assert all(filecmp.cmp(first / file, second / file, shallow=False) for file in files)


def test_a_need_by_hand() -> None:
    config = config_of("simulated.need_strength=2.0", "simulated.need_carry=0.25")
    world = make_world(config)
    item = 7
    category, brand, is_cheap = world.item_category_I[item], world.item_brand_I[item], world.shop.is_cheap_I[item]
    one = np.array([3]), np.array([category]), np.array([brand]), np.array([not is_cheap])
    needs = Needs(*one, np.array([0]), np.array([5 * HOUR_US]), np.array([30 * HOUR_US]), np.array([False]))
    other = int(np.flatnonzero(world.item_category_I != category)[0])
    rows = [  # user, item, hour, scenario, log odds
        (3, item, 5, 0, 0.0),  # not before its birth has passed
        (3, item, 6, 0, 2.0 * (FIT[0] + FIT[1])),
        (3, item, 6, 1, 0.25 * 2.0 * (FIT[0] + FIT[1])),
        (3, item, 30, 0, 2.0 * (FIT[0] + FIT[1])),
        (3, item, 31, 0, 0.0),
        (3, other, 6, 0, 0.0),
        (4, item, 6, 0, 0.0),
    ]
    user_N, item_N, hour_N, scenario_N, expected = (np.array(column) for column in zip(*rows, strict=True))
    need_N = needs.of_rows(world, user_N.astype(int), item_N.astype(int), hour_N.astype(np.int64) * HOUR_US)
    found = needs.bonus(world, config.simulated, need_N, item_N.astype(int), scenario_N.astype(int))
    assert found.tolist() == pytest.approx(expected.tolist())
    ended = needs.ended(np.array([0, 0]), np.array([9 * HOUR_US, 8 * HOUR_US]))
    assert (ended.dies_us_K.tolist(), ended.is_ordered_K.tolist()) == ([8 * HOUR_US], [True])
    again = ended.and_new(needs, config.simulated.num_categories)
    assert len(again) == 1, "one need of a user in a category at a time"


def test_no_need_outlives_its_first_order_and_none_lives_longer_than_two_days() -> None:
    world, days = drawn(config_of("simulated.num_impressions=24000"))
    num_ordered = 0
    for day in days:
        needs = day.needs
        assert needs is not None
        life = needs.dies_us_K - needs.born_us_K
        assert life.max() <= 2 * DAY_US
        assert life[~needs.is_ordered_K].min() >= DAY_US // 2
        time_N = day.number * DAY_US + day.plan.time_us_R[day.shown.request_N]
        need_N = needs.of_rows(world, day.user_N, day.shown.item_N, time_N)
        for row in np.flatnonzero(
            (day.labels.is_order_N | day.labels.is_late_order_N) & (need_N >= 0)
        ):  # carry is 1: every fitting order ends it
            assert needs.dies_us_K[need_N[row]] == time_N[row]
            num_ordered += 1
        assert ((day.labels.bonus_N > 0) == (need_N >= 0)).all()
    assert num_ordered > 30


def test_who_never_searches_has_no_query_and_a_need_is_what_is_searched_for() -> None:
    config = config_of("simulated.num_impressions=24000", "simulated.num_users=400", "simulated.searcher_share=0.4")
    world, days = drawn(config)
    users = np.concatenate([day.plan.user_R[day.plan.query_R >= 0] for day in days])
    assert world.shop.is_searcher_U.mean() == pytest.approx(0.4, abs=0.08)
    assert world.shop.is_searcher_U[users].all()
    for day in days:
        assert day.needs is not None
        rows = np.flatnonzero(day.plan.need_R >= 0)
        need = day.plan.need_R[rows]
        assert len(rows) > 100
        assert (day.needs.user_K[need] == day.plan.user_R[rows]).all()
        assert (day.needs.category_K[need] == day.plan.query_R[rows] % config.simulated.num_categories).all()
    off_topic = np.concatenate([day.plan.is_off_topic_R[day.plan.query_R >= 0] for day in days])
    assert 0.08 < off_topic.mean() < 0.18


def test_without_searchers_only_the_closing_impression_is_in_search(tmp_path: Path) -> None:
    logs = write_logs(tmp_path / "logs", config_of("simulated.searcher_share=0", "data.eval_dates='2030-01-01'"))
    assert pq.read_table(logs / "search_impressions")["impression_id"].to_pylist() == ["end"]
    assert {row["scenario"] for row in pq.read_table(logs / "needs").to_pylist()} == {"recommendation"}
    search, _, feed, _ = pq.read_table(logs / "ceilings").to_pylist()
    assert np.isnan(search["truth"])
    assert feed["truth"] > feed["joint"] == pytest.approx(feed["own"], abs=1e-9) != 0.5


def test_queries_and_titles_share_their_words(tmp_path: Path) -> None:
    logs = write_logs(tmp_path / "logs", config_of())
    titles = [row["title"].split() for row in pq.read_table(logs / "items").to_pylist()]
    queries = {q for q in pq.read_table(logs / "search_impressions")["query"].to_pylist() if q != "query 0"}
    assert len(queries) > 60
    words = {word for query in queries for word in query.split()}
    assert {brand for brand, _, _ in titles} & words
    assert {category for _, category, _ in titles} & words
    assert {"cheap", "premium"} <= words
    assert len({word(n) for n in range(20_000)}) == 20_000


def test_what_the_past_shows_is_counted_as_a_slow_loop_counts_it() -> None:
    rng = np.random.default_rng(0)
    key_E, time_E = rng.integers(0, 4, 60), rng.integers(0, 3 * WINDOW_S, 60)
    key_N, time_N = rng.integers(0, 5, 80), rng.integers(0, 3 * WINDOW_S, 80)
    key_N[:20], time_N[:20] = key_E[:20], time_E[:20]
    count_N, age_N = recent(key_E, time_E, key_N, time_N)
    for n in range(80):
        ages = [time_N[n] - t for k, t in zip(key_E, time_E, strict=True) if k == key_N[n]]
        ages = [age for age in ages if 0 < age < WINDOW_S]
        assert count_N[n] == len(ages)
        assert not ages or age_N[n] == min(ages)
    assert recent(key_E[:0], time_E[:0], key_N, time_N)[0].sum() == 0
    assert max(AGES_S) < WINDOW_S


def test_the_fit_and_the_area_equal_scikit_learns() -> None:
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score

    rng = np.random.default_rng(1)
    x = rng.standard_normal((4000, 3))
    label = rng.random(4000) < 1 / (1 + np.exp(-(x @ [0.5, -0.3, 0.0] - 1)))
    with_ones = np.concatenate([np.ones((4000, 1)), x], axis=1)
    probs = fitted(with_ones, np.zeros(4000), label, np.ones(4000, dtype=bool))
    model = LogisticRegression(C=1 / RIDGE, fit_intercept=False, tol=1e-8).fit(with_ones, label)
    assert probs == pytest.approx(model.predict_proba(with_ones)[:, 1], abs=1e-4)
    rounded = np.round(probs, 1)
    assert area(label, rounded) == pytest.approx(roc_auc_score(label, rounded))
    assert np.isnan(area(np.zeros(3, dtype=bool), np.arange(3.0)))


def gains(carry: float) -> dict[str, float]:
    """Held-out click AUC that the other scenario's past adds, in the sparse scenario."""
    dials = [f"simulated.need_carry={carry}", "simulated.need_strength=5", "simulated.num_users=800"]
    config = load_config(None, ['simulated.world="needs"', "simulated.num_impressions=80000", *dials])
    world, days = drawn(config)
    rows = Rows.joined([rows_of_day(world, config.simulated, day) for day in days])
    search, _, feed, _ = ceilings(rows, 2, config.simulated.num_categories, config.simulated.num_days - 2)
    assert (search["scenario"], feed["scenario"], feed["task"]) == (0, 1, "ctr")
    return {name: float(str(feed[name])) for name in ("truth", "joint", "own", "no_needs")}


def test_joined_logs_tell_more_of_a_need_that_carries_and_nothing_more_of_one_that_does_not() -> None:
    carried, kept = gains(1.0), gains(0.0)
    for found in (carried, kept):
        assert found["truth"] > found["joint"] > found["no_needs"] + 0.005
        assert found["own"] > found["no_needs"] + 0.005
    assert carried["joint"] - carried["own"] > 0.006
    assert kept["joint"] - kept["own"] < 0.003
