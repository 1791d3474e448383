"""Raw text -> tags and terms: the one place for it, so that the ETL and a service read the same text alike."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable

SEPARATOR = "\x1f"
"""Between the elements of a list that is carried as one text."""
_ID_SEPARATORS = re.compile("[\x18\x1f]")
_ID_LIST = re.compile(r"\s*\[\s*(-?\d+(?:\s*,\s*-?\d+)*)?\s*\]\s*")
_RUN = (
    "\u1100-\u11ff\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff\U00020000-\U0003ffff"
)
_PARTS = re.compile(f"[{_RUN}]+|[^{_RUN}]+")
_IS_RUN = re.compile(f"[{_RUN}]")
_UNSEEN = re.compile("[\u00ad\u200c\u200d\u2060\ufe00-\ufe0f\ufeff]")
"""Soft hyphens, joiners and variation selectors: they change how a word looks, not which word it is."""


def tags_of(text: str) -> list[str]:
    """The tags of a text that holds them with SEPARATOR between them: without blanks around them, each once."""
    return _each_once(text.split(SEPARATOR))


def terms_of(text: str) -> list[str]:
    """The terms of a text, each once, in the order in which they first occur.

    A text is normalised (NFKC, lower case) and split into words, and a run of Chinese, Japanese or Korean characters
    into its characters and pairs of neighbours. What is a list of ids already, "[20, 34, 3]" or texts with a 0x18 or
    SEPARATOR between them, has its elements as terms, as they are.
    """
    if ids := _ID_LIST.fullmatch(text):
        return _each_once((ids[1] or "").split(","))
    if _ID_SEPARATORS.search(text):
        return _each_once(_ID_SEPARATORS.split(text))
    normal = _UNSEEN.sub("", unicodedata.normalize("NFKC", text).lower())
    # Vowel signs and accents that have no letter of their own belong to the word.
    spaced = "".join(c if c.isalnum() or unicodedata.category(c)[0] == "M" else " " for c in normal)
    found: list[str] = []
    for word in spaced.split():
        for part in _PARTS.findall(word):
            found += _characters_and_pairs(part) if _IS_RUN.match(part) else [part]
    return _each_once(term for term in found if any(map(str.isalnum, term)))


def _characters_and_pairs(run: str) -> list[str]:
    return [term for n, character in enumerate(run) for term in (character, run[n : n + 2])]


def _each_once(values: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(value for value in map(str.strip, values) if value))
