"""The simulated source: labels that attribution recovers, probabilities that are true, dials that do what they say."""

from __future__ import annotations

import filecmp
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from etl.sources.simulated import SimulatedDay, make_world, simulate_days, write_simulated
from etl.sources.simulated_world import World
from etl.sources.writer import LogWriter
from tests.unit.plain_attribution import Labels, attribute, read_rows
from usr_ray.config import Config, load_config

pytestmark = pytest.mark.integration

SMALL = (
    "simulated.num_impressions=8000",
    "simulated.num_days=3",
    "simulated.num_users=200",
    "simulated.num_items=150",
    "simulated.num_queries=40",
    "simulated.num_categories=8",
)
HOUR_US = 3_600_000_000
MEDIUM = ("simulated.num_impressions=60000", "simulated.num_users=600", "simulated.num_items=400")


def small_config(*overrides: str) -> Config:
    return load_config(None, [*SMALL, *overrides])


def write_logs(folder: Path, config: Config) -> Path:
    with LogWriter(folder) as writer:
        write_simulated(Path(), writer, config)
        writer.commit({})
    return folder


def drawn(config: Config) -> tuple[World, list[SimulatedDay]]:
    world = make_world(config)
    return world, list(simulate_days(world, config))


def joined(days: list[SimulatedDay], name: str) -> np.ndarray:
    return np.concatenate([getattr(day.labels, name) for day in days])


def recovered(logs: Path, config: Config) -> Labels:
    labels = config.labels
    return attribute(
        logs,
        list(config.scenarios),
        click_us=labels.click_window_us,
        order_us=labels.order_window_us,
        global_us=labels.global_window_us,
    )


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        # Busy users, many repeats, many late events: where a click or an order could be credited to a wrong row.
        (
            "simulated.num_users=25",
            "simulated.num_items=40",
            "simulated.late_rate=0.2",
            "simulated.cross_exposure=0.5",
            "simulated.unnamed_click_rate=0.5",
            "simulated.duplicate_rate=0.2",
        ),
        (
            "labels.click_window=10 minutes",
            "labels.order_window=72 hours",
            "labels.global_window=5 hours",
            "simulated.num_users=40",
            "simulated.late_rate=0.3",
        ),
        (
            "simulated.link_loss=0.5",
            "simulated.num_users=25",
            "simulated.num_items=40",
            "simulated.late_rate=0.2",
            "simulated.cross_exposure=0.5",
        ),
        ('scenarios=["feed"]', "query_scenarios=[]"),
        ('scenarios=["search", "feed", "cart", "home"]', 'query_scenarios=["search", "cart"]'),
    ],
    ids=["default", "crowded", "other windows", "lost links", "one scenario", "four scenarios"],
)
def test_attribution_gives_back_exactly_the_drawn_labels(tmp_path: Path, overrides: tuple[str, ...]) -> None:
    config = small_config(*overrides)
    _, days = drawn(config)
    labels = recovered(write_logs(tmp_path / "logs", config), config)
    clicked, ordered = joined(days, "is_click_N"), joined(days, "is_order_N")
    assert labels.is_click == {f"n{n}" for n in np.flatnonzero(clicked)}
    assert labels.is_order == {f"n{n}" for n in np.flatnonzero(ordered)}
    assert len(labels.is_order) > 80
    # What is rejected is what came late, nothing else.
    assert {c["click_id"] for c in labels.rejected_clicks} == {
        f"c{n}" for n in np.flatnonzero(joined(days, "is_late_click_N"))
    }
    assert all(order["order_id"].startswith("late-") for order in labels.rejected_orders)
    assert labels.rejected_orders


