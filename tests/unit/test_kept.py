"""Cache entries and vendored graphs are used only unchanged: any changed leaf is noticed."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import transformers
from bad_files import BAD, put
from conftest import LLAMA

import devmap_config
from devmap_config.cli.compile import compile_command
from devmap_config.files import boundary_of
from devmap_config.graph import cache
from devmap_config.graph.cache import cached_graph, keep, kept
from devmap_config.graph.digest import digest
from devmap_config.graph.model import ModelGraph, Module, ModulePath
from devmap_config.graph.vendoring import VendoredGraphError, read_vendored

PROFILE = """\
version: 1
model: {source: small}
workload: {context_length: 8}
hardware: {devices: {cuda:0: {memory: 1GiB}, cpu: {memory: 1GiB}}}
placement: {strategy: single}
"""

CACHES = ("graphs", "dry-runs", "matches")

GRAPH = ModelGraph(
    root=Module(ModulePath(""), "Model", (), (), ()),
    ties=(),
    no_split_classes=(),
    no_placement_parameters=(),
    skip_keys=(),
)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """The folder of a profile compiled with an empty cache, and with its graph beside it."""
    folder = tmp_path_factory.mktemp("compiled")
    values = {**LLAMA, "num_hidden_layers": 1, "dtype": "float32"}
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**values)).save_pretrained(folder / "small")
    with pytest.MonkeyPatch.context() as context:
        context.chdir(folder)
        context.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        Path("p.yaml").write_text(PROFILE)
        assert compile_command.main(["p.yaml", "-q", "--vendor"], standalone_mode=False) == 0
    return folder


def leaves(value, route=()):
    """Yield the route of every value that holds no others."""
    if isinstance(value, (dict, list)) and value:
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(part, (*route, key))
    else:
        yield route


def flipped(value, route):
    """Return a copy with another leaf at a route."""
    changed = copy.copy(value)
    if len(route) > 1:
        changed[route[0]] = flipped(value[route[0]], route[1:])
        return changed
    leaf = value[route[0]]
    if isinstance(leaf, bool):
        changed[route[0]] = not leaf
    elif isinstance(leaf, (int, float)):
        changed[route[0]] = leaf + 1
    elif isinstance(leaf, str):
        changed[route[0]] = f"{leaf}x"
    else:  # nothing, or an empty list or mapping
        changed[route[0]] = 0
    return changed


def entry(compiled, name):
    [path] = (compiled / "cache" / "devmap-config" / name).iterdir()
    return path


@pytest.mark.parametrize("name", CACHES)
def test_a_cache_entry_with_any_changed_leaf_is_dropped(compiled, name, tmp_path):
    written = entry(compiled, name)
    seal, text = written.read_text().split("\n")
    value = kept(written)
    assert value == json.loads(text)
    path = tmp_path / written.name
    for route in leaves(value):
        path.write_text(f"{seal}\n{json.dumps(flipped(value, route), separators=(',', ':'))}")
        assert kept(path) is None, route
    path.write_text(written.read_text())
    assert kept(path) == value


def test_every_cache_seals_its_entries(compiled):
    assert {path.name for path in (compiled / "cache" / "devmap-config").iterdir()} == set(CACHES)


@pytest.mark.parametrize("damage", [lambda text: text[:-1], lambda text: text[1:], lambda _: "", lambda _: "{}"])
def test_a_damaged_cache_entry_is_ignored(tmp_path, damage):
    path = tmp_path / "x.json"
    keep(path, {"a": [1, 2]})
    path.write_text(damage(path.read_text()))
    assert kept(path) is None


@pytest.mark.parametrize("bad", BAD)
def test_a_file_that_is_no_cache_entry_is_ignored(tmp_path, monkeypatch, bad):
    (tmp_path / "cache").mkdir()
    monkeypatch.chdir(tmp_path / "cache")
    path = Path("x.json").absolute()
    keep(path, {"a": [1, 2]})
    put(bad, path)
    assert kept(path) is None


def test_a_cache_entry_under_another_name_is_ignored(tmp_path):
    keep(tmp_path / "x.json", {"a": 1})
    (tmp_path / "x.json").rename(tmp_path / "y.json")
    assert kept(tmp_path / "y.json") is None


def test_a_graph_with_a_changed_cache_entry_is_measured_again(tmp_path):
    def make():
        made.append(1)
        return GRAPH

    made = []
    for damages in (False, False, True, False):
        if damages:
            [path] = tmp_path.iterdir()
            path.write_text(path.read_text().replace("Model", "Modem"))
        assert cached_graph({"model": "x"}, make, directory=tmp_path) == GRAPH
    assert made == [1, 1]


def test_graphs_of_other_code_or_libraries_are_not_reused(tmp_path, monkeypatch):
    cached_graph({"model": "x"}, lambda: GRAPH, directory=tmp_path)
    monkeypatch.setattr(cache, "library_versions", lambda: {"torch": "0"})
    cached_graph({"model": "x"}, lambda: GRAPH, directory=tmp_path)
    monkeypatch.setattr(cache, "code_digest", lambda *_: "other")
    cached_graph({"model": "x"}, lambda: GRAPH, directory=tmp_path)
    assert len(list(tmp_path.iterdir())) == 3


def test_the_digest_of_code_covers_every_file_of_its_packages(monkeypatch):
    read = []
    monkeypatch.setattr(cache, "read_text", lambda path, *_: read.append(path) or "")
    cache.code_digest("quantization", "graph")
    package = Path(devmap_config.__file__).parent
    expected = {path for name in ("quantization", "graph") for path in (package / name).rglob("*.py")}
    assert set(read) == expected
    assert package / "quantization" / "methods" / "quanto.py" in expected


def test_a_vendored_graph_with_any_changed_leaf_is_refused(compiled, tmp_path):
    path = tmp_path / "p.graph.json"
    value = json.loads((compiled / "p.graph.json").read_text())
    assert value["dry_runs"]
    path.write_text(json.dumps(value))
    assert read_vendored(path, boundary_of(path)) is not None
    for route in leaves(value):
        path.write_text(json.dumps(flipped(value, route)))
        with pytest.raises(VendoredGraphError, match=r"changed by hand|another version"):
            read_vendored(path, boundary_of(path))


@pytest.mark.parametrize("change", ["size", "twice", "alias", "measured"])
def test_an_impossible_vendored_graph_is_refused_despite_its_digest(change, compiled, tmp_path):
    value = json.loads((compiled / "p.graph.json").read_text())
    root, measurement = value["graph"]["root"], value["graph"]["measurement"]
    [embedding] = next(module for module in walk(root) if module[0] == "embed_tokens")[2]
    match change:
        case "size":
            embedding[3] = -1
        case "twice":
            root[4].append(root[4][0])
        case "alias":
            embedding[6] = "nothing"
        case "measured":
            measurement["modules"][0][measurement["columns"].index("path")] = "nothing"
    value["digest"] = digest({key: part for key, part in value.items() if key != "digest"})
    path = tmp_path / "p.graph.json"
    path.write_text(json.dumps(value))
    with pytest.raises(VendoredGraphError, match="it is damaged"):
        read_vendored(path, boundary_of(path))


def walk(module):
    yield module
    for child in module[4]:
        yield from walk(child)
