"""Shows a plan as a table: what each device holds, and its free memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.text import Text

from devmap_config.amounts import MEBIBYTE, counted, format_bytes, largest_unit
from devmap_config.cli.predictions import bases_in_words, how_to_give, missing_in_words, no_plan, predicted
from devmap_config.cli.stages_view import stage_lines
from devmap_config.cli.tables import listing
from devmap_config.devices import DISK
from devmap_config.placement.strategies import TRANSFORMERS_STRATEGIES
from devmap_config.rules.folding import fold_paths

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.table import Table

    from devmap_config.compiler import Compiled
    from devmap_config.devices import Device
    from devmap_config.graph.costs import Measurement
    from devmap_config.graph.loading import LoadedModel
    from devmap_config.plan.plan import Plan
    from devmap_config.plan.process_memory import ProcessMemory

PATTERNS_SHOWN = 6


def plan_lines(compiled: Compiled, width: int) -> Iterator[Text | Table]:
    """Yield the plan for a terminal of this width."""
    plan, model = compiled.plan, compiled.model
    if plan.pipeline is not None:
        yield from stage_lines(compiled, plan.pipeline)
        return
    unit_bytes, unit = largest_unit(model.graph.size_bytes)
    yield Text.assemble(
        (model.class_name, "bold"), f": {weights_in_words(model, plan)}, placed by `{plan.strategy}`; sizes in {unit}"
    )
    is_running = model.graph.measurement is not None
    is_streaming = is_running and any(use.overhead_bytes for use in plan.devices)
    running_headings = ("cache", "active", "overhead")[: 2 * is_running + is_streaming]
    rows = []
    for use in plan.devices:
        running = (use.kv_cache_bytes, use.activation_bytes, use.overhead_bytes)[: len(running_headings)]
        sizes = (use.capacity_bytes, use.weights_bytes, *running, use.free_bytes)
        figures = (f"{size_bytes / unit_bytes:,.1f}" for size_bytes in sizes)
        rows.append(((str(use.id), *figures), _contents(plan, use.id)))
    headings = ("capacity", "weights", *running_headings, "free")
    yield from listing(rows, width, names=("device",), figures=headings, rest="holds")
    yield from _notes(compiled)


def weights_in_words(model: LoadedModel, plan: Plan) -> str:
    """Return the size and the format of the weights: `6.9 GiB in float16, gptq 4 bit`."""
    words = f"{format_bytes(model.graph.size_bytes)} in {model.dtype}"
    if model.quantization is None:
        return words
    if not model.is_counted:
        return f"{words}, counted as before {model.quantization.method.name}"
    words += f", {model.quantization}"
    if any(tensor.offloaded_bytes is not None for tensor in model.graph.tensors.values()):
        held_bytes = sum(use.weights_bytes for use in plan.devices)
        words += f" (what is on the CPU stays in {model.dtype}: {format_bytes(held_bytes)} in all)"
    return words


def _contents(plan: Plan, device: Device) -> list[str]:
    units = [
        assignment.unit or "everything" for assignment in plan.assignments if assignment.location.stored_on == device
    ]
    patterns = fold_paths(units)
    lines = list(patterns[:PATTERNS_SHOWN])
    if len(patterns) > len(lines):
        lines = [*lines[:-1], f"and {len(patterns) - len(lines) + 1} more: `devmap explain`"]
    return lines or ["–"]


def _notes(compiled: Compiled) -> Iterator[Text]:
    plan, model = compiled.plan, compiled.model
    if sentence := predicted(plan, no_plan(compiled)):
        yield Text(sentence)
    if bases := compiled.time_bases:
        yield Text(bases_in_words(bases, plan.prediction), style="dim")
    if missing := compiled.missing_figures:
        yield Text(f"{missing_in_words(missing)}: {how_to_give(missing, compiled.loaded.profile.hardware)}")
    if besides := _besides_text(model):
        yield Text(besides)
    if plan.strategy in TRANSFORMERS_STRATEGIES and plan.measured and len(plan.devices) > 1:
        yield Text(_in_transformers(plan))
    if plan.strategy == "fastest" and not model.graph.decodes:
        yield Text("the model does not decode token by token: `fastest` makes its prefill fast")
    streamed = plan.prediction.streamed_bytes_per_token
    if streamed:
        yield Text(f"{format_bytes(streamed)} {plan.streaming}", style="yellow")
    if plan.streams_buffers:
        yield Text("buffers are offloaded too: plain `from_pretrained` needs `offload_buffers=True`")
    for use in plan.devices:
        if use.id != DISK and use.loading_bytes > use.capacity_bytes - use.free_bytes:
            yield Text(f"loading holds {format_bytes(use.loading_bytes)} at once on {use.id}", style="dim")
    if (memory := compiled.process_memory) is not None:
        yield Text(f"the {memory_in_words(memory)}", style="dim")
    for device in dict.fromkeys(plan.compute.values()):
        patterns = fold_paths(unit for unit, where in plan.compute.items() if where == device)
        yield Text(f"{', '.join(patterns)} run on {device}")
    yield from map(Text, plan.prefilling)
    if plan.offloaded_caches is not None:
        yield Text(caches_in_words(plan))
    if compiled.loaded.profile.workload.context_length.value is None:
        yield Text("only weights are budgeted: the profile names no `workload.context_length`", style="dim")


def caches_in_words(plan: Plan) -> str:
    """Return a clause about the layers whose cache is on the CPU in a plan."""
    if not plan.offloaded_caches:
        return "no layer has its cache on the CPU: all of it has room where the layers run"
    return f"the cache of {', '.join(fold_paths(plan.offloaded_caches))} is on the CPU while they do not run"


def memory_in_words(memory: ProcessMemory) -> str:
    """Return a sentence about the memory of a process that runs a plan on the CPU."""
    own, files, most = map(format_bytes, (memory.anonymous_bytes, memory.file_bytes, memory.peak_bytes))
    libraries = format_bytes(memory.library_file_bytes)
    held = f"process holds {own} of its own, {files} of the model's files and {libraries} of libraries', {most} at most"
    if not memory.missing_bytes:
        return held
    reserve = f"{-(-memory.uncounted_bytes // MEBIBYTE)}MiB"
    return (
        f"{held}: more than the CPU's memory, of which tensors are counted; `reserve: {reserve}` is room for the rest"
    )


def media_in_words(measurement: Measurement) -> str:
    """Return the number of tokens of images and sound in the prompt, in words; empty if none were measured."""
    workload, media = measurement.workload, measurement.media
    if media is None or media.problem:
        return ""
    images = counted(workload.images, "image") if workload.images else ""
    if workload.tiles:
        images += f", of {counted(workload.tiles, 'tile')}" + (" each," if workload.images > 1 else ",")
    sound = f"{workload.audio_seconds:,} s of sound" if workload.audio_seconds else ""
    what = " and ".join(filter(None, (images, sound)))
    tokens = f"= {media.tokens:,} tokens of each prompt" if media.tokens else "beside the tokens of each prompt"
    return f"{what} {tokens}"


def _besides_text(model: LoadedModel) -> str:
    """Return a note on the tokens of images and sound in the prompt, or that none were measured."""
    measurement = model.graph.measurement
    if measurement is None or not measurement.measured:
        return ""
    if measurement.media is not None:
        return media_in_words(measurement)
    uncalled = [
        path
        for path in model.graph.blocks
        if any(True for _ in model.graph.modules[path].parameters)
        and not any(module.path in measurement.by_path for module in model.graph.modules[path].walk())
    ]
    inputs = next(
        (given for part, given in INPUTS_OF_PARTS.items() if any(part in key for key in model.source.config)), ""
    )
    if not uncalled or not inputs:
        return ""
    patterns = ", ".join(fold_paths(uncalled)[:PATTERNS_SHOWN])
    return f"text alone was tried, which does not call {patterns}: write `workload: {{inputs: {{{inputs}}}}}` for more"


INPUTS_OF_PARTS = {"vision": "images: 1", "audio": "audio_seconds: 30"}
"""The inputs for a part of a model, by a word in the keys of its config."""


def _in_transformers(plan: Plan) -> str:
    """Return the sentence about the arguments with which plain transformers makes the same plan."""
    if plan.max_memory is None:
        how = "" if plan.compute else ": pass it the map that `--format device-map` prints"
        return f"no `max_memory` makes plain transformers choose this plan{how}"
    argument = f"max_memory={dict(plan.max_memory)}"
    return f'plain transformers makes the same map of device_map="{plan.strategy}", {argument}'


BAR_COLUMNS = 30

BAR_PARTS = (("weights", "█"), ("cache", "▓"), ("running", "▒"), ("free", "·"))


def bar_lines(plan: Plan, width: int) -> Iterator[Text]:
    """Yield a bar for each device, as long as its capacity: weights, cache, memory for running, free memory."""
    yield Text("  ".join(f"{character} {name}" for name, character in BAR_PARTS), no_wrap=True)
    longest = max(len(str(use.id)) for use in plan.devices)
    for use in plan.devices:
        sizes = (use.weights_bytes, use.kv_cache_bytes, use.activation_bytes + use.overhead_bytes)
        bar, filled, used_bytes = "", 0, 0
        for (_, character), size_bytes in zip(BAR_PARTS, sizes, strict=False):
            used_bytes += size_bytes
            end = min(-(-used_bytes * BAR_COLUMNS // max(use.capacity_bytes, 1)), BAR_COLUMNS)
            bar += character * (end - filled)
            filled = end
        bar += BAR_PARTS[-1][1] * (BAR_COLUMNS - filled)
        holds = ", ".join(
            fold_paths(
                assignment.unit or "everything"
                for assignment in plan.assignments
                if assignment.location.stored_on == use.id
            )
        )
        line = f"{use.id!s:<{longest}}  {bar}  {format_bytes(use.capacity_bytes):>9}"
        room = width - len(line) - 2
        if len(holds) > room:  # as many whole names as there is room for
            names = holds[: max(room - 1, 0)].rpartition(", ")[0]
            holds = f"{names}…" if names else ""
        yield Text(f"{line}  {holds}".rstrip(), no_wrap=True)
