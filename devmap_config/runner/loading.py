"""Loads a model with `from_pretrained`, exactly by its plan."""

from __future__ import annotations

import sys
import warnings
import weakref
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any, NamedTuple

from devmap_config.devices import CPU, DISK, STORAGE_DEVICES
from devmap_config.diagnostics.diagnostic import DevmapError, DevmapWarning, Diagnostic
from devmap_config.files import CAST, FileError, HeldFolder, is_folder
from devmap_config.graph.checkpoint import CheckpointError
from devmap_config.graph.failures import failure_of
from devmap_config.graph.remote_code import READ_IT_FIRST, class_reference, fails_without, hub_kernel, not_run
from devmap_config.libraries.private import LibraryChangedError
from devmap_config.libraries.remote_code import class_from_code, code_of_models
from devmap_config.libraries.transformers import quantization_config, streaming_to, taking_loading_reports
from devmap_config.libraries.versions import TRIED, release
from devmap_config.quantization.registry import transformers_arguments
from devmap_config.runner.arguments import HUB_ARGUMENTS

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from transformers import PreTrainedModel

    from devmap_config.diagnostics.codes import Code, ErrorCode
    from devmap_config.plan.plan import Plan

COMPUTE_HELP = (
    "write `compute: cpu` of the module around it, or drop it: the weights are then streamed at every forward"
)


class RunnerError(DevmapError):
    """The model cannot be loaded or run here.

    Attributes:
        code: the code of the error, with a page under `docs/codes`.
        help: what to do next.
        diagnostics: the error as a diagnostic, with further ones.
    """

    def __init__(self, code: ErrorCode, message: str, help: str | None = None) -> None:
        self.code: Code = code
        self.help = help
        super().__init__(message, (Diagnostic.error(code, message, help=help),))


class UnfitMachineError(RunnerError):
    """This machine cannot run the plan in its present state; `diagnostics` say what it lacks."""

    def __init__(self, diagnostics: tuple[Diagnostic, ...]) -> None:
        errors = [finding for finding in diagnostics if finding.is_error]
        self.code, self.help = errors[0].code, errors[0].help
        DevmapError.__init__(self, "; ".join(error.message for error in errors), diagnostics)


@contextmanager
def telling_of_changes(consequence: str) -> Iterator[None]:
    """Turn errors about a changed library into `RunnerError`, with their consequence."""
    try:
        yield
    except LibraryChangedError as error:
        raise RunnerError(
            "library-changed",
            f"{failure_of(error).reason}: {consequence}",
            "install a version that was tried (docs/libraries.md)",
        ) from error


MMAP_THRESHOLD = -3
"""`M_MMAP_THRESHOLD` of glibc's `mallopt`: larger blocks are mapped separately."""
TRIM_THRESHOLD = -1
"""`M_TRIM_THRESHOLD`: the free bytes at the end of the heap above which they are returned to the system."""
MMAP_THRESHOLD_MOST_BYTES = 32 * 2**20
"""`DEFAULT_MMAP_THRESHOLD_MAX`, to which the first threshold rises by itself once a block of that size is freed, and
the second to twice that.
"""


@dataclass(frozen=True, kw_only=True)
class LoadRequest:
    """The arguments of `from_pretrained` besides the map.

    Attributes:
        weights: a directory or a hub id.
        revision: the commit of a hub id.
        config: the model's config as written, including references to code that comes with the model.
        pieces: the paths of modules whose weights are copied ahead, grouped by those that are copied at once, in order.
        arguments: further arguments, passed on as they are.
    """

    weights: str
    class_name: str
    dtype: str
    attention: str | None
    revision: str | None = None
    quantization: Mapping[str, Any] = field(default_factory=dict)
    offload_folder: Path | None = None
    trust_remote_code: bool = False
    config: Mapping[str, Any] = field(default_factory=dict)
    pieces: tuple[tuple[str, ...], ...] = ()
    arguments: Mapping[str, Any] = field(default_factory=dict)


class Loaded(NamedTuple):
    """A model, and transformers' report on the checkpoint's names, which does not cover tensors on disk."""

    model: PreTrainedModel
    missing: frozenset[str]
    mismatched: frozenset[str]


