"""`--to llama.cpp`: makes the flags with which `llama-server` places a GGUF of the same model by the plan."""

from __future__ import annotations

import csv
import re
import shlex
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from devmap_config.devices import CPU, DISK
from devmap_config.diagnostics.diagnostic import Sink
from devmap_config.exports.export import Export, check_model_alone, require_no_errors, span_of
from devmap_config.files import ANYWHERE, PACKAGED, read_text
from devmap_config.graph.costs import PARTLY

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from devmap_config.compiler import Compiled
    from devmap_config.devices import Device

HERE = Path(__file__).parent
BUFFERS = {"cuda": "CUDA"}
"""llama.cpp's names of accelerators, by their kind."""

EXPERTS = ("ffn_down_exps", "ffn_gate_exps", "ffn_up_exps")
"""The tensors that `--n-cpu-moe` leaves on the CPU, for a number of first layers."""

CACHE_TYPES = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}

NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


@cache
def names_of(model_type: str) -> Mapping[str, tuple[str, ...]]:
    """Return the tensors of a GGUF by modules of transformers, with `N` for the number of a layer; empty if unknown."""
    text = read_text(HERE / "gguf_names.csv", PACKAGED, ANYWHERE)
    rows = csv.DictReader(text.splitlines())
    return {row["module"]: tuple(row["tensors"].split()) for row in rows if model_type in row["model_types"].split()}


@dataclass(frozen=True)
class GgufPlacement:
    """The tensors of a GGUF by name, with their devices in the plan; `layers` is the number of layers."""

    devices: Mapping[str, Device]
    layers: int

    def of_layer(self, number: int) -> Mapping[str, Device]:
        """Return the tensors of a layer, without its number."""
        prefix = f"blk.{number}."
        return {name.removeprefix(prefix): device for name, device in self.devices.items() if name.startswith(prefix)}


def export_to_llama_cpp(compiled: Compiled, *, weights: str | None) -> Export:
    """Return a script that serves a GGUF by the plan.

    Args:
        compiled: the profile with its plan.
        weights: the path of the GGUF on the machine that will run it.

    Raises:
        UnfitExportError: if the names of the model's tensors in llama.cpp are unknown, or it cannot express the plan.
    """
    sink = Sink()
    placed, flags = _placed_by_flags(compiled, weights, sink)
    flags += _workload_flags(compiled)
    model = shlex.quote(str(weights))
    lines = " \\\n    ".join(" ".join(map(shlex.quote, flag)) for flag in flags)
    script = SCRIPT.format(model=model, flags=lines)
    return Export(files={"serve.sh": script}, notes=tuple(_notes(placed, compiled)))


def placement_flags(compiled: Compiled) -> list[tuple[str, ...]]:
    """Return the flags that place a GGUF of the model by the plan.

    Raises:
        UnfitExportError: as for the export.
    """
    return _placed_by_flags(compiled, "model.gguf", Sink())[1]


def _placed_by_flags(
    compiled: Compiled, weights: str | None, sink: Sink
) -> tuple[GgufPlacement, list[tuple[str, ...]]]:
    check_model_alone(compiled, "llama.cpp", sink)
    _check_plan(compiled, weights, sink)
    require_no_errors(sink, compiled)
    placed = _placed(compiled, sink)
    require_no_errors(sink, compiled)
    flags = _flags(placed, compiled, sink)
    require_no_errors(sink, compiled)
    return placed, flags


SCRIPT = """\
#!/bin/sh
# sh serve.sh [further flags of llama-server]; LLAMA_SERVER names another command. Made by `devmap export` from a lock.
# Names and overrides were tried with llama.cpp for CPUs; that layers are split over cards as planned was not.
exec "${{LLAMA_SERVER:-llama-server}}" -m {model} \\
    {flags} \\
    "$@"
"""


