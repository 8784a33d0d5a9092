"""Patterns match the same names as an oracle that tries every path of a tree."""

from __future__ import annotations

import re

from hypothesis import given, settings
from hypothesis import strategies as st

from devmap_config.graph.model import ModelGraph, Module, ModulePath, Tensor, TensorName
from devmap_config.rules.folding import fold_paths
from devmap_config.rules.matching import match
from devmap_config.rules.pattern import PatternError, parse_pattern

NAMES = ("a", "b", "ab", "layers", "mlp")


@st.composite
def graphs(draw):
    def module(path, depth):
        below = f"{path}." if path else ""
        names = draw(st.lists(st.sampled_from(NAMES), max_size=3, unique=True)) if depth else []
        numbers = [str(index) for index in range(draw(st.integers(0, 12)))] if depth and draw(st.booleans()) else []
        return Module(
            path=ModulePath(path),
            class_name="Module",
            parameters=(Tensor(TensorName(f"{below}weight"), (1,), "float32", 4, 4),) if draw(st.booleans()) else (),
            children=tuple(module(below + name, depth - 1) for name in [*names, *numbers]),
        )

    return ModelGraph(root=module("", 3))


def index_items():
    number = st.integers(0, 12)
    return st.one_of(
        number.map(str),
        st.tuples(number, number).map(lambda ends: f"{min(ends)}-{max(ends)}"),
        st.tuples(number, number, st.integers(1, 4)).map(lambda it: f"{min(it[:2])}-{max(it[:2])}/{it[2]}"),
        number.map(lambda first: f"{first}-"),
        st.integers(-12, 12).map(lambda first: f"{first}:"),
        st.tuples(st.integers(-12, 12), st.integers(-12, 12)).map(lambda ends: f"{ends[0]}:{ends[1]}"),
        st.integers(1, 4).map(lambda step: f"::{step}"),
    )


segments = st.one_of(
    st.sampled_from([*NAMES, "weight", "*", "**", "?", "a*", "*b", "{a,b}", "{layers,mlp}", "1?"]),
    st.lists(index_items(), min_size=1, max_size=3).map(lambda items: f"[{','.join(items)}]"),
)
patterns = st.lists(segments, min_size=1, max_size=4).map(".".join)


def all_names(module):
    yield module.path
    for tensor in module.parameters:
        yield tensor.name
    for child in module.children:
        yield from all_names(child)


def selected(item, existing):
    if ":" in item:
        parts = [int(part) if part else None for part in item.split(":")]
        return existing[slice(*parts)]
    item, _, step = item.partition("/")
    first, dash, last = item.partition("-")
    end = int(last) if last else (max(existing, default=-1) if dash else int(first))
    return [index for index in range(int(first), end + 1, int(step or 1)) if index in existing]


def oracle(pattern, names):
    """Return the matching names, by trying every way to spread the pattern's segments over those of a name."""
    wanted = pattern.split(".")

    def one(segment, name, parent):
        if segment.startswith("["):
            prefix = f"{parent}." if parent else ""
            siblings = {other[len(prefix) :] for other in names if other and other.startswith(prefix)}
            existing = sorted(int(sibling) for sibling in siblings if sibling.isdigit())
            return name.isdigit() and any(int(name) in selected(item, existing) for item in segment[1:-1].split(","))
        if segment.startswith("{"):
            return name in segment[1:-1].split(",")
        expression = re.escape(segment).replace(r"\*", ".*").replace(r"\?", ".")
        return re.fullmatch(expression, name) is not None

    def fits(segments_left, parts, position):
        if not segments_left:
            return position == len(parts)
        if segments_left[0] == "**":
            return any(fits(segments_left[1:], parts, later) for later in range(position, len(parts) + 1))
        if position == len(parts):
            return False
        parent = ".".join(parts[:position])
        return one(segments_left[0], parts[position], parent) and fits(segments_left[1:], parts, position + 1)

    return {name for name in names if fits(wanted, name.split(".") if name else [], 0)}


@settings(max_examples=300, deadline=None)
@given(graphs(), patterns)
def test_patterns_match_the_same_names_as_the_oracle(graph, pattern):
    names = list(all_names(graph.root))
    found = match(parse_pattern(pattern), graph).names
    assert len(found) == len(set(found))
    assert set(found) == oracle(pattern, names)


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet="ab01.[]{},-*?:/!^ \\()|+$réé", max_size=24))
def test_any_text_is_a_pattern_or_an_error_with_its_place(text):
    for prefix in ("", "re:", "class:"):
        try:
            parse_pattern(prefix + text)
        except PatternError as error:
            assert 0 <= error.start < max(error.end, 1)
            assert error.end <= max(len(prefix + text), 1)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.lists(st.sampled_from(["a", "b", "0", "1", "2", "10"]), min_size=1, max_size=4).map(".".join), unique=True
    )
)
def test_folded_paths_match_exactly_the_given_paths(paths):
    def unfold(pattern):
        ways = [""]
        for segment in pattern.split("."):
            numbers = [segment]
            if segment.startswith("["):
                numbers = [
                    str(number)
                    for item in segment[1:-1].split(",")
                    for number in range(int(item.split("-")[0]), int(item.split("-")[-1]) + 1)
                ]
            ways = [f"{way}.{number}" if way else number for way in ways for number in numbers]
        return ways

    unfolded = [path for pattern in fold_paths(paths) for path in unfold(pattern)]
    assert sorted(unfolded) == sorted(paths)
