"""`devmap adopt`: an existing device_map as a profile of few patterns that compiles to the same placement."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import click

from devmap_config.amounts import profile_bytes_at_least
from devmap_config.cli.command import command
from devmap_config.cli.machines import MACHINE_HELP, machine_of
from devmap_config.cli.new_profile import NewProfile, deliver, device_lines, require_new
from devmap_config.cli.options import FILE, class_option, dtype_option, force_option, output_option, remote_code_option
from devmap_config.devices import CPU, DISK

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from devmap_config.devices import Device
    from devmap_config.graph.model import ModelGraph, TensorName
    from devmap_config.profile.schema import Hardware


@command("adopt")
@click.argument("device_map", type=FILE, metavar="MAP.json")
@click.option("--model", "source", required=True, help="The model: a hub id, a directory, or a config.json.")
@class_option
@dtype_option
@click.option("--on", "machine", metavar="MACHINE", help=f"The machine: {MACHINE_HELP}.")
@output_option
@force_option
@remote_code_option
def adopt(
    device_map: Path,
    source: str,
    class_name: str | None,
    dtype: str | None,
    machine: str | None,
    output: Path | None,
    force: bool,
    trust_remote_code: bool,
) -> None:
    """Write a profile that places a model as MAP.json does: a `device_map`, or what `model.hf_device_map` held.

    Tensors that the map does not name go where transformers puts them, which is the CPU.
    """
    from devmap_config.cli.tree import graph_of_source

    require_new(output, force=force)
    graph = graph_of_source(source, class_name, dtype, None, trust_remote_code)
    homes, uncovered = _homes(_read_map(device_map), graph)
    text = profile_text(
        graph,
        homes,
        source=source,
        class_name=class_name,
        dtype=dtype,
        machine=machine_of(machine) if machine else None,
        output=output,
        title=f"Adopted from {device_map.name}: the same placement, as patterns.",
    )
    if uncovered:
        click.echo(
            f"the map names no device for {uncovered} tensors: they are on the CPU, where transformers puts them",
            err=True,
        )
    deliver(text, output, "table")


def _read_map(path: Path) -> dict[str, Device]:
    """The map, with what its names of devices stand for."""
    from devmap_config.files import DEVICE_MAP, FileError, read_json
    from devmap_config.profile.device_names import DeviceNameError, expand_devices, kind_of

    try:
        value = read_json(path, DEVICE_MAP)
    except FileError as error:
        raise click.UsageError(f"`{path}` {error}") from None
    if not isinstance(value, dict) or not value:
        raise click.UsageError(f"`{path}` is no device_map: it must be an object of modules and devices")
    kind = next(filter(None, (kind_of(str(device)) for device in value.values())), "cuda")
    read: dict[str, Device] = {}
    for key, device in value.items():
        text = f"{device}:0" if device in ("cuda", "xpu", "npu", "hpu") else str(device)
        try:
            devices = expand_devices(text, kind)
        except DeviceNameError as error:
            raise click.UsageError(f"`{key}` of the map: {error.message}; {error.help}") from None
        if not isinstance(device, (int, str)) or len(devices) > 1:
            raise click.UsageError(f"`{key}` of the map: `{device}` is no device")
        read[key] = devices[0]
    return read


def _homes(device_map: Mapping[str, Device], graph: ModelGraph) -> tuple[dict[TensorName, Device], int]:
    """The device of every tensor, as transformers reads the map, and how many the map does not name."""
    keys = sorted((key for key in device_map if key), key=lambda key: (key.count("."), len(key)), reverse=True)
    unknown = [key for key in keys if key not in graph.modules and key not in graph.tensors]
    if unknown:
        raise click.UsageError(f"{graph.class_name} has no `{unknown[0]}`, which the map names")
    # transformers joins the keys as they are, so that a dot takes any character and `layers.1` also `layers.10`.
    expression = re.compile("|".join(f"({key})" for key in keys)) if keys else None
    homes: dict[TensorName, Device] = {}
    uncovered = 0
    for name in graph.tensors:
        found = expression.match(name) if expression else None
        device = device_map.get(found.group()) if found else device_map.get("")
        homes[name] = device or CPU
        uncovered += device is None
    for group in graph.tied_groups:  # one tensor, one home: that of the name that comes first
        homes |= dict.fromkeys(group, homes[group[0]])
    return homes, uncovered


def profile_text(
    graph: ModelGraph,
    homes: Mapping[TensorName, Device],
    *,
    source: str,
    class_name: str | None,
    dtype: str | None,
    machine: Hardware | None,
    output: Path | None,
    title: str,
) -> str:
    """The profile that places every tensor as `homes` says; without a machine, one that is just large enough."""
    from devmap_config.profile.schema import DeviceSection
    from devmap_config.profile.writing import link_lines, yaml_text
    from devmap_config.rules.compression import compress

    used = _resident_bytes(graph, homes)
    described = {} if machine is None else dict(machine.devices.value)
    just_enough = {
        device: DeviceSection.model_validate({"memory": profile_bytes_at_least(used[device])})
        for device in sorted(used)
        if device not in described
    }
    hardware = ["devices:", *device_lines(described), *device_lines(just_enough, "just what the map needs")]
    patterns = compress(graph, homes)
    if set(patterns) == {""}:
        placement = ["strategy: single", f"device: {patterns['']}"]
    else:
        placement = ["strategy: manual", "device_map:"]
        placement += [f"  {yaml_text(pattern)}: {device.in_device_map}" for pattern, device in patterns.items()]
    if DISK in used:
        placement.append("offload: {folder: ./offload}")
    return NewProfile(
        title=title,
        output=output,
        source=source,
        class_name=class_name,
        dtype=dtype,
        hardware=[*hardware, *(link_lines(machine) if machine is not None else ())],
        placement=placement,
    ).text


def _resident_bytes(graph: ModelGraph, homes: Mapping[TensorName, Device]) -> dict[Device, int]:
    """Bytes on each device once loaded: some buffers of what is streamed stay where it runs."""
    from devmap_config.placement.problem import Problem, bytes_by_device

    problem = Problem(graph, dict.fromkeys(homes.values(), 0))
    main_device = problem.executor.main_device(homes.values())
    return dict.fromkeys(homes.values(), 0) | bytes_by_device(problem, homes, main_device=main_device)
