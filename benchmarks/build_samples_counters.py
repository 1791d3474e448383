"""`[counters]` in DuckDB's SQL, for the rival of benchmarks/build_samples.py. Not a benchmark itself.

The statements go behind those of build_samples_duckdb.sql, whose tables they read: daily sums of past events by the
keys of each counter, their windows for each date of the samples, and a view of the samples with the columns joined.
"""

from __future__ import annotations

from usr_ray.config import Config
from usr_ray.config.counters import CounterConfig, counter_columns

_SUMS = "sum(impressions) AS impressions, sum(clicks) AS clicks, sum(orders) AS orders"
_ODDS = """
CREATE TEMPORARY MACRO rate(hits, trials) AS hits / CAST(greatest(trials, hits) AS DOUBLE);
CREATE TEMPORARY MACRO counter_odds(hits, trials, all_hits, all_trials) AS CASE
    WHEN greatest(hits, trials) > 0 AND all_hits > 0 AND all_hits < greatest(all_trials, all_hits) THEN
        ln((hits + {prior} * rate(all_hits, all_trials))
            / (greatest(trials, hits) - hits + {prior} * (1 - rate(all_hits, all_trials))))
        - ln(rate(all_hits, all_trials) / (1 - rate(all_hits, all_trials)))
    ELSE 0 END
"""


def counter_statements(config: Config) -> list[str]:
    """What makes the view `counted_samples`; none where the configuration has no counters."""
    if not config.every_counter:
        return []
    users, items = config.features.user_categories, config.features.item_categories
    owned = "".join(f", u.{name}" for name in users) + "".join(f", p.{name}" for name in items)
    joined = "LEFT JOIN users AS u ON u.user_id = e.user_id LEFT JOIN items AS p ON p.item_id = e.item_id"
    windows = tuple(dict.fromkeys(window for counter in config.every_counter.values() for window in counter.windows))
    found = [statement.format(prior=config.counters.prior) for statement in _ODDS.split(";")]
    found += [
        f"""CREATE TEMPORARY TABLE counted AS
SELECT e.*{owned} FROM (
    SELECT user_id, item_id, query, scenario, CAST(greatest(event_time, known_time) AS DATE) AS day,
        1 AS impressions, 0 AS clicks, 0 AS orders FROM impressions
    UNION ALL
    SELECT user_id, item_id, query, scenario, CAST(greatest(click_time, known_time) AS DATE), 0, 1, 0
    FROM attributed_clicks
    UNION ALL
    SELECT user_id, item_id, query, scenario, CAST(greatest(order_time, known_time) AS DATE), 0, 0, 1
    FROM credited_orders
) AS e {joined}""",
        "CREATE TEMPORARY TABLE dates AS SELECT DISTINCT impression_date AS date FROM samples",
        *_windows_of("every", (), CounterConfig(windows=windows, per_scenario=True)),
        *_windows_of("every_all", (), CounterConfig(windows=windows, per_scenario=False)),
    ]
    columns, joins = [], []
    for name, counter in config.every_counter.items():
        found += _windows_of(name, counter.keys, counter)
        columns += _columns_of(name, counter)
        own = [f"{name}.{key} = e.{key}" for key in counter.keys] + [f"{name}.date = e.impression_date"]
        own += [f"{name}.scenario = e.scenario_index"] if counter.per_scenario else []
        joins.append(f"LEFT JOIN windows_{name} AS {name} ON {' AND '.join(own)}")
    joins.append(
        "LEFT JOIN windows_every AS every ON every.date = e.impression_date AND every.scenario = scenario_index"
    )
    joins.append("LEFT JOIN windows_every_all AS every_all ON every_all.date = e.impression_date")
    raw = f"SELECT e.*{owned} FROM samples AS e {joined}"
    names = "".join(f", {name}" for name in (*users, *items))
    without = f" EXCLUDE ({names[2:]})" if names else ""
    found.append(
        f"CREATE TEMPORARY VIEW counted_samples AS SELECT e.*{without}, {', '.join(columns)} FROM ({raw}) AS e "
        + " ".join(joins)
    )
    return found


def _windows_of(name: str, keys: tuple[str, ...], counter: CounterConfig) -> list[str]:
    """A table of the sums of each window that ends before each date, by the keys (and the scenario)."""
    by = [*keys, *(["scenario"] if counter.per_scenario else [])]
    known = " AND ".join(f"{key} IS NOT NULL" for key in keys) or "true"
    sums = []
    for window in counter.windows:
        days = counter.days(window)
        near = "" if days is None else f" FILTER (WHERE day >= date - {days})"
        sums += [f"sum({what}){near} AS {what}_{window}" for what in ("impressions", "clicks", "orders")]
    listed = "".join(f"{column}, " for column in by)
    daily = f"SELECT {listed}day, {_SUMS} FROM counted WHERE {known} GROUP BY {listed}day"
    return [
        f"CREATE TEMPORARY TABLE windows_{name} AS SELECT {listed}date, {', '.join(sums)} "
        f"FROM ({daily}) JOIN dates ON day < date GROUP BY {listed}date"
    ]


def _columns_of(name: str, counter: CounterConfig) -> list[str]:
    """The columns of a counter, in the order of `counter_columns`."""
    named = iter(counter_columns(name, counter))
    whole = "every" if counter.per_scenario else "every_all"
    found = []
    for window in counter.windows:
        own, every = (
            {what: f"coalesce({table}.{what}_{window}, 0)" for what in ("impressions", "clicks", "orders")}
            for table in (name, whole)
        )
        values = []
        for what in counter.columns:
            of, hits = ("impressions", "clicks") if what == "ctr" else ("clicks", "orders")
            odds = f"counter_odds({own[hits]}, {own[of]}, {every[hits]}, {every[of]})"
            values.append(f"ln(1 + {own[what]})" if what in own else odds)
        found += [f"CAST({value} AS FLOAT) AS {next(named)}" for value in values]
    return found
