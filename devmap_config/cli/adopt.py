"""`devmap adopt`: turns an existing device_map into a profile with few patterns that compiles to the same placement."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from devmap_config.amounts import profile_bytes_at_least
from devmap_config.cli.command import CommandError, command
from devmap_config.cli.exit_codes import ExitCode
from devmap_config.cli.machines import MACHINE_HELP, machine_of
from devmap_config.cli.new_profile import NewProfile, compile_draft, deliver, device_lines, require_new
from devmap_config.cli.options import (
    FILE,
    class_option,
    dtype_option,
    force_option,
    output_option,
    outside_option,
    remote_code_option,
)
from devmap_config.cli.reporting import echo
from devmap_config.devices import DISK
from devmap_config.profile.permissions import Permissions

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from devmap_config.devices import Device
    from devmap_config.diagnostics.diagnostic import Diagnostic, Sink
    from devmap_config.graph.model import ModelGraph, TensorName
    from devmap_config.profile.schema import Hardware


@command("adopt", "table", "json")
@click.argument("device_map", type=FILE, metavar="MAP")
@click.option("--model", "source", required=True, help="The model: a hub id, a directory, or a config.json.")
@class_option
@dtype_option
@click.option("--on", "machine", metavar="MACHINE", help=f"The machine: {MACHINE_HELP}.")
@output_option
@force_option
@outside_option
@remote_code_option
def adopt(
    device_map: Path,
    source: str,
    class_name: str | None,
    dtype: str | None,
    machine: str | None,
    output: Path | None,
    output_format: str,
    force: bool,
    allow_outside: bool,
    trust_remote_code: bool,
) -> ExitCode:
    """Write a profile that places a model as MAP does: JSON, or a Python dict such as `model.hf_device_map` prints.

    With `-`, the map is read from stdin. If transformers refuses the map, for example as no key names a layer, the
    errors are listed, nothing is written, and the exit code is 1. Where transformers takes the map in another way than
    it is written (keys that name nothing, tied tensors apart), the profile is written, with warnings. A profile that
    does not compile is also written, with the reason on stderr and exit code 1.
    """
    from devmap_config.cli.tree import graph_of_source
    from devmap_config.compiler import Rejected
    from devmap_config.diagnostics.diagnostic import Sink
    from devmap_config.rules.adoption import adopted_homes
    from devmap_config.rules.written_map import read_device_map

    require_new(output, force=force)
    hardware, sink = machine_of(machine) if machine else None, Sink()
    name, text = _map_text(device_map)
    entries = read_device_map(text, name, sink)
    if entries is not None:
        graph = graph_of_source(source, class_name, dtype, None, trust_remote_code)
        homes = adopted_homes(entries, graph, name, sink)
        _check_machine(homes.values(), hardware, machine or "", sink)
    if entries is None or sink.has_errors:
        if output is not None:
            echo(f"`{output}` is not written, because of errors", err=True)
        exit_code = ExitCode.USAGE if entries is None else ExitCode.WRONG
        raise CommandError(sink, sink.texts, exit_code=exit_code, data={"profile": None})
    profile = adopted_profile(
        graph,
        homes,
        source=source,
        class_name=class_name,
        dtype=dtype,
        machine=hardware,
        output=output,
        title=f"Adopted from {name}: the same placement, as patterns.",
    )
    deliver(profile.text, output, output_format, sink)
    permissions = Permissions(allow_outside=allow_outside, trust_remote_code=trust_remote_code)
    compilation = compile_draft(profile, permissions, simulates=False)
    if isinstance(compilation, Rejected):
        _say_that_it_is_refused(compilation.diagnostics)
        return ExitCode.WRONG
    return ExitCode.DONE


def _say_that_it_is_refused(diagnostics: Iterable[Diagnostic]) -> None:
    """Report why a profile that matches a map does not compile, although transformers may accept the map."""
    for finding in diagnostics:
        if finding.is_error:
            echo(f"as it is, the profile does not compile: {finding.message} ({finding.code})", err=True)


STDIN = Path("-")


def _map_text(path: Path) -> tuple[str, str]:
    """Return the name of a map, and its text."""
    from devmap_config.files import DEVICE_MAP, FileError, decoded, read_text

    try:
        if path != STDIN:
            return path.name, read_text(path, DEVICE_MAP)
        data = sys.stdin.buffer.read(DEVICE_MAP.max_bytes + 1)
        if len(data) > DEVICE_MAP.max_bytes:
            raise click.UsageError(f"stdin holds more than {DEVICE_MAP.max_bytes:,} bytes: that is not a device_map")
        return "stdin", decoded(data)
    except FileError as error:
        raise click.UsageError(f"`{path}` {error}") from None


def _check_machine(used: Iterable[Device], hardware: Hardware | None, name: str, sink: Sink) -> None:
    """Report accelerators of the map that the machine does not have; the CPU and the disk are added if they are
    used.
    """
    listed = used if hardware is None else hardware.devices.value
    for device in dict.fromkeys(used):
        if device.is_accelerator and device not in listed:
            sink.error(
                "unknown-device",
                f"the map uses {device}, and `{name}` has no such device",
                help=f"it has {', '.join(map(str, listed))}; name a machine that has it, or leave `--on` out",
            )


def adopted_profile(
    graph: ModelGraph,
    homes: Mapping[TensorName, Device],
    *,
    source: str,
    class_name: str | None,
    dtype: str | None,
    machine: Hardware | None,
    output: Path | None,
    title: str,
) -> NewProfile:
    """Return the profile that places every tensor as `homes` says; without a machine, one that is just large enough."""
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
    )


def _resident_bytes(graph: ModelGraph, homes: Mapping[TensorName, Device]) -> dict[Device, int]:
    """Return the bytes on each device after loading; some buffers of streamed modules stay on the device that runs
    them.
    """
    from devmap_config.placement.problem import Problem, bytes_by_device

    problem = Problem(graph, dict.fromkeys(homes.values(), 0))
    main_device = problem.executor.main_device(homes.values())
    return dict.fromkeys(homes.values(), 0) | bytes_by_device(problem, homes, main_device=main_device)
