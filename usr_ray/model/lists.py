"""Tags and terms in the model: each list pooled by its mean, and how the terms of a query and of an item meet.

Shape letters: B rows (or 1, what a request's candidates share), L places of a list, Q and I of the query's and the
item's terms, D embedding.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from usr_ray.model.embedding import INIT_STD
from usr_ray.schema import FIRST_ID, ITEM_TERMS, PADDING_ID, QUERY_TERMS, FeatureSpec

TERM_PRODUCT, TERM_OVERLAP = "term_product", "term_overlap"
"""Columns of a model whose table has terms of queries and of items."""


def has_both_terms(spec: FeatureSpec) -> bool:
    """Whether queries and items have terms, so that they can meet."""
    return {QUERY_TERMS, ITEM_TERMS} <= {feature.name for feature in spec.lists}


def list_columns(spec: FeatureSpec, ids: Mapping[str, Tensor], vectors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What tags and terms add to the columns of a row.

    Args:
        ids: name -> encoded ids (B, L), 0 where a list is shorter.
        vectors: name -> their embeddings (B, L, D); those of padding are not looked at.

    Returns:
        Name -> the mean (B, D) of the list's embeddings, zeros of an empty list. Where queries and items have terms,
        TERM_PRODUCT (B, D), the product of both means over the start's standard deviation of an embedding, and
        TERM_OVERLAP (B, 2), the shares of the query's and of the item's terms that the other has too.
    """
    columns = {}
    for feature in spec.lists:
        is_there_BL1 = (ids[feature.name] != PADDING_ID).unsqueeze(2)
        count_B1 = is_there_BL1.sum(1).clamp(min=1)
        columns[feature.name] = torch.where(is_there_BL1, vectors[feature.name], 0.0).sum(1) / count_B1
    if has_both_terms(spec):
        columns[TERM_PRODUCT] = columns[QUERY_TERMS] * columns[ITEM_TERMS] / INIT_STD
        columns[TERM_OVERLAP] = overlap(ids[QUERY_TERMS], ids[ITEM_TERMS])
    return columns


def overlap(query_BQ: Tensor, item_BI: Tensor) -> Tensor:
    """(B, 2): shares of the query's terms that the item has, and of the item's that the query has; 0 of no terms.

    Unknown terms are terms, but nobody can say that two of them are the same.
    """
    same_BQI = (query_BQ.unsqueeze(2) == item_BI.unsqueeze(1)) & (query_BQ >= FIRST_ID).unsqueeze(2)
    shares = []
    for found_BL, own_BL in ((same_BQI.any(2), query_BQ), (same_BQI.any(1), item_BI)):
        shares.append(found_BL.sum(1) / (own_BL != PADDING_ID).sum(1).clamp(min=1))
    return torch.stack([share_B.expand(same_BQI.shape[0]) for share_B in shares], dim=1)
