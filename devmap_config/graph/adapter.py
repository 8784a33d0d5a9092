"""Reads an adapter that PEFT saved: the modules that its config adapts, and the tensors that its file must hold."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, NoReturn

import re2

from devmap_config.files import CONFIG, FileError, exists, is_folder, read_json
from devmap_config.graph.checkpoint import ADAPTER_FILE, CheckpointError, read_header
from devmap_config.graph.digest import digest
from devmap_config.graph.model import SAVED, TensorName
from devmap_config.graph.source import COMMIT, ModelNotFoundError, hub_file, is_hub_id
from devmap_config.wording import first_of

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable
    from pathlib import Path

    from devmap_config.files import Boundary
    from devmap_config.graph.checkpoint import Header
    from devmap_config.graph.model import ModelGraph

CONFIG_FILE = "adapter_config.json"

MOST_NAMES = 100_000
"""The most modules, ranks and layers that a config may name; a list of every layer, as PEFT writes it, has a few
thousand.
"""

MOST_RANK = 2**16
"""Larger than the width of any layer, beyond which a rank is useless."""

MOST_TRIES = 2_000_000
"""The most attempts to match expressions with module names; each takes a microsecond."""

MOST_BYTES_OF_EXPRESSION = 2**23

PREFIX = "base_model.model."
"""The prefix of the names in an adapter's file."""

PICKLE = "adapter_model.bin"


class AdapterError(Exception):
    """An adapter is invalid, or does not fit the model; the text says why, `help` what to do."""

    def __init__(self, message: str, help: str) -> None:
        super().__init__(message)
        self.help = help


MERGE = "merge it into the checkpoint by `merge_and_unload()` of peft, and name that as `model.source`"

Bias = Literal["none", "all", "lora_only"]

BASE_UNCHANGED = (True, False, None, "gaussian", "eva", "orthogonal")
"""The initialisations of LoRA's matrices that leave the model's own weights unchanged."""

HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
"""The modules that PEFT saves whole for the adapter's `task_type`, even if the config does not name them."""

WITHOUT_EFFECT = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "corda_config",
        "eva_config",
        "fan_in_fan_out",
        "inference_mode",
        "loftq_config",
        "lora_dropout",
        "lora_ga_config",
        "megatron_core",
        "peft_version",
        "qalora_group_size",
        "revision",
        "runtime_config",
    }
)
"""Keys without effect on a trained adapter: how it was initialised, and facts that follow from the model."""


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """The parts of a LoRA's `adapter_config.json` that decide what is added to a model.

    Attributes:
        targets: the adapted modules, as one regular expression, or as the ends of their names.
        excluded: modules that are not adapted, written like `targets`.
        ranks: the ranks by regular expression; the first that matches counts.
        alphas: the alphas by regular expression; the first that matches counts.
        saved: modules that the adapter brings as a whole.
    """

    rank: int = 8
    alpha: float = 8
    targets: str | tuple[str, ...] = ()
    excluded: str | tuple[str, ...] = ()
    ranks: tuple[tuple[str, int], ...] = ()
    alphas: tuple[tuple[str, float], ...] = ()
    layers: tuple[int, ...] = ()
    layers_pattern: tuple[str, ...] = ()
    saved: tuple[str, ...] = ()
    bias: Bias = "none"
    uses_dora: bool = False
    is_rank_stabilized: bool = False
    has_lora_bias: bool = False
    task: str | None = None

    @property
    def takes_all_linear(self) -> bool:
        """True if it adapts all linear modules except the head."""
        return isinstance(self.targets, str) and self.targets.lower() == "all-linear"

    @cached_property
    def digest(self) -> str:
        """A digest of the whole config."""
        return digest(asdict(self))


