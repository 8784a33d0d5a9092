"""Loads a profile: reads and merges its files, renders its templates, validates it; every value keeps its place."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from pydantic import ValidationError

from devmap_config.files import Boundary, boundary_of, exists, is_folder
from devmap_config.profile.inheritance import ProfileReader
from devmap_config.profile.located import Located, written
from devmap_config.profile.merging import merge, variable_values, variables_of
from devmap_config.profile.refusals import Refusals
from devmap_config.profile.rendering import Renderer
from devmap_config.profile.schema import Cache, Hardware, Inputs, Offload, Profile
from devmap_config.profile.section import Section
from devmap_config.wording import closest

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from devmap_config.devices import Device
    from devmap_config.diagnostics.diagnostic import Sink
    from devmap_config.profile.document import MappingNode
    from devmap_config.profile.schema import Assistant


OFFLOAD_FOLDER = "offload"
"""The offload folder of a machine that is only hypothetical."""


@dataclass(frozen=True)
class LoadedProfile:
    """A profile that was read; sections with mistakes are left out, and reported.

    Attributes:
        path: the file, as it was given.
        overrides: the `--set` values.
    """

    path: Path
    profile: Profile
    boundary: Boundary
    overrides: Mapping[str, str]


def on_other_hardware(loaded: LoadedProfile, hardware: Hardware, strategy: str) -> LoadedProfile:
    """Return a profile for another machine, placed by this strategy.

    Memory caps, the folder on disk and groups of devices are left out: they belong to the profile's own machine.
    """
    offload = loaded.profile.placement.offload.changed(folder=OFFLOAD_FOLDER)
    groups = loaded.profile.placement.groups
    if not all(device in hardware.listed for group in groups for device in group.value):
        groups = ()
    placement = loaded.profile.placement.changed(
        max_memory={}, device=None, device_map=None, strategy=strategy, offload=offload, groups=groups
    )
    return replace(loaded, profile=loaded.profile.changed(hardware=hardware, placement=placement))


def for_engine(loaded: LoadedProfile, engine: str, groups: Sequence[tuple[Device, ...]]) -> LoadedProfile:
    """Return the same profile for another engine, with as many sequences at once.

    Args:
        loaded: the profile.
        engine: the engine, as `targets` names it.
        groups: devices that share each layer there.
    """
    profile = loaded.profile
    workload, placement = profile.workload, profile.placement.changed(groups=tuple(map(Located, groups)))
    if engine != "vllm":  # only vLLM schedules the sequences of a batch as requests of their own
        sequences = workload.batch_size * workload.concurrency.value
        workload = workload.model_copy(update={"batch_size": sequences, "concurrency": Located(1)})
    return replace(loaded, profile=profile.changed(targets=(engine,), workload=workload, placement=placement))


def of_assistant(loaded: LoadedProfile, assistant: Assistant) -> LoadedProfile:
    """Return the profile of a draft model: whole on one device of the same machine, for the same workload."""
    profile = loaded.profile
    own = {"source": assistant.source, "revision": assistant.revision, "dtype": assistant.dtype}
    nothing = {"class_name": Located(None, assistant.source.place), "quantization": Located(None), "allow_new": ()}
    model = profile.model.model_copy(update={**own, **nothing, "adapter": None, "assistant": None})
    workload = profile.workload.model_copy(update={"inputs": Inputs(), "optimize": "decode", "cache": Cache()})
    placement = profile.placement.changed(strategy="single", device_map=None)
    placement = placement.model_copy(update={"device": assistant.device, "pins": (), "offload": Offload()})
    changed = profile.model_copy(update={"model": model, "workload": workload, "placement": placement})
    return replace(loaded, profile=changed)


def with_workload(loaded: LoadedProfile, *, cache: str, context_length: int) -> LoadedProfile:
    """Return a profile with another cache and context; a prompt that filled the old context fills the new one."""
    workload = loaded.profile.workload
    prompt_length = workload.prompt_length and min(workload.prompt_length, context_length)
    if workload.cache.implementation != cache:
        workload = workload.changed(cache=Cache(implementation=cache))
    changed = workload.changed(context_length=context_length, prompt_length=prompt_length)
    return replace(loaded, profile=loaded.profile.changed(workload=changed))


def load_profile(
    path: Path,
    sink: Sink,
    *,
    overrides: Mapping[str, str] | None = None,
    remembered: Mapping[str, str] | None = None,
    allow_outside: bool = False,
) -> LoadedProfile | None:
    """Read, merge, render and validate a profile.

    Args:
        path: the profile's file.
        sink: takes the diagnostics.
        overrides: values for variables, as text; a variable that the profile does not have is an error.
        remembered: values from an earlier compilation, for variables that still exist.
        allow_outside: allow paths that lead out of the repository.

    Returns:
        The profile without its invalid parts, or `None` if too little of it is valid to go on.
    """
    overrides = overrides or {}
    boundary = boundary_of(path, allow_outside=allow_outside)
    reader = ProfileReader(boundary, sink)
    documents = reader.read(str(path))
    if not documents:
        return None
    variables = variables_of(documents)
    known = {entry.key.text for entry in variables.entries}
    used = {name: text for name, text in (remembered or {}).items() if name in known} | dict(overrides)
    _check_overrides(variables, overrides, sink)
    renderer = Renderer(variable_values(variables, used), sink)
    document = _merged(documents, renderer)
    refusals = Refusals(sink, Profile, is_incomplete=reader.is_incomplete)
    try:
        profile = Profile.model_validate(written(document), context=refusals)
    except ValidationError:  # reported already; too little is valid
        return None
    _check_offload_folder(profile.placement.offload.folder, boundary, sink)
    return LoadedProfile(path, profile, boundary, used)


def load_hardware(path: Path, sink: Sink) -> Hardware | None:
    """Read the machine that the `hardware:` of a file describes; other keys are ignored.

    Args:
        path: the file, which may extend others.
        sink: takes the diagnostics.

    Returns:
        The machine, or `None` if its description is wrong.
    """
    reader = ProfileReader(boundary_of(path), sink)
    documents = reader.read(str(path))
    if not documents:
        return None
    renderer = Renderer(variable_values(variables_of(documents), {}), sink)
    document = _merged(documents, renderer).only(lambda key: key == "hardware")
    refusals = Refusals(sink, _Machine, is_incomplete=reader.is_incomplete)
    try:
        return _Machine.model_validate(written(document), context=refusals).hardware
    except ValidationError:  # reported already
        return None


class _Machine(Section):
    hardware: Hardware


def _merged(documents: list[MappingNode], renderer: Renderer) -> MappingNode:
    """Merge several documents into one, and render its templates."""
    return renderer.values(merge([renderer.names(document) for document in documents], renderer.sink))


def _check_offload_folder(folder: Located[str | None], boundary: Boundary, sink: Sink) -> None:
    if folder.value is None:
        return
    if not boundary.holds(folder.path):
        sink.error(
            "outside-repository",
            f"the offload folder `{folder.value}` lies outside of the repository",
            folder.span,
            help="keep it within, or pass `--allow-outside`",
        )
    elif exists(folder.path) and not is_folder(folder.path):
        sink.error(
            "missing-offload-folder",
            f"`{folder.value}` is a file, not a folder",
            folder.span,
            help="name a folder; it need not exist",
        )


def _check_overrides(variables: MappingNode, overrides: Mapping[str, str], sink: Sink) -> None:
    known = [entry.key.text for entry in variables.entries]
    for name in overrides:
        if name not in known:
            close = closest(name, known)
            sink.error(
                "unknown-variable",
                f"a value is given for `{name}`, which is not a variable of the profile",
                variables.span,
                help=f"did you mean `{close}`?" if close else f"add `{name}` under `variables:`",
            )