def load(plan: Plan, request: LoadRequest) -> Loaded:
    """Return the model, loaded with the plan's map and with the plan's modules computing on the CPU.

    Raises:
        RunnerError: if accelerate is missing or too old, a library has changed, this machine lacks a device of the
            plan, a part cannot compute on the CPU, or offloaded weights would be written through a link.
    """
    require_accelerate()
    _require_devices(plan)
    _require_no_links(request.offload_folder)
    is_offloaded = any(location.stored_on == DISK for location in plan.locations.values())
    folder = request.offload_folder if is_offloaded else None
    held = None if folder is None else _locked_folder(folder)
    arguments = {
        **_arguments(request),
        "device_map": _device_map(plan),
        "offload_buffers": plan.executor.offload_buffers,
        "ignore_mismatched_sizes": True,  # they are in the report, and refused unless they are allowed to be new
    }
    with telling_of_changes("the model cannot be loaded as it is planned"):
        with streaming_to(plan.main_device.in_device_map), code_of_models(allowed=request.trust_remote_code):
            loaded = _loaded(request, arguments)
        if plan.executor.works_ahead:
            _bring_ahead(loaded.model, plan, request)
        if folder is not None and _is_read_from(folder):
            weakref.finalize(loaded.model, id, held)  # it is released with the model
        if plan.computed_on_cpu:
            _compute_on_cpu(loaded.model, plan)
        _use_cpu_experts(loaded.model, plan)
        _tell_placement(loaded.model, plan)
        give_back_freed_memory()
        return loaded


def give_back_freed_memory() -> None:
    """Have glibc's allocator return freed memory to the system: casts leave gigabytes of it."""
    import ctypes

    if sys.platform == "linux":
        getattr(ctypes.CDLL(None), "malloc_trim", int)(0)  # other C libraries lack it, and keep less


@contextmanager
def giving_back_at_once() -> Iterator[None]:
    """Have glibc's allocator return freed blocks of a mebibyte or more at once, while the context lasts.

    Quantizers make copies of each weight, four times as large as the result, and free them when the result has been
    allocated between them. The next copies do not fit into the holes, of which the allocator would keep gigabytes. A
    limit that is set by the environment is respected.
    """
    import ctypes
    import os

    set_option = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if set_option is None or "MALLOC_MMAP_THRESHOLD_" in os.environ:
        yield
        return
    set_option(MMAP_THRESHOLD, 2**20)
    try:
        yield
    finally:
        set_option(MMAP_THRESHOLD, MMAP_THRESHOLD_MOST_BYTES)
        # Setting one of the two requires setting the other: at 128 KiB, copies of weights would be returned at every
        # token.
        set_option(TRIM_THRESHOLD, 2 * MMAP_THRESHOLD_MOST_BYTES)


def load_plainly(request: LoadRequest, device_map: str, **arguments: Any) -> PreTrainedModel:
    """Return the model as plain `from_pretrained` loads it by one of its own device maps, such as `auto`.

    Raises:
        RunnerError: if transformers cannot load it.
    """
    with code_of_models(allowed=request.trust_remote_code):
        return _loaded(request, {**_arguments(request), "device_map": device_map, **arguments}).model


def _arguments(request: LoadRequest) -> dict[str, Any]:
    """Return the arguments of `from_pretrained` besides the map."""
    arguments: dict[str, Any] = {
        **request.arguments,
        "dtype": request.dtype,
        "offload_folder": None if request.offload_folder is None else str(request.offload_folder),
        "trust_remote_code": request.trust_remote_code,
        "use_safetensors": True,  # a pickle could run arbitrary code
    }
    optional = {"attn_implementation": request.attention, "revision": request.revision}
    return arguments | {name: value for name, value in optional.items() if value is not None}


def _device_map(plan: Plan) -> dict[str, Any]:
    """Return the plan's map; if there is only one device, with one key, as some quantizers read several keys as
    offloading.
    """
    if plan.computed_on_cpu:
        from devmap_config.dispatch.cpu_compute import TORCH_CPU

        return {**plan.placement, **dict.fromkeys(plan.computed_on_cpu, TORCH_CPU)}
    devices = set(plan.placement.values())
    return {"": devices.pop()} if len(devices) == 1 else dict(plan.placement)