@dataclass(frozen=True)
class LoraAdapter:
    """An adapter and the place of its files: a folder, which may be the local copy of a commit on the hub."""

    config: AdapterConfig
    folder: Path
    repository: tuple[str, str] | None = None
    within: Boundary | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class LowRankUpdate:
    """A LoRA's update of one module: the product of two matrices of this rank, times `scaling`."""

    rank: int
    alpha: float
    scaling: float


# -- finding it --------------------------------------------------------------------------------------------------------


def find_adapter(source: str, path: Path, revision: str | None, within: Boundary) -> LoraAdapter:
    """Return the adapter in a folder, or in a repository of the hub at a commit.

    Args:
        source: what the profile names.
        path: the folder that `source` would name.
        revision: the commit, if it is a repository.
        within: the folder that it and its links may not lead out of.

    Raises:
        AdapterError: if there is none, or it is invalid or not a LoRA.
    """
    if exists(path):
        if not within.holds(path):
            raise AdapterError(f"`{source}` lies outside of the repository", "keep it there, or pass `--allow-outside`")
        if not is_folder(path):
            raise AdapterError(f"`{source}` is not a folder", f"name the folder that its `{CONFIG_FILE}` is in")
        return LoraAdapter(_read(path / CONFIG_FILE, within), path, None, within)
    if source.startswith(("./", "../", "/")) or not is_hub_id(source):
        raise AdapterError(f"there is no `{source}`", "paths are relative to the file that writes them")
    if revision is None or not COMMIT.fullmatch(revision):
        help = "say which: `adapter: {source: …, revision: …}` with the 40 digits of a commit"
        raise AdapterError(f"`{source}` is an adapter of the hub, and its commit is not named", help)
    try:
        config_path = hub_file(source, CONFIG_FILE, revision)
    except ModelNotFoundError as error:
        raise AdapterError(str(error), error.help or "name an adapter's folder, or the hub id of one") from error
    return LoraAdapter(_read(config_path, None), config_path.parent, (source, revision))


def _read(path: Path, within: Boundary | None) -> AdapterConfig:
    try:
        value = read_json(path, CONFIG, within)
    except FileError as error:
        what = "is not there: it is not an adapter of PEFT" if error.is_absent else str(error)
        raise AdapterError(f"`{path.name}` in `{path.parent.name}` {what}", error.help) from error
    return parse_config(value)


def parse_config(value: object) -> AdapterConfig:
    """Return the config for the parsed JSON of an `adapter_config.json`.

    Raises:
        AdapterError: if a value has a wrong type, or a meaning that is not supported; the text says which.
    """
    if not isinstance(value, Mapping):
        raise AdapterError(f"`{CONFIG_FILE}` holds no JSON object", "name an adapter that PEFT saved")
    if value.get("peft_type") != "LORA":
        kind = value.get("peft_type")
        found = f"`{kind[:40]}`" if isinstance(kind, str) else "of no kind that it names"
        raise AdapterError(f"the adapter is {found}, and only LoRA is supported (`peft_type`)", MERGE)
    read = _Reader(value)
    targets, layers = read.names_or_expression("target_modules"), read.integers("layers_to_transform")
    if not targets:
        read.refuse("target_modules", "names no modules", "PEFT writes them there when it saves an adapter")
    if isinstance(targets, str) and (layers or value.get("layers_pattern")):
        read.refuse("layers_to_transform", "has no effect beside an expression as `target_modules`", "remove it")
    bias = value.get("bias", "none")
    if bias not in ("none", "all", "lora_only"):
        read.refuse("bias", "is none of `none`, `all` and `lora_only`", "mend it")
    task = value.get("task_type")
    config = AdapterConfig(
        rank=read.rank("r", 8),
        alpha=read.number("lora_alpha", 8),
        targets=targets,
        excluded=read.names_or_expression("exclude_modules"),
        ranks=read.by_expression("rank_pattern", read.as_rank),
        alphas=read.by_expression("alpha_pattern", read.as_number),
        layers=layers,
        layers_pattern=_as_names(read.names_or_expression("layers_pattern")),
        saved=_as_names(read.names_or_expression("modules_to_save")),
        bias=bias,
        uses_dora=read.flag("use_dora"),
        is_rank_stabilized=read.flag("use_rslora"),
        has_lora_bias=read.flag("lora_bias"),
        task=task if isinstance(task, str) else None,
    )
    begun = value.get("init_lora_weights")
    if not isinstance(begun, (str, bool, type(None))) or begun not in BASE_UNCHANGED:
        help = f"convert it to plain LoRA when saving it (`path_initial_model_for_weight_conversion`), or {MERGE}"
        read.refuse("init_lora_weights", "changes the model's own weights while it is loaded", help)
    read.refuse_others()
    return config


