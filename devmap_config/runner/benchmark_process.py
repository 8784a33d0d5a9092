"""Loads a model and generates with it in a process of its own, and returns the times, or why it failed."""

from __future__ import annotations

import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal

from devmap_config.diagnostics.diagnostic import DevmapError
from devmap_config.files import discard_output
from devmap_config.runner.demonstration import measured_generation
from devmap_config.runner.loading import is_out_of_memory, load_plainly
from devmap_config.runner.random_weights import of_random_weights
from devmap_config.runner.runner import load_verified, notices, prepare
from devmap_config.runner.usage import peak_bytes_of
from devmap_config.wording import first_line

if TYPE_CHECKING:
    from collections.abc import Mapping

    from transformers import PreTrainedModel

    from devmap_config.hardware.inventory import InventoryDevice
    from devmap_config.profile.permissions import Permissions
    from devmap_config.runner.generation_times import GenerationTimes, GenerationWorkload
    from devmap_config.runner.loading import LoadRequest

Loader = Literal["plan", "auto", "cpu"]
"""A way to load a model: `load_model` by the lock, or plain `from_pretrained` with this `device_map`."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """A model to load in a process of its own, and what to generate with it.

    Attributes:
        loader: the way to load it.
        folder: the working directory.
        profile: the profile's file, for the lock.
        variables: values for the profile's templates.
        permissions: what the user allows the profile.
        random_weights: the folder of a random checkpoint that replaces the model's own.
        request: the arguments of `from_pretrained` without a lock.
        max_memory: its memory limits by device in that case.
        devices: the devices of the profile; torch is limited to their memory, if possible.
        generation: the generation of each turn.
        least_seconds: the least time to measure for, so that short generations are measured more than once.
    """

    loader: Loader
    folder: Path
    profile: Path
    variables: Mapping[str, str]
    permissions: Permissions
    random_weights: Path | None
    request: LoadRequest
    max_memory: Mapping[int | str, int]
    devices: tuple[InventoryDevice, ...]
    generation: GenerationWorkload
    least_seconds: float = 0.5


@dataclass(frozen=True, kw_only=True)
class Sample:
    """The times of a process that loads a model and generates, and its peak on each device."""

    load_seconds: float
    generation: GenerationTimes
    peak_bytes: Mapping[str, int]


@dataclass(frozen=True, kw_only=True)
class SampleFailure:
    """The reason why there is no sample, and what the process was doing."""

    doing: str
    reason: str
    is_out_of_memory: bool

    def __str__(self) -> str:
        return f"out of memory while {self.doing}" if self.is_out_of_memory else f"{self.reason}, while {self.doing}"


LIBRARIES = ("accelerate", "torch", "transformers")
"""Libraries whose import does not count as loading."""


def run_in_process(job: Job) -> Sample | SampleFailure:
    """Run a job in a new process that starts with the libraries imported and nothing else in memory."""
    context = get_context("forkserver" if sys.platform == "linux" else "spawn")
    if sys.platform == "linux":
        start_server([__name__, *LIBRARIES, "transformers.generation.utils"])
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        try:
            return pool.submit(measure, job).result()
        except BrokenProcessPool:
            reason = "its process was killed, as a system does that runs out of memory"
            return SampleFailure(doing="loading or running", reason=reason, is_out_of_memory=False)


def start_server(modules: list[str]) -> None:
    """Start the process that imports modules once, and is forked for each job; if one is running, keep it."""
    from multiprocessing import forkserver

    forkserver.set_forkserver_preload(modules)
    folder = Path.cwd()
    os.chdir("/")  # Python imports from the working directory first: a profile's folder may hold an `accelerate.py`
    try:
        forkserver.ensure_running()
    finally:
        os.chdir(folder)


def measure(job: Job) -> Sample | SampleFailure:
    """Run a job in this process, whose output is discarded from then on."""
    os.chdir(job.folder)
    for stream in (sys.stdout, sys.stderr):
        discard_output(stream)
    for library in LIBRARIES:
        getattr(import_module(library), job.request.class_name, None)  # naming it makes transformers import it
    doing = "loading"
    with TemporaryDirectory(prefix="devmap-bench-") as offload_folder:
        try:
            _hold_to_memory(job.devices)
            start_seconds = time.perf_counter()
            model = _loaded(job, offload_folder)
            _wait_for(job.devices)
            load_seconds = time.perf_counter() - start_seconds
            doing = "running"
            generation = measured_generation(model, job.request, job.generation, least_seconds=job.least_seconds)
        except (DevmapError, MemoryError, RuntimeError) as error:
            return SampleFailure(doing=doing, reason=first_line(error), is_out_of_memory=is_out_of_memory(error))
    peaks = {str(device.id): peak_bytes_of(device.id) for device in job.devices}
    peak_bytes = {device: peak for device, peak in peaks.items() if peak is not None}
    return Sample(load_seconds=load_seconds, generation=generation, peak_bytes=peak_bytes)


def _loaded(job: Job, offload_folder: str) -> PreTrainedModel:
    if job.loader == "plan":
        deployment = prepare(
            job.profile,
            variables=job.variables,
            permissions=job.permissions,
            needs_weights=job.random_weights is None,
        )
        if job.random_weights is not None:
            deployment = of_random_weights(deployment, job.random_weights)
        notices(deployment, asks_machine=True)
        return load_verified(deployment)
    max_memory = {"max_memory": dict(job.max_memory)} if job.loader == "auto" else {}
    return load_plainly(job.request, job.loader, **max_memory, offload_folder=offload_folder)


def _hold_to_memory(devices: tuple[InventoryDevice, ...]) -> None:
    """Limit torch to the memory that the profile states for each card, so that what would not fit fails."""
    for device in devices:
        backend, index = _backend(device), device.id.index
        if index is None or not hasattr(backend, "set_per_process_memory_fraction"):
            continue
        free_bytes, total_bytes = backend.mem_get_info(index)
        if device.memory_bytes < total_bytes:
            driver_bytes = min(total_bytes - free_bytes, device.overhead_bytes)
            backend.set_per_process_memory_fraction((device.memory_bytes - driver_bytes) / total_bytes, index)


def _wait_for(devices: tuple[InventoryDevice, ...]) -> None:
    for device in devices:
        backend = _backend(device)
        if device.id.is_accelerator and hasattr(backend, "synchronize"):
            backend.synchronize()


def _backend(device: InventoryDevice) -> Any:
    """Return torch's module for a kind of accelerator; `None` if it has none."""
    import torch

    return getattr(torch, device.id.kind, None)