def _bring_ahead(model: PreTrainedModel, plan: Plan, request: LoadRequest) -> None:
    import torch

    from devmap_config.dispatch.mapped_weights import map_weights
    from devmap_config.dispatch.streamed_weights import UnpinnedError, run_on, stream_weights

    on_disk = [name for name, location in plan.locations.items() if location.stored_on == DISK]
    try:
        if plan.main_device.is_accelerator:
            for unit, device in plan.compute.items():
                if device.is_accelerator:
                    run_on(model.get_submodule(unit), torch.device(str(device)))
            main_device = torch.device(str(plan.main_device))
            stream_weights(model, request.pieces, request.offload_folder, main_device, plan.prefilled)
        elif request.offload_folder is not None:
            map_weights(model, on_disk, request.offload_folder)
    except UnpinnedError as error:
        raise RunnerError("load-failed", f"{error}, from which weights are copied", FREE_MEMORY) from None
    except (FileError, CheckpointError, OSError) as error:
        raise RunnerError("load-failed", f"weights on disk cannot be mapped: {first_line(error)}") from error


def _compute_on_cpu(model: PreTrainedModel, plan: Plan) -> None:
    from devmap_config.dispatch.cpu_compute import UncallableUnitError, compute_on_cpu

    try:
        compute_on_cpu(model, [unit for unit in plan.computed_on_cpu if unit not in plan.prefilled])
    except UncallableUnitError as error:
        raise RunnerError("compute-on-cpu", f"{error}, so it cannot compute on the CPU", COMPUTE_HELP) from None


def _use_cpu_experts(model: PreTrainedModel, plan: Plan) -> None:
    from devmap_config.dispatch.cpu_compute import use_cpu_experts

    on_cpu = {str(name) for name, location in plan.locations.items() if location.runs_on == CPU}
    use_cpu_experts(model, on_cpu.__contains__)


def _tell_placement(model: PreTrainedModel, plan: Plan) -> None:
    """Record the placement for libraries that use the model, so that they do not move it, or their user gets an error.

    transformers' pipelines move a model without a map, and send their inputs to the first device of a map. PEFT places
    a model anew if something in its map is the string `cpu` or `disk`; and only by these strings transformers knows
    what is offloaded, and then does not compile.
    """
    import torch

    from devmap_config.libraries.accelerate import before_hooks_are_removed

    for parameter in model.parameters():
        if parameter.is_meta:  # it would silently get no gradient
            parameter.requires_grad_(requires_grad=False)
    if all(parameter.device.type == "cpu" for parameter in model.parameters()):
        model.hf_device_map = {"": torch.device("cpu")}
    else:
        stores = [storage.in_device_map for storage in STORAGE_DEVICES]
        model.hf_device_map = dict(sorted(plan.placement.items(), key=lambda item: item[1] in stores))
    before_hooks_are_removed(model, lambda: warnings.warn(MOVED, DevmapWarning, stacklevel=4))


MOVED = (
    "the hooks by which this model runs as planned are taken off: PEFT then places it anew, by the memory that is free;"
    " name the adapter in the profile (`model.adapter`), or merge it into the checkpoint"
)


def _loaded(request: LoadRequest, arguments: Mapping[str, Any]) -> Loaded:
    if not request.trust_remote_code and hub_kernel(request.config) is not None:
        raise RunnerError("remote-code", not_run(request.config), READ_IT_FIRST)
    try:
        model_class, arguments = _model_class(request), {**arguments, **_own_config(request)}
        if request.quantization:
            arguments = {
                **arguments,
                "quantization_config": quantization_config(transformers_arguments(request.quantization)),
            }
        gives_back = giving_back_at_once() if request.quantization else nullcontext()
        with taking_loading_reports(passes_on=True) as reports, gives_back:
            model = model_class.from_pretrained(request.weights, **arguments)
        info = reports[-1]  # inner models are loaded before it
    except LibraryChangedError:
        raise
    except Exception as error:  # transformers may raise anything if a package, a file or a kernel is missing
        reason = f"{type(error).__name__}: {first_line(error)}"
        if not request.trust_remote_code and fails_without(request.config, request.class_name, error):
            raise RunnerError("remote-code", not_run(request.config), READ_IT_FIRST) from error
        raise RunnerError(
            "load-failed",
            f"transformers cannot load it here: {reason}",
            FREE_MEMORY if is_out_of_memory(error) else INSTALL,
        ) from error
    return Loaded(model, frozenset(info.missing_keys), frozenset(name for name, *_ in info.mismatched_keys))


