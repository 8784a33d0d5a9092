"""Several mistakes of a profile are reported in one run, each as it is reported alone.

The same holds for mistakes in several files or machines that a command is given.
"""

from __future__ import annotations

import json
import re
from copy import deepcopy
from itertools import combinations
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from devmap_config.cli import devmap
from devmap_config.compiler import Request, run_pipeline

BASE = {
    "version": 1,
    "variables": {"size": 1},
    "model": {"source": "llama"},
    "workload": {"context_length": 16},
    "hardware": {
        "devices": {name: {"memory": "1GiB"} for name in ("cuda:0", "cuda:1", "cpu", "disk")},
        "links": {"host": "25GB/s"},
    },
    "placement": {
        "strategy": "auto",
        "max_memory": {"cuda:0": "1GiB"},
        "pins": [
            {"match": "lm_head", "device": "cuda:0"},
            {"match": "model.norm", "not_on": ["cuda:1"]},
            {"match": "model.embed_tokens", "device": "cuda:0"},
        ],
        "offload": {"folder": "./offload"},
    },
}

PINS = ("placement", "pins")
NEW = -1
"""In place of an index: one more item."""

MISTAKES = {
    "unknown key": (("modle",), 1),
    "unknown key of a section": (("workload", "contxt"), 1),
    "unknown key of a pin": ((*PINS, 0, "devise"), "cpu"),
    "unknown key of a device": (("hardware", "devices", "cuda:1", "memry"), "1GiB"),
    "version": (("version",), 9),
    "wrong type of a number": (("workload", "batch_size"), "two"),
    "wrong type of a flag": ((*PINS, 0, "optional"), "perhaps"),
    "number too small": (("workload", "context_length"), 0),
    "quantity": (("hardware", "devices", "cuda:1", "reserve"), "1GiBs"),
    "cap": (("placement", "max_memory", "cuda:0"), "one"),
    "bandwidth of a link": (("hardware", "links", "host"), "25 furlongs"),
    "unknown link": (("hardware", "links", "hots"), "25GB/s"),
    "unknown accelerator": (("hardware", "devices", "cuda:2"), "rtx-4091"),
    "accelerator without bfloat16": (("hardware", "devices", "cuda:3"), "t4"),
    "more memory than the card": (("hardware", "devices", "cuda:4"), {"accelerator": "rtx-4090", "memory": "99GiB"}),
    "device that is not a mapping": (("hardware", "devices", "cuda:5"), ["24GiB"]),
    "device without memory": (("hardware", "devices", "cuda:6"), {"bandwidth": "1000GB/s"}),
    "device without capacity": (
        ("hardware", "devices", "cuda:7"),
        {"memory": "1GiB", "reserve": "2GiB", "bandwidth": "1GB/s"},
    ),
    "name of a device": (("hardware", "devices", "cude:0"), {"memory": "1GiB"}),
    "two kinds of accelerators": (("hardware", "devices", "xpu:0"), {"memory": "1GiB", "bandwidth": "1GB/s"}),
    "unknown device in `max_memory`": (("placement", "max_memory", "cuda:10"), "1GiB"),
    "unknown device in a pin": ((*PINS, 0, "device"), "cuda:11"),
    "unknown device to compute on": ((*PINS, 0, "compute"), "cuda:12"),
    "unknown device in `not_on`": ((*PINS, 1, "not_on", 0), "cuda:13"),
    "unknown device in a pin that is kept together": (
        (*PINS, NEW),
        {"match": "model.layers.0", "device": "cuda:14", "keep_together": True},
    ),
    "computing on the disk": ((*PINS, NEW), {"match": "model.layers.1", "compute": "disk"}),
    "misspelt pattern": ((*PINS, 0, "match"), "lm_haed"),
    "misspelt pattern beside `not_on`": ((*PINS, 1, "match"), "model.norn"),
    "misspelt class": ((*PINS, NEW), {"match": "class:LlamaMPL", "device": "cpu"}),
    "misspelt pattern of what is new": (("model", "allow_new"), ["skore"]),
    "no pattern": ((*PINS, NEW), {"match": "model.[", "device": "cpu"}),
    "no expression": ((*PINS, NEW), {"match": "re:(", "device": "cpu"}),
    "range beyond the end": ((*PINS, NEW), {"match": "model.layers.[0-99]", "device": "cpu"}),
    "pin for nothing": ((*PINS, NEW), {"match": "model.layers.0"}),
    "pin without a pattern": ((*PINS, NEW), {"device": "cpu"}),
    "unknown device beside no pattern": ((*PINS, NEW), {"match": "model.[1", "device": "cuda:15"}),
    "pins that conflict": ((*PINS, NEW), {"match": "model.embed_tokens", "device": "cuda:1"}),
    "strategy": (("placement", "strategy"), "fastet"),
    "strategy that wants figures": (("placement", "strategy"), "fastest"),
    "strategy that wants a map": (("placement", "strategy"), "manual"),
    "device without effect": (("placement", "device"), "cuda:0"),
    "map without effect": (("placement", "device_map"), {"lm_head": "cuda:0"}),
    "undefined variable": (("name",), "{{ nmae }}"),
    "undefined variable in the name of a device": (("hardware", "devices", "cuda:{{ idx }}"), {"memory": "1GiB"}),
    "undefined variable in the name of a link": (("hardware", "links", "{{ lnk }}"), "1GB/s"),
    "template": (("description",), "{{ size"),
    "dtype": (("model", "dtype"), "bfloat17"),
    "target": (("targets",), ["transfromers"]),
    "method of quantization": (("model", "quantization"), {"method": "bitsandbits"}),
    "argument of quantization": (("model", "quantization"), {"method": "bitsandbytes", "load_in_8bit": 3}),
    "file to extend": (("extends",), ["base.yaml"]),
    "offload folder": (("placement", "offload", "folder"), "../../offload"),
    "model": (("model", "source"), "lama"),
}
"""A key or item, and what is wrong as its value."""

