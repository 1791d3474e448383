-- The samples of the contract in DuckDB's SQL: joins, windows, list, list_filter and a slice. One statement a block,
-- separated by ";". The values in {braces} are the configuration's. What two statements or more read is a table.

-- Duplicates: the earliest (event_time, known_time) stays.
CREATE TEMPORARY TABLE impressions AS
SELECT * EXCLUDE (copy)
FROM (
    SELECT *, row_number() OVER (PARTITION BY impression_id ORDER BY event_time, known_time, scenario) AS copy
    FROM (
        SELECT 0 AS scenario, * FROM search_impressions
        UNION ALL
        SELECT 1 AS scenario, * FROM recommendation_impressions
    )
)
WHERE copy = 1;

CREATE TEMPORARY VIEW clicks AS
SELECT * EXCLUDE (copy)
FROM (
    SELECT *, row_number() OVER (PARTITION BY scenario, click_id ORDER BY event_time, known_time) AS copy
    FROM (
        SELECT 0 AS scenario, * FROM search_clicks
        UNION ALL
        SELECT 1 AS scenario, * FROM recommendation_clicks
    )
)
WHERE copy = 1;

CREATE TEMPORARY VIEW order_lines AS
SELECT * EXCLUDE (copy)
FROM (
    SELECT *, row_number() OVER (PARTITION BY order_id, item_id ORDER BY event_time, known_time) AS copy
    FROM orders
)
WHERE copy = 1;

-- Labels 1: a click belongs to the impression it names, or to the last of the same user, item and scenario.
CREATE TEMPORARY TABLE attributed_clicks AS
SELECT * EXCLUDE (place)
FROM (
    SELECT
        c.scenario, c.click_id, c.user_id, c.item_id, c.event_time AS click_time, c.known_time, i.impression_id, i.query,
        row_number() OVER (
            PARTITION BY c.scenario, c.click_id ORDER BY i.event_time DESC, i.impression_id DESC
        ) AS place
    FROM clicks AS c
    JOIN impressions AS i
        ON i.user_id = c.user_id
        AND i.item_id = c.item_id
        AND i.scenario = c.scenario
        AND (c.impression_id IS NULL OR c.impression_id = i.impression_id)
        AND c.event_time BETWEEN i.event_time AND i.event_time + INTERVAL ({click_window_s}) SECONDS
)
WHERE place = 1;

-- Labels 2: an order line belongs to the last click of the same user and item, in any scenario.
CREATE TEMPORARY TABLE credited_orders AS
SELECT * EXCLUDE (place)
FROM (
    SELECT
        o.order_id, o.item_id, o.user_id, o.event_time AS order_time, o.known_time,
        c.scenario, c.click_id, c.impression_id, c.query,
        row_number() OVER (
            PARTITION BY o.order_id, o.item_id ORDER BY c.click_time DESC, c.click_id DESC, c.scenario DESC
        ) AS place
    FROM order_lines AS o
    JOIN attributed_clicks AS c
        ON c.user_id = o.user_id
        AND c.item_id = o.item_id
        AND o.event_time BETWEEN c.click_time AND c.click_time + INTERVAL ({order_window_s}) SECONDS
)
WHERE place = 1;

-- Labels 3 and 4.
CREATE TEMPORARY VIEW own_labels AS
SELECT impression_id, min(click_time) AS click_time, min(order_time) AS order_time
FROM (
    SELECT impression_id, click_time, CAST(NULL AS TIMESTAMPTZ) AS order_time FROM attributed_clicks
    UNION ALL
    SELECT impression_id, NULL AS click_time, order_time FROM credited_orders
)
GROUP BY impression_id;

CREATE TEMPORARY VIEW global_labels AS
SELECT i.impression_id, bool_or(o.click_id IS NOT NULL) AS is_ordered
FROM impressions AS i
JOIN attributed_clicks AS c
    ON c.user_id = i.user_id
    AND c.item_id = i.item_id
    AND c.click_time BETWEEN i.event_time AND i.event_time + INTERVAL ({global_window_s}) SECONDS
LEFT JOIN (SELECT DISTINCT scenario, click_id FROM credited_orders) AS o
    ON o.scenario = c.scenario AND o.click_id = c.click_id
GROUP BY i.impression_id;

-- Histories: all of a user's events once, in order; each impression keeps what was before it and known.
CREATE TEMPORARY VIEW events AS
SELECT
    e.user_id, e.scenario,
    struct_pack(
        time := epoch_us(e.time), action := e.action, id := e.id, item_id := e.item_id, known := epoch_us(e.known_time),
        item_index := coalesce(i.id, 1::BIGINT),
        query_index := CASE WHEN e.query IS NULL THEN 0::BIGINT ELSE coalesce(q.id, 1::BIGINT) END
    ) AS event
FROM (
    SELECT user_id, scenario, click_time AS time, 1::BIGINT AS action, click_id AS id, item_id, query, known_time
    FROM attributed_clicks
    UNION ALL
    SELECT user_id, scenario, order_time AS time, 2::BIGINT AS action, order_id AS id, item_id, query, known_time
    FROM credited_orders
) AS e
LEFT JOIN vocabularies AS i ON i.feature = 'item_id' AND i.value = e.item_id
LEFT JOIN vocabularies AS q ON q.feature = 'query' AND q.value = e.query;

CREATE TEMPORARY VIEW user_events AS
SELECT
    user_id,
    list_sort(list(event) FILTER (WHERE scenario = 0)) AS search,
    list_sort(list(event) FILTER (WHERE scenario = 1)) AS recommendation
FROM events
GROUP BY user_id;

CREATE TEMPORARY VIEW shown AS
SELECT
    * EXCLUDE (search, recommendation),
    search[-{history_length}:] AS search,
    recommendation[-{history_length}:] AS recommendation