def _as_names(value: str | tuple[str, ...]) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else value


MEND = "correct it, or save the adapter again"


@dataclass
class _Reader:
    """Reads the values of a config, and notes which keys were read."""

    values: Mapping[str, Any]
    known: set[str] = field(default_factory=lambda: {"peft_type", "task_type", "bias", "init_lora_weights"})

    def get(self, key: str) -> Any:
        self.known.add(key)
        return self.values.get(key)

    def refuse(self, route: str, what: str, help: str = MEND) -> NoReturn:
        raise AdapterError(f"`{route}` in `{CONFIG_FILE}` {what}", help)

    def flag(self, key: str) -> bool:
        value = self.get(key)
        if not isinstance(value, (bool, type(None))):
            self.refuse(key, "is neither true nor false")
        return bool(value)

    def rank(self, key: str, default: int) -> int:
        value = self.get(key)
        return default if value is None else self.as_rank(key, value)

    def as_rank(self, route: str, value: Any) -> int:
        if type(value) is not int or not 0 < value <= MOST_RANK:
            self.refuse(route, f"is not a number from 1 to {MOST_RANK:,}")
        return value

    def number(self, key: str, default: float) -> float:
        value = self.get(key)
        return default if value is None else self.as_number(key, value)

    def as_number(self, route: str, value: Any) -> float:
        if type(value) not in (int, float) or not abs(value) <= 2**31:
            self.refuse(route, "is not a number")
        return float(value)

    def integers(self, key: str) -> tuple[int, ...]:
        value = self.get(key)
        values = [] if value is None else value if isinstance(value, list) else [value]
        self._bound(key, values)
        for index, item in enumerate(values):
            if type(item) is not int or item < 0:
                self.refuse(f"{key}[{index}]" if isinstance(value, list) else key, "is not a number of a layer")
        return tuple(values)

    def names_or_expression(self, key: str) -> str | tuple[str, ...]:
        value = self.get(key)
        if value is None or isinstance(value, str):
            return value or ()
        if not isinstance(value, list):
            self.refuse(key, "is neither text nor a list")
        self._bound(key, value)
        for index, item in enumerate(value):
            if not isinstance(item, str) or not item:
                self.refuse(f"{key}[{index}]", "is not the name of a module")
        return tuple(sorted(set(value)))

    def by_expression(self, key: str, read: Callable[[str, Any], Any]) -> tuple[tuple[str, Any], ...]:
        value = self.get(key)
        if value is None:
            return ()
        if not isinstance(value, dict):
            self.refuse(key, "is not a mapping")
        self._bound(key, value)
        return tuple((pattern, read(f"{key}.{pattern[:80]}", item)) for pattern, item in value.items())

    def _bound(self, key: str, values: Collection[Any]) -> None:
        if len(values) > MOST_NAMES:
            self.refuse(key, f"has more than {MOST_NAMES:,} entries", "name fewer, by an expression")

    def refuse_others(self) -> None:
        for key, value in self.values.items():
            if key not in self.known and key not in WITHOUT_EFFECT and value:
                self.refuse(key[:80], "is not supported, and may change the model", MERGE)


# -- what it adapts ----------------------------------------------------------------------------------------------------