HIDDEN = {
    ("wrong type of a flag", "misspelt pattern"): "the flag may say that the pattern need not match",
    ("bandwidth of a link", "strategy that wants figures"): "it may be one of the figures",
    ("unknown link", "strategy that wants figures"): "it may be one of the figures",
    ("strategy", "device without effect"): "it has one under `single`",
    ("strategy", "map without effect"): "it has one under `manual`",
    ("strategy that wants a map", "map without effect"): "now it has one",
    **{
        ("strategy that wants a map", name): "the pin may give a device to what the map does not"
        for name, (route, _) in MISTAKES.items()
        if route[:2] == PINS and name != "pin for nothing"
    },
    **{
        (named, name): "the name may be that of the device"
        for named in ("undefined variable in the name of a device", "name of a device")
        for name in MISTAKES
        if name.startswith("unknown device")
    },
    **{
        ("model", name): "only the model tells"
        for name in (
            "accelerator without bfloat16",
            "misspelt pattern",
            "misspelt pattern beside `not_on`",
            "misspelt class",
            "misspelt pattern of what is new",
            "range beyond the end",
            "pins that conflict",
            "strategy that wants figures",
            "strategy that wants a map",
            "device without effect",
            "map without effect",
            "argument of quantization",
        )
    },
}
"""The pairs of which one may be what the other would be about, each with why."""


def changed(*names):
    """Return the base profile with these mistakes."""
    document = deepcopy(BASE)
    for route, value in (MISTAKES[name] for name in names):
        holder = document
        for step in route[:-1]:
            holder = holder[step]
        if route[-1] == NEW:
            holder.append(value)
        else:
            holder[route[-1]] = value
    return document


def errors(document):
    """Return the errors of a profile, without the numbers of pins and the strategy that some messages name."""
    Path("profile.yaml").write_text(yaml.safe_dump(document, sort_keys=False), encoding="utf-8")
    found = run_pipeline(Request(path=Path("profile.yaml"))).diagnostics
    return {(each.code, re.sub(r"\[\d+\]|strategy: \w+", "", each.message)) for each in found if each.is_error}