def test_every_label_is_final_at_the_newest_event(tmp_path: Path) -> None:
    config = small_config("simulated.late_rate=0", "labels.global_window=3 hours")
    logs = write_logs(tmp_path / "logs", config)
    shown = [row for s in config.scenarios for row in read_rows(logs, f"{s}_impressions")]
    *_, last, end = sorted(shown, key=lambda row: row["event_time"])
    assert end["impression_id"] == "end"
    assert end["event_time"] == (last["event_time"] // (24 * HOUR_US) + 1) * 24 * HOUR_US + (3 + 24) * HOUR_US
    assert recovered(logs, config).rejected_orders == []


def test_counts_are_as_configured(tmp_path: Path) -> None:
    config = small_config("simulated.duplicate_rate=0.1")
    logs = write_logs(tmp_path / "logs", config)
    rows = [row for s in config.scenarios for row in read_rows(logs, f"{s}_impressions")]
    rows = [row for row in rows if row["impression_id"] != "end"]
    ids = {row["impression_id"] for row in rows}
    assert len(ids) == 8_000
    assert len(rows) == pytest.approx(8_000 * 1.1, rel=0.02)
    assert len(read_rows(logs, "truth")) == 8_000
    start_us = 1_767_225_600_000_000  # 2026-01-01T00:00:00Z
    per_day = np.bincount(
        [(row["event_time"] - start_us) // (24 * HOUR_US) for row in rows if row["impression_id"] in ids]
    )
    assert len(per_day) == 3
    assert per_day == pytest.approx(np.full(3, 2933), rel=0.05)
    unnamed = [row["impression_id"] is None for s in config.scenarios for row in read_rows(logs, f"{s}_clicks")]
    assert np.mean(unnamed) == pytest.approx(0.05, abs=0.02)


def test_requests_share_time_and_query_and_never_repeat_an_item(tmp_path: Path) -> None:
    config = small_config("simulated.duplicate_rate=0", "simulated.num_items=40", "simulated.cross_exposure=0.5")
    logs = write_logs(tmp_path / "logs", config)
    for scenario in config.scenarios:
        requests: dict[str, list[dict]] = {}
        for row in read_rows(logs, f"{scenario}_impressions"):
            requests.setdefault(row["request_id"], []).append(row)
        for rows in requests.values():
            assert len({(row["user_id"], row["event_time"], row["query"]) for row in rows}) == 1
            assert len({row["item_id"] for row in rows}) == len(rows) <= 8
            assert sorted(row["position"] for row in rows) == list(range(len(rows)))
            assert (rows[0]["query"] is not None) == (scenario == "search")
    assert len(requests) > 500


def test_labels_are_drawn_from_the_written_probabilities(tmp_path: Path) -> None:
    config = small_config("simulated.late_rate=0.1", "simulated.num_impressions=24000")
    labels = recovered(write_logs(tmp_path / "logs", config), config)
    truth = pq.read_table(tmp_path / "logs" / "truth").to_pydict()
    for chosen, name in ((labels.is_click, "p_click"), (labels.is_order, "p_order")):
        y = np.array([i in chosen for i in truth["impression_id"]], dtype=float)
        p = np.array(truth[name])
        for low, high in ((0, 1), *zip(np.quantile(p, (0, 0.5, 0.9)), np.quantile(p, (0.5, 0.9, 1)), strict=True)):
            rows = (p >= low) & (p <= high)
            deviations = (y[rows].sum() - p[rows].sum()) / np.sqrt((p[rows] * (1 - p[rows])).sum())
            assert abs(deviations) < 4, (name, low, high)


def test_rates_meet_their_targets_and_differ_by_scenario() -> None:
    _, days = drawn(load_config(None, MEDIUM))
    scenario = np.concatenate([day.scenario_N for day in days])
    clicked, ordered = joined(days, "is_click_N"), joined(days, "is_order_N")
    assert clicked[scenario == 0].mean() == pytest.approx(0.22, abs=0.02)
    assert clicked[scenario == 1].mean() == pytest.approx(0.16, abs=0.02)
    assert ordered[(scenario == 0) & clicked].mean() == pytest.approx(0.18, abs=0.025)
    assert ordered[(scenario == 1) & clicked].mean() == pytest.approx(0.12, abs=0.025)
    assert joined(days[-1:], "is_order_N").mean() == pytest.approx(ordered.mean(), rel=0.2)


def smoothed_log_odds(ids: np.ndarray, labels: np.ndarray, asked: np.ndarray) -> np.ndarray:
    """Log odds of the click rate of each id, 10 average rows added."""
    size = max(ids.max(), asked.max()) + 1
    positives, rows = np.bincount(ids, labels, size), np.bincount(ids, minlength=size)
    rate = (positives + 10 * labels.mean()) / (rows + 10)
    return np.log(rate / (1 - rate))[asked]


def world_report(days: list[SimulatedDay], scenario: int, num_held_out: int = 2) -> tuple[float, float]:
    """AUC on the last days of the true probability, and of the user's and the item's click rates of the days before."""

    from sklearn.metrics import roc_auc_score

    def column(name: str, chosen: list[SimulatedDay]) -> np.ndarray:
        values = {
            "user": lambda d: d.user_N,
            "item": lambda d: d.shown.item_N,
            "click": lambda d: d.labels.is_click_N,
            "p": lambda d: d.labels.p_click_N,
        }[name]
        return np.concatenate([values(day)[day.scenario_N == scenario] for day in chosen])

    before, after = days[:-num_held_out], days[-num_held_out:]
    popularity = sum(
        smoothed_log_odds(column(name, before), column("click", before), column(name, after))
        for name in ("user", "item")
    )
    click = column("click", after)
    return roc_auc_score(click, column("p", after)), roc_auc_score(click, popularity)


@pytest.mark.parametrize("seed", [2026, 7])
def test_the_truth_beats_popularity_by_far(seed: int) -> None:
    _, days = drawn(load_config(None, [*MEDIUM, f"simulated.seed={seed}"]))
    for scenario in (0, 1):
        oracle, popularity = world_report(days, scenario)
        assert 0.75 < oracle < 0.83
        assert 0.55 < popularity < 0.69
        assert oracle - popularity > 0.08


def taste_correlation(similarity: float) -> float:
    world = make_world(load_config(None, [*MEDIUM, f"simulated.similarity={similarity}"]))
    rng = np.random.default_rng(0)
    users, items = rng.integers(0, 600, 20_000), rng.integers(0, 400, 20_000)
    zeros = np.zeros(20_000, dtype=np.int64)
    return float(np.corrcoef(world.taste(zeros, users, items), world.taste(zeros + 1, users, items))[0, 1])


def test_similarity_moves_tastes_from_unrelated_to_the_same() -> None:
    assert abs(taste_correlation(0.0)) < 0.15
    assert 0.3 < taste_correlation(0.5) < 0.7
    assert taste_correlation(1.0) == pytest.approx(1.0)


def cross_rows(*overrides: str) -> tuple[list[SimulatedDay], np.ndarray]:
    _, days = drawn(load_config(None, [*MEDIUM, "simulated.num_impressions=24000", *overrides]))
    return days, np.concatenate([day.shown.is_copy_N for day in days])


@pytest.mark.parametrize("share", [0.0, 0.2, 0.4])
def test_cross_exposure_is_the_share_of_repeats_from_another_scenario(share: float) -> None:
    days, is_copy = cross_rows(f"simulated.cross_exposure={share}")
    assert is_copy.mean() == pytest.approx(share, abs=0.02)
    for day in days:  # each copy was shown to the user in another scenario at most an hour before
        seen: dict[tuple[int, int], list[tuple[int, int]]] = {}
        times = day.plan.time_us_R[day.shown.request_N]
        rows = zip(day.user_N, day.shown.item_N, times, day.scenario_N, day.shown.is_copy_N, strict=True)
        for user, item, time_us, scenario, copied in sorted(rows, key=lambda row: row[2]):
            before = seen.setdefault((user, item), [])
            assert not copied or any(s != scenario and 0 < time_us - t <= HOUR_US for t, s in before)
            before.append((time_us, scenario))


def test_cross_exposure_makes_global_labels_differ_from_own_labels(tmp_path: Path) -> None:
    shares = []
    for share in (0.0, 0.45):
        dial = f"simulated.cross_exposure={share}"
        config = small_config(dial, "simulated.num_items=1000", "simulated.num_users=400")
        labels = recovered(write_logs(tmp_path / f"logs-{share}", config), config)
        shares.append(len(labels.is_click) / len(labels.is_click_global))
    assert shares[0] > 0.92  # the rest met the item again by chance
    assert shares[1] < 0.75


def copy_agreement(*overrides: str) -> float:
    """Correlation of a cross exposure's interest with its source's."""
    days, _ = cross_rows("simulated.cross_exposure=0.4", *overrides)
    pairs = []
    for day in days:
        last: dict[tuple[int, int], float] = {}
        rows = zip(day.user_N, day.shown.item_N, day.shown.interest_N, day.shown.is_copy_N, strict=True)
        for user, item, interest, copied in rows:  # requests are sorted by user and time
            if copied:
                pairs.append((last[user, item], interest))
            last[user, item] = interest
    first, second = np.array(pairs).T
    return float(np.corrcoef(first, second)[0, 1])


def test_global_noise_takes_the_shared_interest_away() -> None:
    clean, noisy, blind = (copy_agreement(f"simulated.global_noise={noise}") for noise in (0.0, 0.5, 1.0))
    assert clean > 0.95
    assert 0.35 < noisy < 0.65
    assert abs(blind) < 0.05


def test_link_loss_takes_the_other_scenarios_click_out_of_the_global_label(tmp_path: Path) -> None:
    own, shares = [], []
    for loss in (0.0, 0.5, 1.0):
        config = small_config(
            f"simulated.link_loss={loss}",
            "simulated.cross_exposure=0.45",
            "simulated.num_items=1000",
            "simulated.num_users=400",
        )
        labels = recovered(write_logs(tmp_path / str(loss), config), config)
        own.append((labels.is_click, labels.is_order))
        shares.append(len(labels.is_click) / len(labels.is_click_global))
    assert own[0] == own[1] == own[2], "no row's own label depends on what its item is called"
    assert shares[0] < 0.75
    assert shares[0] + 0.05 < shares[1] < shares[2] - 0.05
    assert shares[2] > 0.88  # the rest met the item again by chance
    items = {row["item_id"]: row for row in read_rows(tmp_path / "1.0", "items")}
    assert len(items) == 3_000
    assert items["i1003"] | {"item_id": "i3"} == items["i3"], "search's id of an item has its features"
    assert len(read_rows(tmp_path / "0.0", "items")) == 1_000


def test_the_same_seed_writes_the_same_bytes_and_another_seed_does_not(tmp_path: Path) -> None:
    folders = [
        write_logs(tmp_path / str(n), small_config(f"simulated.seed={seed}")) for n, seed in enumerate((1, 1, 2))
    ]
    files = sorted(path.relative_to(folders[0]) for path in folders[0].rglob("*.parquet"))
    assert len(files) == 8
    same = [filecmp.cmp(folders[0] / file, folders[1] / file, shallow=False) for file in files]
    assert all(same)
    assert not any(filecmp.cmp(folders[0] / file, folders[2] / file, shallow=False) for file in files)


def test_item_vectors_tell_the_category_in_part_and_change_nothing_else(tmp_path: Path) -> None:
    plain, config = small_config(), small_config("simulated.item_vector=6")
    without = write_logs(tmp_path / "without", plain)
    logs = write_logs(tmp_path / "logs", config)
    items = pq.read_table(logs / "items")
    vectors = np.stack(items["item_vector"].to_numpy())
    assert (vectors.shape, vectors.dtype) == ((150, 6), np.float32)
    category = items["category_id"].to_numpy()
    centres = np.stack([vectors[category == c].mean(0) for c in np.unique(category)])
    nearest = np.unique(category)[((vectors[:, None] - centres) ** 2).sum(2).argmin(1)]
    assert 0.5 < (nearest == category).mean() < 1
    assert items.drop_columns(["item_vector"]).equals(pq.read_table(without / "items"))
    others = [path.name for path in sorted(logs.iterdir()) if path.name not in ("items", "_ingest.json")]
    assert all(pq.read_table(logs / name).equals(pq.read_table(without / name)) for name in others)


def test_item_tags_tell_what_an_item_is_in_part(tmp_path: Path) -> None:
    config = small_config("simulated.num_items=1000")
    world = make_world(config)
    tags = pq.read_table(write_logs(tmp_path, config) / "items")["tags"].to_pylist()
    assert {len(names) for names in tags} == {2}
    latent_ID = world.item_latent_ID
    furthest = np.abs(latent_ID).argmax(axis=1)
    signs = latent_ID[np.arange(len(latent_ID)), furthest] > 0
    told = [f"style_{2 * place + sign}" for place, sign in zip(furthest, signs, strict=True)]
    right = np.mean([names[0] == name for names, name in zip(tags, told, strict=True)])
    assert right == pytest.approx(0.7 + 0.3 / (2 * latent_ID.shape[1]), abs=0.05)


def test_more_days_leave_the_first_days_as_they_are() -> None:
    settled = "simulated.new_item_share=0"  # launch days are drawn over the days there are
    short = drawn(small_config(settled))[1]
    long = drawn(small_config(settled, "simulated.num_days=6", "simulated.num_impressions=16000"))[1]
    for first, second in zip(short[:2], long[:2], strict=True):
        np.testing.assert_array_equal(first.shown.item_N, second.shown.item_N)
        np.testing.assert_array_equal(first.labels.is_click_N, second.labels.is_click_N)


def test_a_few_users_make_many_of_the_rows_and_new_items_come_later() -> None:
    world, days = drawn(load_config(None, MEDIUM))
    rows = np.sort(np.bincount(np.concatenate([day.user_N for day in days]), minlength=600))[::-1]
    assert 0.25 < rows[:60].sum() / rows.sum() < 0.6
    for day in days:
        assert (world.item_launch_day_I[day.shown.item_N] <= day.number).all()
    assert (world.item_launch_day_I > 0).mean() == pytest.approx(0.0875, abs=0.04)  # a tenth, an eighth of it on day 0


def test_a_user_so_busy_that_requests_fill_the_day_stays_inside_it() -> None:
    _, days = drawn(small_config("simulated.num_users=1", "simulated.num_impressions=60000"))
    for day in days:
        times = day.plan.time_us_R
        assert times.min() >= 0
        assert times.max() < 24 * HOUR_US
        assert (np.diff(times) > 0).all()