INSTALL = "install what it asks for, or change `attention`, `quantization` or `class`"
FREE_MEMORY = "end what else holds memory; `devmap probe --against` says what of the lock's needs is free"


def is_out_of_memory(error: Exception) -> bool:
    """Return whether an error says that the memory of the host or of an accelerator is exhausted."""
    message = str(error).lower()
    # For the host's memory, torch raises the latter.
    return isinstance(error, MemoryError) or "out of memory" in message or "can't allocate memory" in message


def first_line(error: Exception) -> str:
    """Return the first line of an error and, if that ends with a colon, the text that follows it."""
    said: list[str] = []
    for line in filter(None, map(str.strip, str(error).splitlines())):
        said.append(line)
        if not line.endswith((":", ",")):
            break
    return " ".join(said).rstrip(".:, ")


def _model_class(request: LoadRequest) -> Any:
    """Return the class that the plan was made for, whose `from_pretrained` loads the model."""
    import transformers

    if reference := _code_reference(request):
        return class_from_code(reference, request.weights, request.revision)
    return getattr(transformers, request.class_name)


def _own_config(request: LoadRequest) -> dict[str, Any]:
    """Return the config of a model that comes with its class, as such a class need not name its config."""
    from transformers import AutoConfig

    if _code_reference(request) is None:
        return {}
    of_hub = {name: value for name, value in request.arguments.items() if name in HUB_ARGUMENTS}
    config = AutoConfig.from_pretrained(request.weights, revision=request.revision, trust_remote_code=True, **of_hub)
    return {"config": config}


def _code_reference(request: LoadRequest) -> str | None:
    return class_reference(request.config, request.class_name) if request.trust_remote_code else None


def _require_no_links(folder: Path | None) -> None:
    """Refuse a folder with links, through which files would be written elsewhere: it may come from a repository."""
    links = [] if folder is None or not is_folder(folder) else [path for path in folder.iterdir() if path.is_symlink()]
    if links:
        raise RunnerError(
            "outside-repository",
            f"the offload folder `{folder}` holds a link, `{links[0].name}`: weights would be written where it leads",
            "empty the folder",
        )


def _locked_folder(folder: Path) -> HeldFolder | None:
    """Lock an offload folder, which loads of other processes would overwrite."""
    try:
        return HeldFolder.of(folder)
    except BlockingIOError:
        raise RunnerError(
            "load-failed",
            f"another process has a model in the offload folder `{folder}`, and this one would write over its weights",
            "end that process, or give this profile an `offload: {folder: …}` of its own",
        ) from None


def _is_read_from(folder: Path) -> bool:
    """Return whether a model may use weights in a folder that another load would overwrite, which casts are not."""
    return is_folder(folder) and any(not path.name.startswith(CAST) for path in folder.iterdir())


def show_progress(wanted: bool) -> None:
    """Show or hide transformers' progress bars."""
    from transformers.utils import logging as transformers_logging

    if wanted:
        transformers_logging.enable_progress_bar()
    else:
        transformers_logging.disable_progress_bar()


def require_accelerate() -> None:
    """Check that accelerate is installed and new enough.

    Raises:
        RunnerError: if it is not; the help names the command that installs it.
    """
    oldest = TRIED["accelerate"][0]  # older versions confuse tied weights that are on disk
    command = f"run `pip install 'accelerate>={oldest}'`"
    try:
        present = version("accelerate")
    except PackageNotFoundError:
        raise RunnerError("accelerate-missing", "loading by a device map needs accelerate", command) from None
    if release(present) < release(oldest):
        raise RunnerError(
            "accelerate-too-old", f"accelerate {present} is installed, and {oldest} or newer is needed", command
        )


def _require_devices(plan: Plan) -> None:
    import torch

    for use in plan.devices:
        kind, index = use.id.kind, use.id.index
        if index is None or not use.weights_bytes:
            continue
        backend = getattr(torch, kind, None)
        count = backend.device_count() if backend is not None and backend.is_available() else 0
        if index >= count:
            raise RunnerError(
                "device-missing",
                f"the plan uses {use.id}, and the number of {kind} devices of this machine is {count}",
                "compile a profile that describes this machine, or run on the one that this profile describes",
            )
