"""Raw text to tags and terms, by hand; what the configuration refuses of them."""

from __future__ import annotations

import random

import pytest

from tests.etl_oracle import terms as plain_terms
from usr_ray.config import ConfigError, load_config
from usr_ray.config.terms import SEPARATOR, tags_of, terms_of
from usr_ray.schema import FeatureSpec

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("text", "terms"),
    [
        ("Red SHOES, red!", ["red", "shoes"]),
        ("\uff34\uff25\uff21 ﬁne ①", ["tea", "fine", "1"]),  # full width, a ligature, a number in a circle
        ("x-large_42.5", ["x", "large", "42", "5"]),
        ("Größe", ["größe"]),
        ("कमीज़", ["कमीज\u093c"]),  # vowel signs and the dot below stay in the word
        ("红茶", ["红", "红茶", "茶"]),
        ("iPhone15手机壳", ["iphone15", "手", "手机", "机", "机壳", "壳"]),
        ("한국", ["한", "한국", "국"]),
        ("カメラ", ["カ", "カメ", "メ", "メラ", "ラ"]),
        ("[20, 34, 3, 34]", ["20", "34", "3"]),
        ("[]", []),
        ("[red, 3]", ["red", "3"]),  # no list of ids, but a text
        ("A1\x18b2\x18A1", ["A1", "b2"]),  # ids stay as they are
        (f"New York{SEPARATOR} Rome ", ["New York", "Rome"]),
        (f"{SEPARATOR}Red Shoes", ["Red Shoes"]),  # a list of one element
        ("Fuß\u00adball", ["fußball"]),
        ("नमस्\u200dते", ["नमस्ते"]),
        ("\u2764\ufe0f \u2600\ufe0f 👩\u200d👧", []),  # emoji; of two unlike ones nothing may be the same
        ("\u0301 茶\u0301", ["茶"]),  # a mark without a letter is no word
        (" ,;!", []),
        ("", []),
    ],
)
def test_terms_of_a_text(text: str, terms: list[str]) -> None:
    assert terms_of(text) == terms


def test_terms_of_random_texts_equal_plain_python() -> None:
    pieces = [
        "Red SHOES",
        "红茶",
        "tea",
        "カフェ",
        "ㄱ한국",
        "l'eau",
        "e\u0301",
        "x\u00adtra",
        "\u200b",
        "[1]",
        "3½",
        "Straße",
    ]
    pieces += ["ﬁne", "\uff11\uff12", "🙂", "العربية", " ", "[20, 34]", "-", "\n", "%20", "·", "\x18", "7,"]
    rng = random.Random(0)
    texts = ["".join(rng.choices(pieces, k=rng.randrange(5))) for _ in range(3_000)]
    assert [terms_of(text) for text in texts] == [plain_terms(text) for text in texts]


def test_tags_are_whole_texts_each_once() -> None:
    assert tags_of(SEPARATOR.join(["Red Shoes", " sale ", "", "Red Shoes", "red shoes"])) == [
        "Red Shoes",
        "sale",
        "red shoes",
    ]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("features.max_tags=0",), r"features.max_tags must be in \[1, 1000\], got 0"),
        (('features.item_tags=["a"]', 'features.item_categories=["a"]'), "features: a named more than once"),
        (("features.query_terms=true", 'features.item_categories=["term"]'), "features: 'term' is taken by terms"),
        (
            ("features.query_terms=true", 'scenarios=["feed"]'),
            r"features.query_terms: no scenario has queries \(feed\); name one in query_scenarios",
        ),
        (('logs.items.split={tags=""}',), "logs.items.split.tags is empty; name what stands between the values"),
    ],
)
def test_what_cannot_be_is_refused(settings: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(None, settings)


def test_lists_change_the_meaning_of_rows_only_where_they_are_used() -> None:
    before = load_config(None, ()).row_meaning()["features"]
    assert not [key for key in before if "tags" in key or "terms" in key]
    assert load_config(None, ("features.max_tags=3", "features.max_terms=3")).row_meaning()["features"] == before
    tags = load_config(None, ('features.item_tags=["a"]', "features.max_tags=3")).row_meaning()["features"]
    assert tags == before | {"item_tags": ["a"], "max_tags": 3}
    terms = load_config(None, ("features.query_terms=true",)).row_meaning()["features"]
    assert terms == before | {"query_terms": True, "max_terms": 32}


def test_a_spec_with_lists_is_read_back() -> None:
    settings = ('features.user_tags=["a"]', "features.query_terms=true", 'features.item_terms=["title"]')
    lists = load_config(None, settings).features.lists
    spec = FeatureSpec(
        scenarios=("s",), query_scenarios=("s",), sparse=(), dense=(), history_length=1, label_delay_us=1, lists=lists
    )
    assert FeatureSpec.from_json(spec.to_json()) == spec
    assert spec.list_places == {"a": (0, 16), "query_terms": (16, 48), "item_terms": (48, 80)}
    assert list(spec.vocabularies) == ["a", "term"]
    assert [feature.key for feature in lists] == ["user_id", "query", "item_id"]