def _check_plan(compiled: Compiled, weights: str | None, sink: Sink) -> None:
    plan, profile = compiled.plan, compiled.loaded.profile
    model_type = str(compiled.model.source.config.get("model_type"))
    if plan.pipeline is not None:
        message = "the plan is made for vLLM, and llama.cpp runs on one machine by rules of its own"
        sink.error("unfit-export", message, profile.targets.span, help="leave `targets` out and compile again")
        return
    if not names_of(model_type):
        sink.error(
            "unfit-export",
            f"how llama.cpp names the tensors of {model_type} is not known here",
            profile.model.source.span,
            help="run the plan with `devmap run`",
        )
    if weights is None:
        sink.error(
            "no-weights",
            "llama.cpp reads a GGUF, and none is named",
            profile.model.source.span,
            help="pass `--model model.gguf`: a GGUF of the same model, on the machine that is to run it",
        )
    cache = profile.workload.cache
    if cache.implementation == "quantized":
        sink.error(
            "unfit-export",
            "llama.cpp quantises a cache by types of its own, which are of other sizes than the plan has room for",
            cache.key_span,
            help="leave `cache` out and compile again",
        )
    if cache.implementation == PARTLY:
        sink.error(
            "unfit-export",
            "llama.cpp keeps the whole cache on the CPU, or the part of each layer where that is",
            cache.key_span,
            help="write `cache: offloaded`, or leave it out, and compile again",
        )
    for assignment in plan.assignments:
        stored_on, runs_on = assignment.location.stored_on, assignment.location.runs_on
        if stored_on == DISK:
            message, help = "llama.cpp keeps no weights on a disk", "give it the CPU, or a card"
        elif stored_on.is_accelerator and stored_on.kind not in BUFFERS:
            message, help = f"what llama.cpp calls {stored_on} is not known here", "export plans for CUDA cards or CPUs"
        elif stored_on != runs_on and not _is_embedding(assignment.tensors, compiled):
            message = f"llama.cpp computes weights where they are: what is on {stored_on} is not copied to {runs_on}"
            help = "pin it with `compute: cpu`, as `fastest` does where that is quicker, and compile again"
        else:
            continue
        sink.error("unfit-export", message, span_of(compiled, [assignment.unit]), help=help)


def _is_embedding(tensors: Sequence[str], compiled: Compiled) -> bool:
    names = names_of(str(compiled.model.source.config.get("model_type")))
    return all(names.get(_module_of(name)) == ("token_embd",) for name in tensors)


def _module_of(name: str) -> str:
    """Return the module of a tensor in the form of the table, without the number of its layer."""
    return NUMBER.sub("N", re.sub(r"\.(weight|bias)$", "", name), count=1)


def _placed(compiled: Compiled, sink: Sink) -> GgufPlacement:
    names = names_of(str(compiled.model.source.config["model_type"]))
    graph, locations = compiled.graph, compiled.plan.locations
    devices: dict[str, Device] = {}
    layers = 0
    for name, location in locations.items():
        if not graph.tensors[name].persistent:
            continue
        module = _module_of(name)
        if module not in names:
            sink.error(
                "unfit-export",
                f"how llama.cpp names `{name}` is not known here",
                compiled.loaded.profile.model.source.span,
                help="run the plan with `devmap run`",
            )
            continue
        match = NUMBER.search(name)
        number = match[0] if match and "N" in module.split(".") else ""
        layers = max(layers, int(number) + 1) if number else layers
        for tensor in names[module]:
            devices[tensor.replace(".N.", f".{number}.")] = location.stored_on
    return GgufPlacement(devices, layers)


def _flags(placed: GgufPlacement, compiled: Compiled, sink: Sink) -> list[tuple[str, ...]]:
    """Return the flags, and report placements that llama.cpp's order of layers does not allow."""
    homes = [_home(placed, number, compiled, sink) for number in range(placed.layers)]
    require_no_errors(sink, compiled)
    on_cpu = next((place for place, home in enumerate(homes) if home != CPU), len(homes))
    _check_order(homes, on_cpu, compiled, sink)
    require_no_errors(sink, compiled)
    cards = list(dict.fromkeys(homes[on_cpu:]))
    output = placed.devices.get("output", placed.devices["output_norm"])
    if output.is_accelerator and output not in cards:
        cards.append(output)
    flags: list[tuple[str, ...]] = [("--fit", "off")]
    if not cards:
        flags += [("--device", "none"), ("-ngl", "0")]
        own_output = CPU
    else:
        counts = {card: homes.count(card) for card in cards}
        own_output = cards[-1]
        counts[own_output] += 1  # it counts as a layer after the others
        flags += [
            ("--device", ",".join(map(_buffer, cards))),
            ("-ngl", str(len(homes) - on_cpu + 1)),
            ("--split-mode", "layer"),
            ("-ts", ",".join(str(counts[card]) for card in cards)),
        ]
    if _is_cache_on_cpu(compiled):
        flags.append(("--no-kv-offload",))
    return flags + _overrides(placed, homes, own_output)


def _is_cache_on_cpu(compiled: Compiled) -> bool:
    return compiled.loaded.profile.workload.cache.implementation in ("offloaded", "offloaded_static")


