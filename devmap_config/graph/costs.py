"""The costs of running a model under one workload, module by module, as plain data without torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from operator import attrgetter
from typing import TYPE_CHECKING, Any, Literal

from devmap_config.graph.failures import Cause  # noqa: TC001  pydantic reads the annotations

if TYPE_CHECKING:
    from collections.abc import Mapping

MEDIA = ("images", "image_height", "image_width", "audio_seconds", "tiles")
"""The fields of a workload that describe the images and sound in a prompt."""

PARTLY = "partly_offloaded"
"""The kind of cache for which the plan chooses the blocks whose part is on the CPU while they do not run."""

OFFLOADED = ("offloaded", PARTLY, "offloaded_static")
"""The kinds of caches of which all or some layers are on the CPU while they do not run."""

RARE = (*MEDIA, "proposed_tokens", "cache_backend", "cache_bits")
"""The fields that are left out of plain data if they have their defaults."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkloadShape:
    """The amounts of a workload, per sequence.

    Attributes:
        batch_size: sequences at once.
        context_length: tokens in the cache when it is full.
        prompt_length: tokens that are prefilled at once.
        all_logits: compute logits for every position; `generate` computes them for the last of each sequence only.
        cache: transformers' cache implementation.
        images: images in the prompt.
        image_height: their height in pixels; `None` if the model takes one size only.
        image_width: their width in pixels.
        audio_seconds: seconds of sound in the prompt.
        proposed_tokens: tokens that a draft model proposes at once; logits are made for each.
        cache_backend: the library of a quantised cache.
        cache_bits: the bits of its elements.
        tiles: the number of tiles that each image is cut into; 0 for a model whose processor cuts none.
    """

    batch_size: int
    context_length: int
    prompt_length: int
    all_logits: bool = False
    cache: str = "dynamic"
    images: int = 0
    image_height: int | None = None
    image_width: int | None = None
    audio_seconds: int = 0
    proposed_tokens: int = 0
    cache_backend: str | None = None
    cache_bits: int | None = None
    tiles: int = 0

    def __post_init__(self) -> None:
        """Refuse a workload without tokens, which only a damaged file has, as costs are divided by the length of the
        context.
        """
        if min(self.batch_size, self.context_length, self.prompt_length) < 1:
            raise ValueError("a workload has one token of one sequence at least")

    @property
    def holds_text_alone(self) -> bool:
        """True if the prompt has neither images nor sound."""
        return not self.images and not self.audio_seconds

    @property
    def text_alone(self) -> WorkloadShape:
        """The same workload with text in place of images and sound."""
        return replace(self, images=0, image_height=None, image_width=None, audio_seconds=0)

    def at(self, context_length: int) -> WorkloadShape:
        """Return the same workload with another length of context; a prompt that fills the context grows with it."""
        fills = self.prompt_length == self.context_length
        prompt_length = context_length if fills else min(self.prompt_length, context_length)
        return replace(self, context_length=context_length, prompt_length=prompt_length)

    def to_json(self) -> dict[str, Any]:
        """Return the workload as plain data; fields that few workloads have are left out unless they are set."""
        return {name: value for name, value in asdict(self).items() if name not in RARE or value}

    def decoding_before(self, end: int | None, tokens: int = 1) -> WorkloadShape:
        """Return the same workload with a context that leaves room for `tokens` before positions end."""
        if end is None or self.context_length <= end - tokens:
            return self
        length = max(end - tokens, 1)
        return replace(self, context_length=length, prompt_length=min(self.prompt_length, length))


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleCost:
    """The costs of one module for the whole batch. Work excludes that of its children.

    A dispatch is an operation that the host requests: a kernel, or a view of a tensor. The work of decoding is the mean
    from the end of the prompt to the end of the context. Input and output bytes exclude caches.

    Attributes:
        cache_bytes: the bytes of the cache's tensors that the module made, after a prefill of the context.
        cache_bytes_per_token: the growth of the cache with a further token.
        retained_bytes: bytes that the storages of those tensors keep alive beyond their elements, as a sliding window
            is a view of everything that was prefilled.
        offloaded_bytes: the part of `cache_bytes` that is on the CPU while the module does not run, if its cache is
            offloaded.
        offloaded_largest_bytes: the largest tensor of that part.
        prefill_peak_bytes: the largest sum of live activations while the module runs, those of its callers included,
            without the cache.
        decode_peak_bytes: the same for a step of decoding.
        own_peak_bytes: the same while none of its children runs.
        doubled_peak_bytes: the peak of a prefill of twice the length; other figures named `doubled` likewise.
        prefill_attention_operations: the operations that a fused attention computes in half precision.
    """

    path: str
    cache_bytes: int = 0
    cache_bytes_per_token: int = 0
    retained_bytes: int = 0
    prefill_peak_bytes: int = 0
    decode_peak_bytes: int = 0
    own_peak_bytes: int = 0
    doubled_cache_bytes: int = 0
    doubled_peak_bytes: int = 0
    doubled_own_peak_bytes: int = 0
    prefill_operations: int = 0
    decode_operations: int = 0
    prefill_touched_bytes: int = 0
    decode_touched_bytes: int = 0
    prefill_launches: int = 0
    decode_launches: int = 0
    prefill_dispatches: int = 0
    decode_dispatches: int = 0
    prefill_attention_operations: int = 0
    decode_attention_operations: int = 0
    prefill_input_bytes: int = 0
    decode_input_bytes: int = 0
    prefill_output_bytes: int = 0
    decode_output_bytes: int = 0
    offloaded_bytes: int = 0
    offloaded_largest_bytes: int = 0

    @property
    def peak_bytes(self) -> int:
        """The larger of the peaks of prefill and decoding."""
        return max(self.prefill_peak_bytes, self.decode_peak_bytes)

    @property
    def kept_bytes(self) -> int:
        """The bytes of the cache that stay on the module's device while the module does not run."""
        return self.cache_bytes - self.offloaded_bytes + (0 if self.offloaded_bytes else self.retained_bytes)

    def exchanged_bytes(self, phase: str, workload: WorkloadShape) -> int:
        """Return the bytes of the cache that are copied to the CPU in a forward; for decoding, the mean over the
        context.

        In decoding, as many bytes are copied back.
        """
        if not self.offloaded_bytes or workload.cache == "offloaded_static":
            return self.offloaded_bytes
        prefilled_bytes = self.at(workload, workload.prompt_length).offloaded_bytes
        return prefilled_bytes if phase == "prefill" else (prefilled_bytes + self.offloaded_bytes) // 2

    def visiting_bytes(self, workload: WorkloadShape) -> int:
        """Return the bytes of an offloaded cache that are on a card at once: a layer's old and new cache, and the next
        layer's.
        """
        if not self.offloaded_bytes:
            return 0
        return (2 if workload.cache == "offloaded_static" else 3) * self.offloaded_bytes + self.retained_bytes

    def pinned_bytes(self, workload: WorkloadShape) -> int:
        """Return the CPU's memory that the module's offloaded cache takes.

        torch pins it in blocks of a power of two, and does not free blocks that the cache has outgrown.
        """
        grows = workload.cache != "offloaded_static" and workload.prompt_length < workload.context_length
        total_bytes = 0
        for size_bytes in (self.offloaded_largest_bytes, self.offloaded_bytes - self.offloaded_largest_bytes):
            block_bytes = _power_of_two(size_bytes)
            prompt_bytes = size_bytes * workload.prompt_length // workload.context_length
            outgrown_bytes = block_bytes - _power_of_two(prompt_bytes) if grows else 0
            total_bytes += block_bytes + outgrown_bytes
        return total_bytes

    def at(self, workload: WorkloadShape, context_length: int) -> ModuleCost:
        """Return the costs with memory for another length of context than that of the measured workload.

        Caches are extrapolated from the prefill and one of twice the length. So are the peaks, if the prompt fills the
        context: linearly, or quadratically if they more than double.
        """
        before = workload.context_length
        figures = _grown_peaks(self, before, context_length) if workload.prompt_length == before else {}
        figures["cache_bytes"] = _grown_cache(self, before, context_length)
        figures["retained_bytes"] = _grown_retained(self, before, context_length)
        figures["decode_peak_bytes"] = self.decode_peak_bytes * max(context_length, before) // before
        for figure in RARE_FIGURES if self.offloaded_bytes else ():
            figures[figure] = figures["cache_bytes"] * getattr(self, figure) // self.cache_bytes
        return replace(self, **figures)  # type: ignore[arg-type]  # all of these are integers


