"""The dry run: a plan's prefill and decode steps on simulated accelerators, through accelerate's own hooks."""

from __future__ import annotations

import functools
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from devmap_config.devices import CPU
from devmap_config.graph.costs import WorkloadShape
from devmap_config.graph.failures import failure_of
from devmap_config.graph.features import media_of
from devmap_config.graph.forwards import Forwards, cache_tensors, tower_inputs
from devmap_config.graph.known_values import knowing_values
from devmap_config.graph.model import TensorName, ancestors, is_within
from devmap_config.graph.recording import (
    OperationBudget,
    Traffic,
    replace_tensors,
    shown_bytes,
    storage_key,
    tensors_in,
)
from devmap_config.graph.repetition import NotAlikeError, Repetition, kinds_of, spread
from devmap_config.libraries.torch import streams_without_a_card, tensors_without_data
from devmap_config.simulate.devices import DeviceMismatchError, Phase, SimulatedDevices
from devmap_config.simulate.hooks import dispatched, hold_in_buffers, place_weights, tensors_of
from devmap_config.simulate.reads import read_without_a_call
from devmap_config.simulate.replay import FILLING, TOWERS, Replay
from devmap_config.simulate.simulation import NOWHERE, DeviceMismatch, MismatchedTensor, Simulation

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from transformers import PreTrainedModel

    from devmap_config.devices import Device
    from devmap_config.execution.assignment import Location
    from devmap_config.graph.costs import Measurement
    from devmap_config.graph.media import Media
    from devmap_config.graph.model import ModelGraph
    from devmap_config.graph.repetition import Kind
    from devmap_config.plan.plan import Plan
    from devmap_config.simulate.devices import Operand

INPUT_NAMES = ("input_ids", "decoder_input_ids", "input_features")

WITHOUT_WORKLOAD = WorkloadShape(batch_size=1, context_length=16, prompt_length=16)
"""The workload if the profile names no context: enough to see that the plan runs."""


MOST_LAUNCHES = 20_000
"""The most operations of a prefill at full length; code with more operations loops over tokens (state spaces without
kernels).
"""

SHORT_PROMPT = 8
"""The length of the prompt that replaces one with too many operations; it takes seconds."""


def dry_run(model: PreTrainedModel, graph: ModelGraph, plan: Plan, *, decoded_tokens: int = 1) -> Simulation:
    """Run a model as its plan places it, on simulated accelerators.

    Args:
        model: the model, built on the meta device; it is unusable afterwards.
        graph: its module tree.
        plan: the location of every tensor, and the executor.
        decoded_tokens: the number of tokens to decode after the prefill; figures of decoding are those of the last.

    Returns:
        The outcome: the plan runs, an operation mixes devices, or the model's code could not be run. It includes the
            bytes on each device, block by block, and the bytes over each link.
    """
    workload = WITHOUT_WORKLOAD
    if graph.measurement is not None:
        workload = _runnable(graph.measurement).decoding_before(graph.measurement.positions.end, decoded_tokens)
    model.eval()
    with OperationBudget().within():
        return _dry_run(model, graph, plan, workload, decoded_tokens)


def _dry_run(
    model: PreTrainedModel, graph: ModelGraph, plan: Plan, workload: WorkloadShape, decoded_tokens: int
) -> Simulation:
    # If a run with skipped blocks fails for any reason, run all blocks: a real failure recurs.
    with suppress(Exception):
        return _simulation(model, graph, plan, workload, decoded_tokens, spares_blocks=True)
    try:
        return _simulation(model, graph, plan, workload, decoded_tokens, spares_blocks=False)
    except Exception as error:  # a model's own code may raise anything without data
        failure = failure_of(error)
        absent = _absent_beyond(model, graph, plan, workload) if failure.cause == "model" else None
        if absent is None and failure.cause == "model":
            absent = _absent_by_its_code(model, graph, plan)
        return absent or Simulation(outcome="unsimulated", reason=failure.reason, cause=failure.cause)