def _workload_flags(compiled: Compiled) -> list[tuple[str, ...]]:
    flags: list[tuple[str, ...]] = []
    workload, cache_type = compiled.loaded.profile.workload, CACHE_TYPES.get(compiled.model.dtype)
    if workload.context_length.value is not None:
        tokens = workload.context_length.value * workload.batch_size
        flags += [("-c", str(tokens)), ("-np", str(workload.batch_size))]
    if cache_type is not None and cache_type != "f16":  # llama.cpp's default
        flags += [("-ctk", cache_type), ("-ctv", cache_type)]
    return flags


def _buffer(device: Device) -> str:
    return "CPU" if device == CPU else f"{BUFFERS[device.kind]}{device.index or 0}"


def _home(placed: GgufPlacement, number: int, compiled: Compiled, sink: Sink) -> Device:
    """Return the device of a layer: that of its attention and its cache."""
    of_layer = placed.of_layer(number)
    devices = list(dict.fromkeys(device for name, device in of_layer.items() if name.startswith("attn_")))
    if len(devices) > 1:
        units = [assignment.unit for assignment in compiled.plan.assignments if f".{number}." in f"{assignment.unit}."]
        listed = " and ".join(map(str, devices))
        sink.error(
            "unfit-export",
            f"the attention of layer {number} is on {listed}, and llama.cpp has one cache for it",
            span_of(compiled, units),
            help="give the attention of a layer one device",
        )
    return devices[0]


def _check_order(homes: Sequence[Device], on_cpu: int, compiled: Compiled, sink: Sink) -> None:
    """Report layers out of order: llama.cpp puts the first on the CPU, and the rest card by card."""
    for place, home in enumerate(homes):
        again = home in homes[:place] and homes[place - 1] != home
        if (home == CPU and place > on_cpu) or again:
            units = [
                assignment.unit for assignment in compiled.plan.assignments if f".{place}." in f"{assignment.unit}."
            ]
            sink.error(
                "unfit-export",
                f"layer {place} is on {home}, behind one on {homes[place - 1]}: llama.cpp has the first layers on the"
                " CPU, and then those of one card after those of another",
                span_of(compiled, units),
                help="give the CPU the first layers, and each card layers that follow one another",
            )
            return


def _overrides(placed: GgufPlacement, homes: Sequence[Device], own_output: Device) -> list[tuple[str, ...]]:
    """Return `--n-cpu-moe` and `-ot` for tensors on another device than that of their layer."""
    numbers: dict[tuple[str, Device], list[int]] = {}
    for number, home in enumerate(homes):
        for name, device in placed.of_layer(number).items():
            if device != home:
                numbers.setdefault((name, device), []).append(number)
    experts = [numbers.get((name, CPU), []) for name in EXPERTS]
    flags: list[tuple[str, ...]] = []
    count = len(experts[0])
    if count and all(layers == list(range(count)) for layers in experts):
        flags.append(("--n-cpu-moe", str(count)))
        for name in EXPERTS:
            del numbers[name, CPU]
    grouped: dict[tuple[Device, tuple[int, ...]], list[str]] = {}
    for (name, device), layers in numbers.items():
        grouped.setdefault((device, tuple(layers)), []).append(name)
    overrides = [
        rf"^blk\.({'|'.join(map(str, layers))})\.({'|'.join(sorted(names))})\.(weight|bias)$={_buffer(device)}"
        for (device, layers), names in grouped.items()
    ]
    for name in ("output_norm", "output"):
        device = placed.devices.get(name, own_output)
        if device != own_output:
            overrides.append(rf"^{name}\.(weight|bias)$={_buffer(device)}")
    return [*flags, *(("-ot", override) for override in overrides)]


def _notes(placed: GgufPlacement, compiled: Compiled) -> list[str]:
    notes = ["predicted times and sizes are transformers': a GGUF holds weights in types of its own"]
    embedding = placed.devices["token_embd"]
    if embedding.is_accelerator:
        notes.append(f"the embedding is planned on {embedding}, and llama.cpp keeps it on the CPU")
    if _is_cache_on_cpu(compiled) and any(device.is_accelerator for device in placed.devices.values()):
        notes.append("the cache is on the CPU as planned, and llama.cpp computes attention there")
    if len({device for device in placed.devices.values() if device.is_accelerator}) > 1:
        notes.append("that llama.cpp splits layers over cards so was not tried on any")
    return notes
