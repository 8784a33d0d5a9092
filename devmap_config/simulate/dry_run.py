"""Runs a plan's prefill and decode steps on simulated accelerators, through accelerate's own hooks."""

from __future__ import annotations

import functools
import itertools
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from devmap_config.devices import CPU
from devmap_config.graph.costs import Workload
from devmap_config.graph.failures import failure_of
from devmap_config.graph.forwards import Forwards, cache_tensors, tower_inputs
from devmap_config.graph.model import ModulePath, TensorName
from devmap_config.graph.recording import replace_tensors, shown_bytes, storage_key, tensors_in
from devmap_config.libraries.torch import tensors_without_data, tree_leaves
from devmap_config.simulate.devices import DeviceMismatchError, SimulatedDevices
from devmap_config.simulate.hooks import dispatched, hold_in_buffers, place_weights
from devmap_config.simulate.reads import read_without_a_call
from devmap_config.simulate.simulation import NOWHERE, LinkUse, Mismatch, Party, SimulatedDevice, Simulation, Step

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from transformers import PreTrainedModel

    from devmap_config.devices import Device
    from devmap_config.graph.costs import Measurement
    from devmap_config.graph.model import ModelGraph
    from devmap_config.plan.plan import Plan
    from devmap_config.simulate.devices import Operand

FILLING = "filling"
"""Fills the cache up to the context, where a prompt is a part of it; what that takes by itself is not looked at."""

TOWERS = "towers"
"""Runs what a prompt of text alone does not call (towers for images); only whether that runs is looked at."""

UNOBSERVED = (FILLING, TOWERS)

INPUT_NAMES = ("input_ids", "decoder_input_ids", "input_features")

WITHOUT_WORKLOAD = Workload(batch_size=1, context_length=16, prompt_length=16)
"""What is run where the profile names no context: enough to see whether the plan runs."""


MOST_LAUNCHES = 20_000
"""A prefill of more operations is of code that goes from token to token (state spaces without their kernels)."""

SHORT_PROMPT = 8
"""So many tokens are then prefilled: enough to see whether the plan runs, and a matter of seconds."""


def dry_run(model: PreTrainedModel, graph: ModelGraph, plan: Plan, *, decoded_tokens: int = 1) -> Simulation:
    """Run a model that was built on the meta device as the plan places it; the model is of no use afterwards.

    Args:
        model: the model.
        graph: its graph.
        plan: where everything is and runs.
        decoded_tokens: how many tokens are run after the prefill; what is told of decoding is of the last one.
    """
    workload = WITHOUT_WORKLOAD if graph.measurement is None else _runnable(graph.measurement)
    model.eval()
    run: _Run | None = None
    try:
        with torch.no_grad(), tensors_without_data():
            run = _Run.of(model, graph, plan)
            with run.dispatched():
                run.forwards(workload, decoded_tokens)
                run.towers()
    except DeviceMismatchError as error:
        if run is None:
            raise
        return run.simulation(mismatch=error)
    except Exception as error:  # a model's own code may raise anything where there is no data
        failure = failure_of(error)
        absent = _absent_beyond(model, graph, plan, workload) if failure.cause == "model" else None
        if absent is None and failure.cause == "model":
            absent = _absent_by_its_code(model, graph, plan)
        return absent or Simulation(outcome="unsimulated", reason=failure.reason, cause=failure.cause)
    return run.simulation()


def _absent_beyond(model: PreTrainedModel, graph: ModelGraph, plan: Plan, workload: Workload) -> Simulation | None:
    """The dry run of a model whose code needs data, up to a weight that nothing copies in; `None` without one.

    A module that fails gives back what it was given. So the rest of the model is run, and though nothing else can be
    told of it: on a CPU, such a weight makes wrong numbers where it makes no error.
    """
    with torch.no_grad(), tensors_without_data():
        run = _Run.of(model, graph, plan)
        try:
            with _failing_modules_left_out(model), run.dispatched():
                run.forwards(replace(workload, prompt_length=workload.context_length), decoded_tokens=0)
                run.towers()
        except DeviceMismatchError as error:
            return run.simulation(mismatch=error) if error.operands[0].device == NOWHERE else None
        except Exception:
            return None
    return None