@dataclass(frozen=True, slots=True, kw_only=True)
class Crossing:
    """The tensors and bytes that one block takes from another, which are copied if the two run on different devices.

    Attributes:
        maker: the block that made them, or `""` for tensors made outside of blocks (masks, positions), which are on the
            main device.
    """

    reader: str
    maker: str
    prefill_tensors: int
    prefill_bytes: int
    decode_tensors: int
    decode_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Positions:
    """The lengths of context that a model takes, in tokens; `None` without a limit.

    Attributes:
        end: the length at which a table of positions ends, or the model's code refuses more tokens.
        trained: the length that the model was trained for, its config's `max_position_embeddings`.
    """

    end: int | None = None
    trained: int | None = None

    @property
    def most(self) -> int | None:
        """The longest context that a prediction may state."""
        return min((length for length in (self.end, self.trained) if length is not None), default=None)


RARE_FIGURES = ("offloaded_bytes", "offloaded_largest_bytes")
"""The figures of a module that are zero in most measurements."""

WORK = ("touched_bytes", "operations", "attention_operations", "launches", "dispatches")
"""The figures of a module's work in a phase; prefixed with the phase's name, they are fields of a cost."""

COST_FIELDS = tuple(field.name for field in fields(ModuleCost))
CROSSING_FIELDS = tuple(field.name for field in fields(Crossing))

