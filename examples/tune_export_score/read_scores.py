"""Read a table of scores back: the best items of a few requests, beside what the users did.

python examples/tune_export_score/read_scores.py LAKE SCORES
"""

from __future__ import annotations

import sys

import deltalake


def main(lake: str, scores: str) -> None:
    """Print the scored rows of the first requests, best click probability first."""
    samples = deltalake.DeltaTable(f"{lake}/samples").to_pyarrow_table(
        columns=["impression_id", "request_id", "item_id", "is_click"]
    )
    probabilities = deltalake.DeltaTable(scores).to_pyarrow_table(
        columns=["impression_id", "scenario", "p_ctr", "p_ctcvr"]
    )
    rows = samples.join(probabilities, "impression_id", join_type="inner").sort_by(
        [("request_id", "ascending"), ("p_ctr", "descending")]
    )
    print(f"{rows.num_rows:,} scored rows")
    print("request      scenario        item        p_ctr  p_ctcvr  clicked")
    for row in rows.slice(0, 12).to_pylist():
        print(
            f"{row['request_id']:<12} {row['scenario']:<15} {row['item_id']:<10} {row['p_ctr']:.4f}   "
            f"{row['p_ctcvr']:.4f}  {'yes' if row['is_click'] else ''}"
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