def _absent_by_its_code(model: PreTrainedModel, graph: ModelGraph, plan: Plan) -> Simulation | None:
    """A weight that nothing copies in, and that a module's code reads without calling what holds it; `None` without."""
    for path, name in read_without_a_call(model):
        if (location := plan.locations.get(TensorName(name))) is None:  # one of several names of a tensor
            continue
        if plan.executor.residence(graph.tensors[TensorName(name)], location) != location.runs_on:
            holder = name.rpartition(".")[0]
            block = next((each for each in _and_around(holder) if each in graph.blocks), "")
            absent = Party(device=NOWHERE, block=block, made_by=holder, tensor=name)
            return Simulation(
                outcome="mismatch",
                mismatch=Mismatch(operation="forward", phase="prefill", running=path, parties=(absent,)),
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
            given = next((each for each in tensors_in((arguments, options)) if each.is_floating_point()), None)
            if given is None:
                raise
            return torch.empty_like(given)

    return run


def _runnable(measurement: Measurement) -> Workload:
    """The workload, with a short prompt where a long one would take minutes."""
    prefill = sum(cost.prefill_launches for cost in measurement.modules)
    decode = sum(cost.decode_launches for cost in measurement.modules)
    if prefill <= MOST_LAUNCHES or prefill <= 3 * decode:
        return measurement.workload
    return replace(measurement.workload, prompt_length=min(measurement.workload.prompt_length, SHORT_PROMPT))


def _is_part(unit: str, path: str) -> bool:
    return unit == path or unit.startswith(f"{path}.") or path.startswith(f"{unit}.") or not unit


def _and_around(path: str) -> Iterator[str]:
    """A path, and the modules around it, nearest first."""
    while path:
        yield path
        path = path.rpartition(".")[0]


@dataclass
class _Run:
    """A dry run as it goes on."""

    model: PreTrainedModel
    graph: ModelGraph
    plan: Plan
    devices: SimulatedDevices
    absent: dict[str, torch.Tensor]
    phase: str = ""
    phase_starts: list[tuple[str, int, int]] = field(default_factory=list)
    """Each phase with how many events and transfers there were before it."""
    calls: list[tuple[str, str, Device]] = field(default_factory=list)
    cache_bytes: dict[Device, int] = field(default_factory=dict)

    @classmethod
    def of(cls, model: PreTrainedModel, graph: ModelGraph, plan: Plan) -> _Run:
        """A run that is about to begin."""
        hold_in_buffers(model, graph)
        known = replace_tensors(model)
        held = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
        absent = {name: torch.empty(tensor.shape, dtype=tensor.dtype) for name, tensor in held.items()}
        paths = {id(module): path for path, module in model.named_modules()}
        accelerators = tuple(use.id for use in plan.devices if use.id.is_accelerator)
        names = {storage_key(tensor): name for tensors in (held, absent) for name, tensor in reversed(tensors.items())}
        devices = SimulatedDevices(accelerators, paths, (*known, *absent.values()), names, frozenset(graph.blocks))
        for tensor in absent.values():
            devices.put(tensor, NOWHERE)
        place_weights(model, plan, graph, devices)
        return cls(model, graph, plan, devices, absent)

    @contextmanager
    def dispatched(self) -> Iterator[None]:
        """The model with its hooks, on simulated devices, watched."""
        handles = [module.register_forward_hook(self._called, always_call=False) for module in self.model.modules()]
        try:
            with (
                self.devices.watching(self.model),
                dispatched(self.model, self.plan, self.graph, self.devices, self.absent),
            ):
                yield
        finally:
            for handle in handles:
                handle.remove()

    def forwards(self, workload: Workload, decoded_tokens: int) -> None:
        """A prefill, and tokens after it where the model keeps a cache."""
        forwards = Forwards(self.model, workload)
        self._begin("prefill")
        cache = forwards.run(self._given(forwards.prefill_inputs, workload.prompt_length))
        if cache_tensors(cache) and workload.context_length > workload.prompt_length:
            cache = None
            self._begin(FILLING)
            cache = forwards.run(self._given(forwards.prefill_inputs, workload.context_length))
        self._note_cache(cache)
        if not any(self.cache_bytes.values()):
            return
        for _ in range(decoded_tokens):
            self._begin("decode")
            cache = forwards.run(self._given(forwards.decode_inputs, cache))

    def towers(self) -> None:
        """Run the models within the model that text alone does not call, where not all of one is in one place."""
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
                except Exception:  # noqa: S112 - it may want other inputs, or data
                    continue
                break
        self.phase = before

    def _idle_towers(self) -> Iterator[PreTrainedModel]:
        called = {path for _, path, _ in self.calls}
        found: list[str] = []
        for path, module in self.model.named_modules():
            is_within = any(path.startswith(f"{other}.") for other in found)
            if not path or is_within or not hasattr(module, "main_input_name"):
                continue
            if any(other == path or other.startswith(f"{path}.") for other in called):
                continue
            found.append(path)
            locations = {each.location for each in self.plan.assignments if _is_part(each.unit, path)}
            if len(locations) > 1 or not all(each.is_one_device for each in locations):
                yield module

    def _note_cache(self, cache: Any) -> None:
        for tensor in cache_tensors(cache):  # of which none may be held on to: what a step makes anew, it lets go
            device = self.devices.of(tensor) or CPU
            self.cache_bytes[device] = self.cache_bytes.get(device, 0) + shown_bytes(tensor)

    def _given(self, inputs_for: Callable[[Any], dict[str, Any]], argument: Any) -> dict[str, Any]:
        """Inputs, tokens and features on the main device, where `generate` wants them."""
        with self.devices.ignoring():
            inputs = inputs_for(argument)
        for name in INPUT_NAMES:
            if name in inputs:
                self.devices.put(inputs[name], self.plan.main_device)
        return inputs

    def _begin(self, phase: str) -> None:
        self.phase = phase
        self.phase_starts.append((phase, len(self.devices.events), len(self.devices.transfers)))
        # What a call is told of is the last time that each phase ran.
        self.calls = [call for call in self.calls if call[0] != phase]

    def _called(self, module: torch.nn.Module, _arguments: Any, output: Any) -> None:
        first = next((leaf for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor)), None)
        device = None if first is None else self.devices.of(first)
        if device is None or self.phase in UNOBSERVED:
            return
        path = self.devices.names[id(module)]
        # What computes on the CPU has its result brought back before it is seen here.
        computed = next((self.plan.compute[each] for each in _and_around(path) if each in self.plan.compute), None)
        self.calls.append((self.phase, path, computed or device))

    # What was seen

    def simulation(self, *, mismatch: DeviceMismatchError | None = None) -> Simulation:
        """What was seen until now."""
        blocks = {path: device for phase, path, device in self.calls if phase == self.phase}
        along = [blocks[path] for path in dict.fromkeys(blocks) if path in self.graph.modules and self._is_block(path)]
        devices, steps = self._memory()
        return Simulation(
            outcome="runs" if mismatch is None else "mismatch",
            devices=devices,
            links=self._links(),
            steps=steps,
            calls=tuple(self.calls),
            idle=self._idle if mismatch is None else (),
            hops=sum(before != after for before, after in itertools.pairwise(along)),
            mismatch=None if mismatch is None else self._mismatch(mismatch),
        )

    @property
    def _idle(self) -> tuple[str, ...]:
        """The blocks with weights that nothing called."""
        called = {path for _, path, _ in self.calls}
        return tuple(
            path
            for path in self.graph.blocks
            if self._is_block(path) and not any(module.path in called for module in self.graph.modules[path].walk())
        )

    def _is_block(self, path: str) -> bool:
        tensors = self.graph.modules[ModulePath(path)].tensors() if path in self._blocks else ()
        return any(tensor.kind == "parameter" for tensor in tensors)

    @cached_property
    def _blocks(self) -> dict[str, None]:
        return dict.fromkeys(self.graph.blocks)

    def _mismatch(self, error: DeviceMismatchError) -> Mismatch:
        return Mismatch(
            operation=error.operation,
            phase=self.phase,
            running=error.running,
            parties=tuple(map(self._party, error.operands)),
        )

    def _party(self, operand: Operand) -> Party:
        return Party(
            device=operand.device,
            block=self._block_of(operand.made_by),
            made_by=operand.made_by,
            tensor=operand.weight,
            blocks=operand.blocks,
        )

    def _block_of(self, path: str) -> str:
        return next((each for each in _and_around(path) if each in self._blocks), "")

    def _memory(self) -> tuple[tuple[SimulatedDevice, ...], tuple[Step, ...]]:
        """Replay what came and went."""
        weights = {use.id: use.weights_bytes for use in self.plan.devices}
        live = dict.fromkeys(weights, 0)
        peaks = dict.fromkeys(weights, (0, "", ""))
        steps: dict[tuple[str, str], dict[Device, int]] = {}
        starts = {events: phase for phase, events, _ in self.phase_starts}
        phase = ""
        for place, event in enumerate(self.devices.events):
            phase = starts.get(place, phase)
            device = self.devices.at.get(event.storage, CPU)
            live[device] = live.get(device, 0) + event.size_bytes
            if phase in UNOBSERVED:
                continue
            innermost = event.running[-1] if event.running else ""
            if device in peaks and live[device] > peaks[device][0]:
                peaks[device] = (live[device], phase, innermost)
            block = next((path for path in event.running if path in self._blocks), None)
            if block is not None:
                seen = steps.setdefault((phase, block), {})
                seen[device] = max(seen.get(device, 0), live[device])
        used = tuple(
            SimulatedDevice(
                id=device,
                weights_bytes=size_bytes,
                cache_bytes=self.cache_bytes.get(device, 0),
                peak_bytes=size_bytes + peaks[device][0],
                peak_phase=peaks[device][1],
                peak_module=peaks[device][2],
            )
            for device, size_bytes in weights.items()
        )
        ran_on = {(phase, path): device for phase, path, device in self.calls}
        timeline = tuple(
            Step(phase=phase, block=block, device=ran_on[phase, block], live_bytes=tuple(sorted(seen.items())))
            for (phase, block), seen in steps.items()
            if (phase, block) in ran_on
        )
        return used, timeline

    def _links(self) -> tuple[LinkUse, ...]:
        """What went over each link in each phase, by the last time that it ran."""
        ranges: dict[str, tuple[int, int]] = {}
        for number, (phase, _, begin) in enumerate(self.phase_starts):
            following = self.phase_starts[number + 1 :]
            if phase in UNOBSERVED:
                continue
            ranges[phase] = (begin, following[0][2] if following else len(self.devices.transfers))
        found: dict[tuple[str, Device, Device], list[int]] = {}
        for phase, (begin, end) in ranges.items():
            for transfer in self.devices.transfers[begin:end]:
                use = found.setdefault((phase, transfer.source, transfer.target), [0, 0, 0])
                use[0] += 1
                use[1] += transfer.size_bytes
                use[2] += transfer.size_bytes if transfer.is_weight else 0
        return tuple(
            LinkUse(phase=phase, source=source, target=target, transfers=count, size_bytes=total, weights_bytes=weights)
            for (phase, source, target), (count, total, weights) in found.items()
        )