def _simulation(
    model: PreTrainedModel,
    graph: ModelGraph,
    plan: Plan,
    workload: WorkloadShape,
    decoded_tokens: int,
    *,
    spares_blocks: bool,
) -> Simulation:
    """Run the model; with `spares_blocks`, only two of each group of blocks that are alike and placed alike.

    Raises:
        NotAlikeError: if the blocks are not alike after all, or if the plan does not run after a block was left out.
    """
    media_use = None if graph.measurement is None else graph.measurement.media
    holds_media = media_use is not None and media_use.problem is None
    with torch.no_grad(), tensors_without_data():
        run = _DryRun.of(model, graph, plan)  # before values are tracked, as weights have none
        with knowing_values() if holds_media else nullcontext():
            media = media_of(model, workload) if holds_media else ()
            try:
                with run.dispatched(spares_blocks=spares_blocks):
                    if media:  # text alone must run as well; the figures are those of the prompt with media
                        run.forwards(run.prepared(workload.text_alone), decoded_tokens)
                    run.forwards(run.prepared(workload, media), decoded_tokens)
                    run.towers()
            except DeviceMismatchError as error:
                if run.devices.repeated:
                    raise NotAlikeError("of what does not run, all that ran before is told") from error
                return run.simulation(mismatch=error)
    return run.simulation()


def _absent_beyond(model: PreTrainedModel, graph: ModelGraph, plan: Plan, workload: WorkloadShape) -> Simulation | None:
    """Search for reads of weights that nothing copies in, in a model that cannot be run as a whole because its code
    needs values.

    A module that fails returns its input, so that the rest of the model runs. Such a run shows nothing else, but it is
    worthwhile: on a CPU, such a weight gives wrong numbers instead of an error.
    """
    with torch.no_grad(), tensors_without_data():
        run = _DryRun.of(model, graph, plan)
        try:
            with _failing_modules_left_out(model), run.dispatched():
                whole = replace(workload.text_alone, prompt_length=workload.context_length)
                run.forwards(run.prepared(whole), decoded_tokens=0)
                run.towers()
        except DeviceMismatchError as error:
            return run.simulation(mismatch=error) if error.operands[0].device == NOWHERE else None
        except Exception:
            return None
    return None


def _absent_by_its_code(model: PreTrainedModel, graph: ModelGraph, plan: Plan) -> Simulation | None:
    """Search the source of modules for weights that are read without a call of their module, and so are not copied
    in.
    """
    for path, name in read_without_a_call(model):
        if (location := plan.locations.get(TensorName(name))) is None:  # one of several names of a tensor
            continue
        if plan.executor.residence(graph.tensors[TensorName(name)], location) != location.runs_on:
            holder = name.rpartition(".")[0]
            absent = MismatchedTensor(device=NOWHERE, block=_block_around(holder, graph), made_by=holder, tensor=name)
            return Simulation(
                outcome="mismatch",
                mismatch=DeviceMismatch(operation="forward", phase="prefill", running=path, tensors=(absent,)),
            )
    return None


@contextmanager
def _failing_modules_left_out(model: PreTrainedModel) -> Iterator[None]:
    modules = [module for module in model.modules() if module is not model]
    for module in modules:
        module.forward = _or_what_is_given(module.forward)
    try:
        yield
    finally:
        for module in modules:
            module.__dict__.pop("forward", None)