def may_be_together(first, second):
    """Tell whether a profile can have both mistakes, and neither can hide the other."""
    is_hidden = (first, second) in HIDDEN or (second, first) in HIDDEN
    return not is_hidden and (MISTAKES[first][0] != MISTAKES[second][0] or MISTAKES[first][0][-1] == NEW)


def sets_of_mistakes():
    """Return sets of mistakes that do not hide each other; every pair of such mistakes is in one set."""
    left = {pair: None for pair in combinations(MISTAKES, 2) if may_be_together(*pair)}
    while left:
        together = list(next(iter(left)))
        for name in MISTAKES:
            if name not in together and all(may_be_together(name, other) for other in together):
                together.append(name)
        for pair in combinations(together, 2):
            left.pop(pair, None)
            left.pop(pair[::-1], None)
        yield together


def test_the_base_profile_has_no_mistakes(workspace):
    assert errors(BASE) == set()


def test_mistakes_are_reported_together_as_each_alone(workspace):
    alone = {name: errors(changed(name)) for name in MISTAKES}
    assert [name for name, found in alone.items() if not found] == []
    for together in sets_of_mistakes():
        assert errors(changed(*together)) == set().union(*(alone[name] for name in together))


def test_the_table_of_hidden_mistakes_is_exact(workspace):
    """It lists no mistake that is not hidden."""
    for first, second in HIDDEN:
        both = errors(changed(first)) | errors(changed(second))
        assert errors(changed(first, second)) < both, (first, second)


MISTYPED = "hardware: {devices: {cuda:0: {memry: 1GiB}, cuda:1: {memory: 24GiBs}}}"
UNKNOWN = "hardware: {devices: {cuda:0: rtx-4091}, links: {hots: 1GB/s}}"

OF_SEVERAL = {
    "fit base.yaml --on mistyped.yaml,2x24G --on unknown.yaml,h1000": (
        *("unknown-key", "bad-quantity", "usage", "unknown-accelerator", "unknown-key", "usage"),
    ),
    "diff mistyped.yaml missing.json": (*("missing-key", "missing-key", "unknown-key", "bad-quantity"), "missing-file"),
    "report mistyped.yaml unknown.yaml --receipt missing.json -o page.html": (
        *("missing-file", "missing-key", "missing-key", "unknown-key", "bad-quantity", "missing-key", "missing-key"),
    ),
    "receipts mistyped.yaml missing.json": ("syntax", "missing-file"),
    "calibrate mistyped.yaml missing.json": ("syntax", "missing-file"),
}
"""Commands on several files or machines, and the codes of all that is wrong with these."""


@pytest.mark.parametrize("command", OF_SEVERAL)
def test_mistakes_in_all_files_of_a_command_are_reported_together(workspace, command):
    Path("base.yaml").write_text(yaml.safe_dump(BASE, sort_keys=False))
    Path("mistyped.yaml").write_text(MISTYPED)
    Path("unknown.yaml").write_text(UNKNOWN)
    done = CliRunner().invoke(devmap, [*command.split(), "--format", "json"], standalone_mode=False)
    diagnostics = json.loads(done.stdout)["diagnostics"]
    assert tuple(each["code"] for each in diagnostics) == OF_SEVERAL[command]
    assert done.return_value == (1 if command.startswith(("diff", "report")) else 2)
    assert not Path("page.html").exists()


def test_errors_of_a_machine_are_shown_in_its_file(workspace):
    Path("base.yaml").write_text(yaml.safe_dump(BASE, sort_keys=False))
    Path("unknown.yaml").write_text(UNKNOWN)
    done = CliRunner().invoke(devmap, ["fit", "base.yaml", "--on", "unknown.yaml"], standalone_mode=False)
    assert f"1 | {UNKNOWN}" in done.stderr
    assert "2 errors" in done.stderr


def test_all_unknown_variables_are_named(workspace):
    done = CliRunner().invoke(devmap, ["compile", "base.yaml", "--set", "a", "--set", "b"], standalone_mode=False)
    assert "`a` is not of the form NAME=VALUE; `b` is not" in done.exception.format_message()