FROM (
    SELECT
        i.*, epoch_us(i.event_time) AS micros,
        coalesce(
            list_filter(u.search, lambda e: e.time < epoch_us(i.event_time) AND e.known <= epoch_us(i.event_time)), []
        ) AS search,
        coalesce(
            list_filter(u.recommendation, lambda e: e.time < epoch_us(i.event_time) AND e.known <= epoch_us(i.event_time)),
            []
        ) AS recommendation
    FROM impressions AS i
    LEFT JOIN user_events AS u ON u.user_id = i.user_id
    WHERE CAST(i.event_time AS DATE) BETWEEN DATE '{first}' AND DATE '{last}'
);

-- Ids and features of users and items: null -> 0, not in the vocabulary -> 1.
CREATE TEMPORARY VIEW user_columns AS
SELECT
    u.user_id,
    CASE WHEN u.age_band IS NULL THEN 0::BIGINT ELSE coalesce(a.id, 1::BIGINT) END AS age_band_index,
    CASE WHEN u.city IS NULL THEN 0::BIGINT ELSE coalesce(c.id, 1::BIGINT) END AS city_index,
    CAST(sign(u.account_age_days) * ln(1 + abs(u.account_age_days)) AS FLOAT) AS account_age_days_scaled
FROM users AS u
LEFT JOIN vocabularies AS a ON a.feature = 'age_band' AND a.value = u.age_band
LEFT JOIN vocabularies AS c ON c.feature = 'city' AND c.value = u.city;

CREATE TEMPORARY VIEW item_columns AS
SELECT
    i.item_id,
    CASE WHEN i.category_id IS NULL THEN 0::BIGINT ELSE coalesce(c.id, 1::BIGINT) END AS category_id_index,
    CASE WHEN i.brand_id IS NULL THEN 0::BIGINT ELSE coalesce(b.id, 1::BIGINT) END AS brand_id_index,
    CAST(sign(i.price) * ln(1 + abs(i.price)) AS FLOAT) AS price_scaled
FROM items AS i
LEFT JOIN vocabularies AS c ON c.feature = 'category_id' AND c.value = i.category_id
LEFT JOIN vocabularies AS b ON b.feature = 'brand_id' AND b.value = i.brand_id;

CREATE TEMPORARY VIEW samples AS
SELECT
    i.impression_id, i.request_id, i.user_id, i.item_id, i.query,
    CASE i.scenario WHEN 0 THEN 'search' ELSE 'recommendation' END AS scenario,
    i.event_time, CAST(i.event_time AS DATE) AS impression_date, i.position,
    CAST(l.click_time IS NOT NULL AS FLOAT) AS is_click,
    CAST(l.order_time IS NOT NULL AS FLOAT) AS is_order,
    CAST(g.impression_id IS NOT NULL OR l.click_time IS NOT NULL AS FLOAT) AS is_click_global,
    CAST(coalesce(g.is_ordered, false) OR l.order_time IS NOT NULL AS FLOAT) AS is_order_global,
    i.event_time + INTERVAL ({label_delay_s}) SECONDS <= TIMESTAMPTZ '{watermark}' AS is_mature,
    l.click_time, l.order_time,
    hash(i.user_id) AS user_key,
    hash(coalesce(i.request_id, i.impression_id)) AS request_key,
    CAST(i.scenario AS BIGINT) AS scenario_index,
    coalesce(vu.id, 1::BIGINT) AS user_id_index,
    coalesce(vi.id, 1::BIGINT) AS item_id_index,
    CASE WHEN i.query IS NULL THEN 0::BIGINT ELSE coalesce(vq.id, 1::BIGINT) END AS query_index,
    CAST(hour(i.event_time) + 2 AS BIGINT) AS event_hour_index,
    coalesce(u.age_band_index, 0::BIGINT) AS age_band_index,
    coalesce(u.city_index, 0::BIGINT) AS city_index,
    coalesce(p.category_id_index, 0::BIGINT) AS category_id_index,
    coalesce(p.brand_id_index, 0::BIGINT) AS brand_id_index,
    coalesce(u.account_age_days_scaled, CAST(0 AS FLOAT)) AS account_age_days_scaled,
    coalesce(p.price_scaled, CAST(0 AS FLOAT)) AS price_scaled,
    list_transform(i.search, lambda e: e.item_index) AS search_history_item_ids,
    list_transform(i.search, lambda e: e.action) AS search_history_actions,
    list_transform(i.search, lambda e: CAST((i.micros - e.time) / 1e6 AS FLOAT)) AS search_history_ages_s,
    list_transform(i.search, lambda e: e.query_index) AS search_history_query_ids,
    list_transform(i.recommendation, lambda e: e.item_index) AS recommendation_history_item_ids,
    list_transform(i.recommendation, lambda e: e.action) AS recommendation_history_actions,
    list_transform(i.recommendation, lambda e: CAST((i.micros - e.time) / 1e6 AS FLOAT)) AS recommendation_history_ages_s
FROM shown AS i
LEFT JOIN own_labels AS l ON l.impression_id = i.impression_id
LEFT JOIN global_labels AS g ON g.impression_id = i.impression_id
LEFT JOIN user_columns AS u ON u.user_id = i.user_id
LEFT JOIN item_columns AS p ON p.item_id = i.item_id
LEFT JOIN vocabularies AS vu ON vu.feature = 'user_id' AND vu.value = i.user_id
LEFT JOIN vocabularies AS vi ON vi.feature = 'item_id' AND vi.value = i.item_id
LEFT JOIN vocabularies AS vq ON vq.feature = 'query' AND vq.value = i.query
