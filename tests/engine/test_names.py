"""Names, shell patterns and expressions choose parameters, and what chooses none is told with the nearest names."""

from __future__ import annotations

import re
from typing import Any

import pytest

from tritopt.engine.names import first_match, is_pattern, matches, no_match, unmatched

NAMES = ["embed.weight", "layer.0.fc.weight", "layer.0.fc.bias", "layer.0.norm.weight", "norm.bias"]


@pytest.mark.parametrize(
    ("key", "chosen"),
    [
        ("norm.bias", [4]),
        ("bias", []),
        ("*.bias", [2, 4]),
        ("*norm*", [3, 4]),
        ("layer.?.fc.*", [1, 2]),
        ("layer.[0-3].*.weight", [1, 3]),
        ("*.BIAS", []),
        (re.compile("bias"), [2, 4]),
        (re.compile(r"^norm\."), [4]),
        (re.compile(r"FC", re.IGNORECASE), [1, 2]),
        (re.compile(r"embed|norm\.weight$"), [0, 3]),
    ],
    ids=str,
)
def test_what_matches(key: Any, chosen: list[int]) -> None:
    assert [i for i, name in enumerate(NAMES) if matches(key, name)] == chosen
    assert unmatched([key], NAMES) == ([] if chosen else [key])


def test_the_name_comes_first_and_then_the_order() -> None:
    both = re.compile("bias")
    assert first_match(["*.bias", both, "norm.bias"], "norm.bias") == "norm.bias"
    assert first_match(["*.bias", both], "norm.bias") == "*.bias"
    assert first_match([both, "*.bias"], "norm.bias") is both
    assert first_match(["*.weight", 3], "norm.bias") is None


def test_a_name_with_wildcards_in_it_is_itself() -> None:
    assert first_match(["w?", "w[0]"], "w[0]") == "w[0]"
    assert unmatched(["w[0]"], ["w[0]"]) == []


def test_only_selectors_can_be_unmatched() -> None:
    assert unmatched([3, ("a", 1), "a", "b*"], ["c"], known={"a"}) == ["b*"]


def test_expressions_for_bytes_are_refused() -> None:
    with pytest.raises(TypeError, match=r"re.compile\(b'x'\).*names of parameters are str"):
        is_pattern(re.compile(b"x"))


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("layer.0.fc.wieght", "layer.0.fc.weight"),
        ("*.biass", "layer.0.fc.bias"),
        ("*nrom*", "norm.bias"),
        ("emb.*", "embed.weight"),
        (re.compile(r"\.fc\.gain$"), "layer.0.fc"),
    ],
    ids=str,
)
def test_the_nearest_names_are_told(key: Any, nearest: str) -> None:
    message = no_match(key, NAMES)
    assert message.startswith("re.compile(" if isinstance(key, re.Pattern) else repr(key))
    assert f"the nearest are '{nearest}" in message


def test_without_names_there_is_no_nearest() -> None:
    assert no_match("a*", []) == "'a*' matches no parameter; there are no names"