def changes_of(config: AdapterConfig, paths: Collection[str], linear: Collection[str]) -> dict[str, LowRankUpdate]:
    """Return LoRA's update of each module that it changes, by path, chosen as PEFT does.

    Args:
        config: the adapter's.
        paths: the paths of all modules.
        linear: the paths of the modules that `all-linear` means.

    Raises:
        AdapterError: if an expression cannot be read, or no module is adapted.
    """
    matching = _Matching(config, frozenset(linear))
    changes = {path: matching.change(path) for path in paths if path and matching.is_adapted(path)}
    if not changes:
        raise AdapterError(
            "no module of this model is adapted (`target_modules`)", "name the model that it was trained on"
        )
    return changes


def saved_modules(config: AdapterConfig, paths: Iterable[str]) -> tuple[str, ...]:
    """Return the modules that the adapter replaces as a whole."""
    names = (*config.saved, *HEADS.get(config.task or "", ()))
    return tuple(path for path in paths if path and path.endswith(names)) if names else ()


class _Matching:
    """The modules that a config selects; expressions are matched in time linear in their length."""

    def __init__(self, config: AdapterConfig, linear: frozenset[str]) -> None:
        self.config = config
        self.linear = linear
        self.tries = 0
        self.targets = self._ends_or_expression("target_modules", config.targets)
        self.excluded = self._ends_or_expression("exclude_modules", config.excluded)
        self.ranks = [(self._keyed("rank_pattern", key), rank) for key, rank in config.ranks]
        self.alphas = [(self._keyed("alpha_pattern", key), alpha) for key, alpha in config.alphas]
        patterns = [rf"(?:.*?\.)?{pattern}" for pattern in config.layers_pattern] or [r".*?\.[^.]*"]
        self.layers = [self._compiled("layers_pattern", rf"{pattern}\.(\d+)\.") for pattern in patterns]
        saved = (*config.saved, *HEADS.get(config.task or "", ()))
        self.saved = [re2.escape(name) for name in saved]
        self.within_saved = self._compiled("modules_to_save", rf"(?:.*\.)?(?:{'|'.join(self.saved)})(?:\..*)?")

    def _ends_or_expression(self, key: str, value: str | tuple[str, ...]) -> Any:
        is_expression = isinstance(value, str) and not (key == "target_modules" and self.config.takes_all_linear)
        return self._compiled(key, value) if is_expression else frozenset(value)

    def _keyed(self, key: str, pattern: str) -> Any:
        return self._compiled(f"{key}.{pattern[:80]}", rf"(?:.*\.)?(?:{pattern})")

    def _compiled(self, route: str, expression: Any) -> Any:
        options = re2.Options()
        options.log_errors = False
        options.max_mem = MOST_BYTES_OF_EXPRESSION
        try:
            return re2.compile(expression, options)
        except re2.error as error:
            reason = error.args[0] if error.args else ""
            reason = reason.decode(errors="replace") if isinstance(reason, bytes) else str(reason)
            raise AdapterError(
                f"`{route}` in `{CONFIG_FILE}` cannot be read: {reason[:120]}",
                "expressions are RE2's, without lookaround and back-references: name the modules in a list instead",
            ) from None

    def _tried(self, expression: Any, path: str) -> Any:
        self.tries += 1
        if self.tries > MOST_TRIES:
            help = "name fewer modules and ranks, by one expression for those that are alike"
            raise AdapterError(f"`{CONFIG_FILE}` has more expressions than can be tried on this model", help)
        return expression.fullmatch(path)

    def _named(self, means: Any, path: str) -> bool:
        if not isinstance(means, frozenset):
            return self._tried(means, path) is not None
        segments = path.split(".")
        return any(".".join(segments[start:]) in means for start in range(len(segments))) if means else False

    def is_adapted(self, path: str) -> bool:
        if self._named(self.excluded, path) or (self.saved and self._tried(self.within_saved, path)):
            return False
        if self.config.takes_all_linear:
            return path in self.linear
        return self._named(self.targets, path) and self._is_in_layers(path)

    def _is_in_layers(self, path: str) -> bool:
        if not self.config.layers:
            return True
        for expression in self.layers:
            self.tries += 1
            if (match := expression.match(path)) is not None:
                return int(match.group(1)) in self.config.layers
        return False

    def change(self, path: str) -> LowRankUpdate:
        config = self.config
        rank = next((rank for pattern, rank in self.ranks if self._tried(pattern, path)), config.rank)
        alpha = next((alpha for pattern, alpha in self.alphas if self._tried(pattern, path)), config.alpha)
        return LowRankUpdate(rank, alpha, alpha / (math.sqrt(rank) if config.is_rank_stabilized else rank))


