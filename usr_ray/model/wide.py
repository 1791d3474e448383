"""The first-order part (model.wide): a weight for each value of a category or cross, added to the network's logits.

Its terms are every category alone, every category by scenario, and features.crosses. A term's value on a row is the
tuple of its parts' encoded ids, hashed into the rows of one table; a row of it holds one weight a head. Since the
encoded ids are all it takes, no column of the samples holds a cross, and training, evaluation, export and serving
compute it by this one forward. Vocabularies only append, so the value of a row stays where it is while they grow.

The hash is sum over parts of (a_part id mod p), plus b_term, modulo the buckets, with p = 2^31 - 1 and constants that
follow from the names alone. No product exceeds 2^62: ONNX and torch then compute the same without relying on overflow.

A term with an absent part (padding: a row without a query) has no value and adds nothing: row 0, which stays zero. An
unknown id is a value like others.

Shape letters: B rows, P parts, K terms, N rows of the table, H heads (the tasks, with GLMT the global ones too).
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding

from usr_ray.schema import FIRST_ID, FeatureSpec

SCENARIO = "scenario"
WEIGHTS = "wide.weights_NH"
"""Name of the weights in UsrModel: they have a weight decay of their own (model.wide_l2)."""
_PRIME = 2**31 - 1
_IDS = ("user_id", "item_id", "query")


def wide_terms(spec: FeatureSpec, crosses: Sequence[Sequence[str]]) -> tuple[tuple[str, ...], ...]:
    """The parts of every term, sorted; no term twice."""
    categories = [f.name for f in spec.sparse if f.name not in _IDS]
    terms = [*((name,) for name in categories), *((name, SCENARIO) for name in categories), *crosses]
    return tuple(dict.fromkeys(tuple(sorted(term)) for term in terms))


class Wide(nn.Module):
    """Sum of the weights of a row's values: N is `num_buckets`, H is `num_heads`."""

    def __init__(self, spec: FeatureSpec, crosses: Sequence[Sequence[str]], num_buckets: int, num_heads: int) -> None:
        super().__init__()
        terms = wide_terms(spec, crosses)
        self.parts = sorted({part for term in terms for part in term})
        self.num_buckets = num_buckets
        self.weights_NH = nn.Parameter(torch.zeros(num_buckets, num_heads))
        longest = max(map(len, terms))
        # One place beyond the parts stands for none: it adds 0 to the hash, and its id is never padding.
        places = [[*map(self.parts.index, term), *[len(self.parts)] * (longest - len(term))] for term in terms]
        self.register_buffer("places_KP", torch.tensor(places), persistent=False)
        self.register_buffer("factors_P", torch.tensor([*map(_constant, self.parts), 0]), persistent=False)
        self.register_buffer("terms_K", torch.tensor([_constant("*".join(t)) for t in terms]), persistent=False)

    def forward(self, ids: Mapping[str, Tensor], scenario_B: Tensor) -> Tensor:
        """(B, H).

        Args:
            ids: encoded ids (B) by feature; those that the rows share may have one row.
            scenario_B: int64.
        """
        columns = [scenario_B + FIRST_ID if part == SCENARIO else ids[part].long() for part in self.parts]
        columns = list(torch.broadcast_tensors(*columns))
        ids_BP = torch.stack([*columns, torch.ones_like(columns[0])], 1)
        weights_BKH = embedding(self.buckets(ids_BP), self.weights_NH, padding_idx=0)
        return weights_BKH.sum(1)

    def buckets(self, ids_BP: Tensor) -> Tensor:
        """(B, K): the row of the table of each term's value; 0 where it has none. The last column of ids is all 1."""
        hashed_BP = ids_BP % _PRIME * self.get_buffer("factors_P") % _PRIME
        sums_BK = self._of_terms(hashed_BP).sum(2) + self.get_buffer("terms_K")
        has_value_BK = self._of_terms(ids_BP).amin(2) > 0
        return torch.where(has_value_BK, sums_BK % (self.num_buckets - 1) + 1, 0)

    def _of_terms(self, values_BP: Tensor) -> Tensor:
        """(B, K, longest term)."""
        places_KP = self.get_buffer("places_KP")
        return values_BP.index_select(1, places_KP.flatten()).unflatten(1, places_KP.shape)


def _constant(text: str) -> int:
    """1 .. p - 1, of the text alone."""
    return zlib.crc32(text.encode()) % (_PRIME - 1) + 1
