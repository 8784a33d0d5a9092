"""`devmap init`: writes a first profile for a model and a machine, which compiles without changes."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import click

from devmap_config.cli.command import CommandError, command
from devmap_config.cli.machines import MACHINE_HELP, is_of_machine, machine_of
from devmap_config.cli.new_profile import NewProfile, compile_draft, deliver, device_lines, require_new
from devmap_config.cli.options import (
    class_option,
    force_option,
    output_option,
    outside_option,
    quiet_option,
    remote_code_option,
)
from devmap_config.cli.progress import progress
from devmap_config.cli.reporting import echo
from devmap_config.devices import CPU, DISK
from devmap_config.profile.permissions import Permissions

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from devmap_config.compiler import Compilation, Compiled, Rejected
    from devmap_config.devices import Device
    from devmap_config.profile.schema import DeviceSection, Hardware

ASSUMED_MEMORY = {CPU: 2**40, DISK: 2**42}
"""The bytes that are written for devices of unknown size, if the model does not fit without them."""

CONTEXT_LENGTHS = (4096, 2048, 1024, 512, 256, 128, None)
"""The contexts that are tried if the user gives none; with the last one, only weights are counted."""

CHOICES = (
    *("fastest", "longest-context", "fewest-devices"),
    *("auto", "balanced", "balanced_low_0", "sequential"),
    "single",
)
"""The strategies that need only a machine."""

WITHOUT_FIGURES = "fewest-devices"
"""The strategy for a machine of unknown speed."""

OFFERED = (
    "fastest, longest-context, fewest-devices: the best of all plans, by what is measured of the model",
    "auto, balanced, balanced_low_0, sequential: as transformers fills the devices",
    "single: all on one device; manual: by a `device_map` of your own",
)
"""The comments on the strategies that a user may choose."""


class Tokens(click.IntRange):
    """A number of tokens."""

    name = "number of tokens, such as 8192"


@command("init", "table", "json")
@click.argument("source")
@click.option("--on", "machine_name", metavar="MACHINE", help=f"The machine: {MACHINE_HELP}. [default: this one]")
@click.option(
    "--workload",
    "context_length",
    type=Tokens(min=1),
    metavar="TOKENS",
    help=f"The tokens of context that must fit. [default: {CONTEXT_LENGTHS[0]:,}, or as much of it as the model takes]",
)
@click.option(
    "--strategy",
    type=click.Choice(CHOICES),
    metavar="STRATEGY",
    help="The strategy. [default: fastest, if the machine's rates are known]",
)
@class_option
@output_option
@force_option
@quiet_option
@outside_option
@remote_code_option
def init(
    source: str,
    machine_name: str | None,
    context_length: int | None,
    strategy: str | None,
    class_name: str | None,
    output: Path | None,
    output_format: str,
    force: bool,
    quiet: bool,
    allow_outside: bool,
    trust_remote_code: bool,
) -> None:
    """Write a first profile for SOURCE (a hub id, a directory or a config.json) that compiles as it is."""
    from devmap_config.profile.writing import device_text

    require_new(output, force=force)
    hardware = machine_of(machine_name) if machine_name else _this_machine()
    init_options = InitOptions(
        source=source,
        output=output,
        class_name=class_name,
        hardware=hardware,
        machine_name=machine_name or "this machine",
        context_length=context_length,
        strategy=strategy,
        permissions=Permissions(allow_outside=allow_outside, trust_remote_code=trust_remote_code),
    )
    with progress(len(CONTEXT_LENGTHS), quiet=quiet) as begin:
        draft, compiled = _first_draft(init_options, simulates=True, begin=begin)
    deliver(
        _profile(init_options, draft, compiled).text,
        output,
        output_format,
        next_step=f"; next: devmap-compile {output}",
    )
    for device in () if quiet else _assumed(init_options, draft):
        size = device_text(draft.devices[device]).strip("{}")
        named = f"`--on {machine_name}+{device}:…`" if machine_name else "`--on`"
        echo(
            f"the model does not fit without {device}, of which the machine says nothing: {size} is assumed; write what"
            f" there is into the profile, or name it by {named}",
            err=True,
        )


@dataclass(frozen=True, kw_only=True)
class InitOptions:
    """The options of a first profile; those that are `None` are determined."""

    source: str
    hardware: Hardware
    machine_name: str
    output: Path | None = None
    class_name: str | None = None
    context_length: int | None = None
    strategy: str | None = None
    permissions: Permissions


@dataclass(frozen=True, kw_only=True)
class ProfileDraft:
    """A candidate for the first profile; `spare` are devices of the machine that it does not use."""

    dtype: str | None = None
    context_length: int | None
    strategy: str
    devices: dict[Device, DeviceSection]
    spare: dict[Device, DeviceSection]


def _this_machine() -> Hardware:
    from devmap_config.probe.block import as_hardware
    from devmap_config.probe.probe import probe_machine

    return as_hardware(probe_machine(os.environ, None))


def first_profile(asked: InitOptions, *, simulates: bool = True) -> str:
    """Return the text of the first draft that compiles.

    Args:
        asked: the user's options.
        simulates: whether it must also pass a dry run.

    Raises:
        CommandError: if none compiles, with the errors of the first.
    """
    return _profile(asked, *_first_draft(asked, simulates=simulates, begin=lambda _: None)).text


def _assumed(asked: InitOptions, draft: ProfileDraft) -> list[Device]:
    """Return the devices of a draft that the machine does not have, as far as is known."""
    return [device for device in draft.devices if device not in asked.hardware.devices.value]


def _first_draft(asked: InitOptions, *, simulates: bool, begin: Callable[[str], None]) -> tuple[ProfileDraft, Compiled]:
    """Return the first draft that compiles, with its plan: the longest context first, then the fewest devices.

    Args:
        asked: the user's options.
        simulates: whether it must also pass a dry run.
        begin: called with each context that is tried.

    Raises:
        CommandError: if none compiles, with the errors of the first.
    """
    from devmap_config.compiler import Compiled

    failures: list[Rejected] = []
    contexts = CONTEXT_LENGTHS if asked.context_length is None else (asked.context_length,)
    for context_length in contexts:
        begin("the weights alone" if context_length is None else f"a context of {context_length:,} tokens")
        for first in _drafts(asked, context_length):
            draft, compilation = _settled(asked, first, simulates=simulates)
            if isinstance(compilation, Compiled):
                return draft, compilation
            failures.append(compilation)
            if not is_of_machine(compilation.diagnostics):
                break  # other devices do not help
        if failures[-1].reached is None:
            break  # nor does another context: the model is not available
    # Places in a generated file mean nothing to the user: the mistake is in the model or the machine.
    raise CommandError([replace(finding, span=None) for finding in failures[0].diagnostics], data={"profile": None})


def _drafts(asked: InitOptions, context_length: int | None) -> Iterator[ProfileDraft]:
    """Yield drafts, from the one on only accelerators to the one that offloads most."""
    from devmap_config.profile.schema import DeviceSection

    devices = asked.hardware.devices.value
    accelerators = {device: section for device, section in devices.items() if device.is_accelerator}
    listed = dict(accelerators)
    for storage in (None, CPU, DISK):
        if storage is not None:
            listed[storage] = devices.get(storage) or DeviceSection.model_validate({"memory": ASSUMED_MEMORY[storage]})
        if listed:
            spare = {device: section for device, section in devices.items() if device not in listed}
            strategy = asked.strategy or "fastest"
            yield ProfileDraft(context_length=context_length, strategy=strategy, devices=dict(listed), spare=spare)


def _settled(asked: InitOptions, draft: ProfileDraft, *, simulates: bool) -> tuple[ProfileDraft, Compilation]:
    """Compile a draft, and again with changes for cards without bfloat16 or of unknown speed."""

    def tried(draft: ProfileDraft) -> tuple[ProfileDraft, Compilation, set[str]]:
        compilation = compile_draft(_profile(asked, draft), asked.permissions, simulates=simulates)
        return draft, compilation, {finding.code for finding in compilation.diagnostics if finding.is_error}

    draft, compilation, codes = tried(draft)
    if "unsupported-dtype" in codes:
        draft, compilation, codes = tried(replace(draft, dtype="float16"))
    if codes == {"missing-figure"} and asked.strategy is None:
        draft, compilation, _ = tried(replace(draft, strategy=WITHOUT_FIGURES))
    most = _positions(compilation)
    if asked.context_length is None and most is not None and most < (draft.context_length or 0):
        draft, compilation, _ = tried(replace(draft, context_length=most))
    return draft, compilation


def _positions(compilation: Compilation) -> int | None:
    """Return the context that the model was trained for, if it is known."""
    from devmap_config.compiler import Compiled

    prepared = compilation if isinstance(compilation, Compiled) else compilation.reached
    measurement = None if prepared is None else prepared.graph.measurement
    return None if measurement is None else measurement.positions.most


def _profile(asked: InitOptions, draft: ProfileDraft, compiled: Compiled | None = None) -> NewProfile:
    """Return a draft as a profile, with examples from the model if it is known."""
    from devmap_config.profile.writing import link_lines, yaml_text

    sections: dict[str, dict[Device, DeviceSection]] = {}
    hardware = ["# What is not listed here does not exist: nothing spills silently.", "devices:"]
    for device, section in draft.devices.items():
        remark = "assumed: say what there is" if device in _assumed(asked, draft) else ""
        sections.setdefault(remark, {})[device] = section
    for remark, devices in sections.items():
        hardware += device_lines(devices, remark)
    hardware += device_lines(draft.spare, "for what is to be offloaded", is_comment=True)
    placement = [*(f"# {line}" for line in OFFERED), f"strategy: {draft.strategy}"]
    if compiled is not None and (example := _pinnable(compiled)) is not None:
        placement += [
            "# pins:   # parts of the model that must be somewhere; `devmap tree` shows their names",
            f"#   - {{match: {yaml_text(example)}, device: {next(iter(draft.devices))}}}",
        ]
    if DISK in draft.devices:
        placement.append("offload: {folder: ./offload}")
    return NewProfile(
        title=f"A first profile for {asked.source} on {asked.machine_name}.",
        output=asked.output,
        source=asked.source,
        class_name=asked.class_name,
        dtype=draft.dtype and f"{draft.dtype}   # what the accelerator computes in",
        context_length=draft.context_length,
        hardware=[*hardware, *link_lines(asked.hardware)],
        placement=placement,
    )


def _pinnable(compiled: Compiled) -> str | None:
    """Return a part of the model that a pin may name: the last, which is a head in most."""
    parts = [child.path for child in compiled.graph.root.children if next(iter(child.tensors()), None) is not None]
    return parts[-1] if len(parts) > 1 else None