# -- what its file holds -----------------------------------------------------------------------------------------------

IN_FILE = {"lora_A": ".lora_A.weight", "lora_B": ".lora_B.weight", "lora_B_bias": ".lora_B.bias"}
"""The names in an adapter's file for those in a graph; other names are the same, and whole modules have the
module's.
"""


def name_in_file(name: TensorName) -> str:
    """Return the name in an adapter's file of a tensor that it adds to a model."""
    module, _, own = name.rpartition(".")
    return f"{PREFIX}{module}{IN_FILE.get(own, f'.{own.removeprefix(SAVED)}')}"


def stored_names(adapter: LoraAdapter, graph: ModelGraph, *, must_be_there: bool) -> dict[str, str]:
    """Return the name in the file for each tensor of the adapter, by its name in the graph.

    These are the tensors that it adds to the model, and the biases of the model that it replaces.

    Args:
        adapter: the adapter.
        graph: the graph of the model, including the adapter's tensors.
        must_be_there: whether the file must exist; otherwise the result is empty without one.

    Raises:
        AdapterError: if the file lacks tensors that the config implies.
    """
    header = _header(adapter, must_be_there=must_be_there)
    if header is None:
        return {}
    left = dict(header)
    names: dict[str, str] = {}
    for name in graph.adapter_tensors:
        wanted, shape = name_in_file(name), graph.tensors[name].shape
        stored = wanted if wanted in left else f"{wanted}.weight"
        if stored not in left:
            raise _misfit(f"lacks `{wanted}`")
        if (stored_shape := left.pop(stored)[1]) != shape:
            raise _misfit(f"has `{stored}` as {list(stored_shape)}, and the model takes {list(shape)}")
        names[str(name)] = stored
    for stored in [name for name in left if adapter.config.bias != "none" and name.endswith(".bias")]:
        replaced = TensorName(stored.removeprefix(PREFIX).replace(".base_layer.", "."))
        if replaced in graph.tensors and left[stored][1] == graph.tensors[replaced].shape:
            names[str(replaced)] = stored
            del left[stored]
    if left:
        found_names = first_of([f"`{name}`" for name in left])
        raise _misfit(f"holds tensors that are not in the adapted model: {found_names}")
    return names


def _misfit(what: str) -> AdapterError:
    return AdapterError(f"`{ADAPTER_FILE}` {what}", "name the model that the adapter was trained on, as it was then")


def _header(adapter: LoraAdapter, *, must_be_there: bool) -> Header | None:
    path = adapter.folder / ADAPTER_FILE
    try:
        if not exists(path):
            if exists(adapter.folder / PICKLE):
                help = "save it anew with `save_pretrained`, if you trust it"
                raise AdapterError(f"`{PICKLE}` is a pickle: loading it may run any code", help)
            if must_be_there:
                raise AdapterError(f"there is no `{ADAPTER_FILE}` in `{adapter.folder.name}`", "put it there")
            return None
        return read_header(path, adapter.within)
    except CheckpointError as error:
        raise AdapterError(str(error), error.help) from error