# `dataclasses.asdict` would copy every value, and a model has thousands of these.
_crossing_values = attrgetter(*CROSSING_FIELDS)


LEAST_WORDS = 4
"""The least number of text tokens in a prompt with images."""


@dataclass(frozen=True, slots=True)
class MediaUse:
    """The result of measuring with the images and the sound of a workload.

    Attributes:
        tokens: the tokens of each sequence's prompt that stand for them.
        problem: why they were not measured: the model takes none (`none`), it takes images of any size and the profile
            gives no size (`size`), the prompt has no room for the tokens (`room`), or the model's code failed
            (`untried`).
        reason: the problem in words.
    """

    tokens: int = 0
    problem: Literal["none", "size", "room", "untried"] | None = None
    reason: str | None = None


@dataclass(frozen=True)
class Measurement:
    """A model's costs under a workload, in the order in which its modules first run.

    `crossings` are the tensors that pass between blocks. `bonds` are pairs of blocks that must run on one device,
    because one reads tensors of the other that it was not given (a shared cache), or because the model joins their
    results. `positions` are the lengths of context that the model takes, whatever memory there is. `measured` is false
    if the model could not be run without data, so that formulas are used; `reason` and `cause` say why.
    `has_unfit_cache` is true if that is because transformers does not support the workload's cache for this model.
    `media` is the result for images and sound, if the workload has any.
    """

    workload: WorkloadShape
    modules: tuple[ModuleCost, ...]
    crossings: tuple[Crossing, ...] = ()
    bonds: tuple[tuple[str, str], ...] = ()
    measured: bool = True
    reason: str | None = None
    cause: Cause = "model"
    positions: Positions = Positions()
    media: MediaUse | None = None
    has_unfit_cache: bool = False

    @cached_property
    def by_path(self) -> Mapping[str, ModuleCost]:
        """Costs by module path."""
        return {cost.path: cost for cost in self.modules}

    @cached_property
    def cache_bytes(self) -> int:
        """Bytes of the whole cache after a prefill of the context."""
        return sum(cost.cache_bytes for cost in self.modules)

    @cached_property
    def visiting_bytes(self) -> int:
        """The most bytes of an offloaded cache that are on a card at once."""
        return max((cost.visiting_bytes(self.workload) for cost in self.modules), default=0)

    @cached_property
    def passing_bytes(self) -> int:
        """The CPU's memory for layers of an offloaded cache that are being copied."""
        return LAYERS_UNDER_WAY * max((cost.pinned_bytes(self.workload) for cost in self.modules), default=0)

    @cached_property
    def decodes(self) -> bool:
        """True if there are steps of decoding; encoders and models without a cache have none."""
        return not self.measured or any(cost.decode_launches for cost in self.modules)

    def with_cache(self, cache: str) -> Measurement:
        """Return the costs with a dynamic or an offloaded cache, of those with a cache that may be offloaded."""
        modules = self.modules
        if cache == "dynamic":
            modules = tuple(replace(cost, offloaded_bytes=0, offloaded_largest_bytes=0) for cost in modules)
        return replace(self, workload=replace(self.workload, cache=cache), modules=modules)

    def at(self, context_length: int) -> Measurement:
        """Return the costs for another length of context."""
        return replace(
            self,
            workload=self.workload.at(context_length),
            modules=tuple(cost.at(self.workload, context_length) for cost in self.modules),
        )

    def to_json(self) -> dict[str, Any]:
        """Return the measurement as plain data, from which `from_json` makes an equal one."""
        rare: dict[str, Any] = {} if self.cause == "model" else {"cause": self.cause}
        rare |= {} if self.media is None else {"media": asdict(self.media)}
        rare |= {"has_unfit_cache": True} if self.has_unfit_cache else {}
        is_rare = any(cost.offloaded_bytes for cost in self.modules)
        columns = [name for name in COST_FIELDS if is_rare or name not in RARE_FIGURES]
        values = attrgetter(*columns)
        return rare | {
            "workload": self.workload.to_json(),
            "measured": self.measured,
            "reason": self.reason,
            "columns": columns,
            "modules": [list(values(cost)) for cost in self.modules],
            "crossings": [list(_crossing_values(crossing)) for crossing in self.crossings],
            "bonds": [list(bond) for bond in self.bonds],
            "positions": asdict(self.positions),
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Measurement:
        """Return the measurement that `to_json` wrote.

        Raises:
            KeyError, TypeError: if the value is not one.
        """
        return cls(
            workload=WorkloadShape(**value["workload"]),
            modules=tuple(ModuleCost(**dict(zip(value["columns"], row, strict=True))) for row in value["modules"]),
            crossings=tuple(Crossing(**dict(zip(CROSSING_FIELDS, row, strict=True))) for row in value["crossings"]),
            bonds=tuple((reader, maker) for reader, maker in value["bonds"]),
            measured=value["measured"],
            reason=value["reason"],
            cause=value.get("cause", "model"),
            positions=Positions(**value["positions"]),
            media=None if (media := value.get("media")) is None else MediaUse(**media),
            has_unfit_cache=bool(value.get("has_unfit_cache")),
        )


LAYERS_UNDER_WAY = 2
"""The layers of an offloaded cache that need a second copy on the CPU, as the host goes on while copies are made."""


def _power_of_two(size_bytes: int) -> int:
    """Return the least power of two that is not less than a number; 0 for 0."""
    return 1 << (size_bytes - 1).bit_length() if size_bytes else 0


def _grown_cache(cost: ModuleCost, before: int, after: int) -> int:
    return max(cost.cache_bytes + (cost.doubled_cache_bytes - cost.cache_bytes) * (after - before) // before, 0)


def _grown_retained(cost: ModuleCost, before: int, after: int) -> int:
    """Return the bytes that a grown cache retains: the storage of a window holds everything prefilled, not only the
    window.
    """
    if not cost.retained_bytes or after <= before:
        return cost.retained_bytes
    held_bytes = cost.cache_bytes + cost.retained_bytes
    return max(held_bytes * after // before - _grown_cache(cost, before, after), cost.retained_bytes)


def _grown_peaks(cost: ModuleCost, before: int, after: int) -> dict[str, int]:
    least = cost.decode_peak_bytes
    return {
        "prefill_peak_bytes": _grown_peak(cost.prefill_peak_bytes, cost.doubled_peak_bytes, least, before, after),
        "own_peak_bytes": _grown_peak(cost.own_peak_bytes, cost.doubled_own_peak_bytes, least, before, after),
    }


def _grown_peak(peak_bytes: int, doubled_bytes: int, least_bytes: int, before: int, after: int) -> int:
    if after < before:
        start_bytes = min(max(least_bytes, 2 * peak_bytes - doubled_bytes), peak_bytes)
        return start_bytes - (start_bytes - peak_bytes) * after // before
    if doubled_bytes < 2 * peak_bytes:
        return peak_bytes + max(doubled_bytes - peak_bytes, 0) * (after - before) // before
    curvature = doubled_bytes - 2 * peak_bytes
    return peak_bytes * after // before + curvature * after * (after - before) // (2 * before * before)