def _or_what_is_given(forward: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(forward)
    def run(*arguments: Any, **options: Any) -> Any:
        try:
            return forward(*arguments, **options)
        except DeviceMismatchError:
            raise
        except Exception:
            given = next((tensor for tensor in tensors_in((arguments, options)) if tensor.is_floating_point()), None)
            if given is None:
                raise
            return torch.empty_like(given)

    return run


def _runnable(measurement: Measurement) -> WorkloadShape:
    """Return the workload, with a short prompt if a long one would take minutes."""
    prefill = sum(cost.prefill_launches for cost in measurement.modules)
    decode = sum(cost.decode_launches for cost in measurement.modules)
    if prefill <= MOST_LAUNCHES or prefill <= 3 * decode:
        return measurement.workload
    media_tokens = 0 if measurement.media is None else measurement.media.tokens
    return replace(
        measurement.workload, prompt_length=min(measurement.workload.prompt_length, SHORT_PROMPT + media_tokens)
    )


def _placement_of_blocks(graph: ModelGraph, plan: Plan) -> dict[str, object]:
    """Return for each block the locations of its parts, and the devices of the block before it, which makes its
    inputs.
    """
    parts: dict[str, list[tuple[str, Location]]] = {path: [] for path in graph.blocks}
    for assignment in plan.assignments:
        if block := _block_around(assignment.unit, graph):
            parts[block].append((assignment.unit[len(block) :], assignment.location))
    runs_on = {
        block: tuple(dict.fromkeys(location.runs_on for _, location in placed)) for block, placed in parts.items()
    }
    before = ("", *graph.blocks)
    return {
        block: (tuple(parts[block]), *runs_on.get(previous, ()))
        for block, previous in zip(graph.blocks, before, strict=False)
    }


def _block_around(path: str, graph: ModelGraph) -> str:
    """Return the block that a module is, or is within; `""` outside of blocks."""
    return next((ancestor for ancestor in (path, *ancestors(path)) if ancestor in graph.blocks), "")


@dataclass
class _DryRun:
    """The state of a dry run."""

    model: PreTrainedModel
    graph: ModelGraph
    plan: Plan
    devices: SimulatedDevices
    absent: dict[str, torch.Tensor]
    phase: str = ""
    kinds: tuple[Kind, ...] = ()
    cache_bytes: dict[Device, int] = field(default_factory=dict)

    @classmethod
    def of(cls, model: PreTrainedModel, graph: ModelGraph, plan: Plan) -> _DryRun:
        """Return a run that has not begun, with the weights on the devices of the plan."""
        hold_in_buffers(model, graph)
        known = replace_tensors(model)
        weights = tensors_of(model)
        absent = {name: torch.empty(tensor.shape, dtype=tensor.dtype) for name, tensor in weights.items()}
        paths = {id(module): path for path, module in model.named_modules()}
        accelerators = tuple(use.id for use in plan.devices if use.id.is_accelerator)
        names = {
            storage_key(tensor): name for tensors in (weights, absent) for name, tensor in reversed(tensors.items())
        }
        traffic = Traffic(dict.fromkeys(graph.blocks), frozenset(graph.skip_keys))
        devices = SimulatedDevices(accelerators, paths, (*known, *absent.values()), names, traffic)
        for tensor in absent.values():
            devices.put(tensor, NOWHERE)
        place_weights(model, plan, graph, devices)
        return cls(model, graph, plan, devices, absent)

    @contextmanager
    def dispatched(self, *, spares_blocks: bool = False) -> Iterator[None]:
        """Attach the plan's hooks to the model, and watch it, while the context lasts."""
        with self.devices.watching(self.model):
            if spares_blocks:  # within the mode, as the devices of a block's tensors are among its traits
                self.kinds = kinds_of(self.model, self.graph.blocks, _placement_of_blocks(self.graph, self.plan).get)
            with dispatched(self.model, self.plan, self.graph, self.devices, self.absent), streams_without_a_card():
                yield

    def prepared(self, workload: WorkloadShape, media: tuple[Media, ...] = ()) -> Forwards:
        """Return the forwards of the model under a workload, with the caches offloaded that the plan offloads."""
        return Forwards(self.model, workload, media, offloads=True, offloaded_caches=self.plan.offloaded_caches)

    def forwards(self, forwards: Forwards, decoded_tokens: int) -> None:
        """Run a prefill and, if the model keeps a cache, decode tokens after it."""
        workload = forwards.workload
        self._begin("prefill")
        cache = self._run(forwards, self._given(forwards, forwards.prefill_inputs, workload.prompt_length))
        if cache_tensors(cache) and workload.context_length > workload.prompt_length:
            cache = None
            self._begin(FILLING)
            cache = self._run(forwards, self._given(forwards, forwards.prefill_inputs, workload.context_length))
        self._note_cache(cache)
        if not any(self.cache_bytes.values()):
            return
        for _ in range(decoded_tokens):
            self._begin("decode")
            cache = self._run(forwards, self._given(forwards, forwards.decode_inputs, cache))

    def _run(self, forwards: Forwards, inputs: dict[str, Any]) -> Any:
        repetition = Repetition(self.devices, () if forwards.makes_cache else self.kinds)
        with repetition.within(self.model):
            cache = forwards.run(inputs)
        repetition.complete(cache_tensors(cache))
        return cache

    def towers(self) -> None:
        """Run each model within the model that text alone does not call, such as a vision tower, if it is split."""
        before = self.phase
        self._begin(TOWERS)
        for tower in self._idle_towers():
            for inputs in tower_inputs(tower):
                for tensor in inputs.values():
                    self.devices.put(tensor, self.plan.main_device)
                try:
                    tower(**inputs)
                except DeviceMismatchError:
                    raise
                except Exception:  # noqa: S112 - it may need other inputs, or values
                    continue
                break
        self.phase = before

    def _idle_towers(self) -> Iterator[PreTrainedModel]:
        called = {path for _, path, _ in self._replay.calls}
        towers: list[str] = []
        for path, module in self.model.named_modules():
            if not path or any(is_within(path, other) for other in towers) or not hasattr(module, "main_input_name"):
                continue
            if any(is_within(other, path) for other in called):
                continue
            towers.append(path)
            units = {path, *ancestors(path)}
            locations = {
                assignment.location
                for assignment in self.plan.assignments
                if assignment.unit in units or is_within(assignment.unit, path)
            }
            if len(locations) > 1 or not all(location.is_one_device for location in locations):
                yield module

    def _note_cache(self, cache: Any) -> None:
        sizes_on: dict[Device, dict[str, int]] = {}
        for tensor in cache_tensors(cache):  # keep no reference, or the cache that a step replaces would count as live
            if not tensor.dim():  # a counter of a layer, which exists even if its block was skipped
                continue
            maker = self.devices.maker.get(self.devices.serial_of(tensor) or -1, "")
            on_device = sizes_on.setdefault(self.devices.of(tensor) or CPU, {})
            on_device[maker] = on_device.get(maker, 0) + shown_bytes(tensor)
        self.cache_bytes = {
            device: sum(spread(sizes, self.devices.repeated).values()) for device, sizes in sizes_on.items()
        }

    def _given(self, forwards: Forwards, inputs_for: Callable[[Any], dict[str, Any]], argument: Any) -> dict[str, Any]:
        """Return inputs on the main device, as `generate` gives them."""
        with self.devices.ignoring():
            inputs = inputs_for(argument)
        for name, value in inputs.items():
            if name in INPUT_NAMES or (forwards.media and isinstance(value, torch.Tensor)):
                self.devices.put(value, self.plan.main_device)
        return inputs

    def _begin(self, phase: str) -> None:
        self.phase = phase
        self.devices.events.append(Phase((), phase))

    # The results

    def simulation(self, *, mismatch: DeviceMismatchError | None = None) -> Simulation:
        """Return the result of what has run so far."""
        replay = self._replay
        return Simulation(
            outcome="runs" if mismatch is None else "mismatch",
            devices=replay.devices(self.cache_bytes),
            links=replay.links,
            steps=replay.steps,
            calls=replay.calls,
            idle=replay.idle if mismatch is None else (),
            hops=replay.hops(self.phase),
            mismatch=None if mismatch is None else self._mismatch(mismatch),
        )

    @property
    def _replay(self) -> Replay:
        return Replay(self.devices.events, self.devices.at, self.graph, self.plan)

    def _mismatch(self, error: DeviceMismatchError) -> DeviceMismatch:
        return DeviceMismatch(
            operation=error.operation,
            phase=self.phase,
            running=error.running,
            tensors=tuple(map(self._operand, error.operands)),
        )

    def _operand(self, operand: Operand) -> MismatchedTensor:
        return MismatchedTensor(
            device=operand.device,
            block=_block_around(operand.made_by, self.graph),
            made_by=operand.made_by,
            tensor=operand.weight,
            blocks=operand.blocks,
        )
