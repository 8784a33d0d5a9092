"""The ways in: of each, how its inputs are made, where they lie in the workspace, and which commands read them."""

from __future__ import annotations

import json
import struct
import zlib
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from devmap_config.graph.digest import digest
from fuzz import grammars
from fuzz.mutation import Pool, mutated_bytes, mutated_value
from fuzz.workspace import ADAPTERS, CHAT, CONFIGS, MACHINE, TOKENIZER_CONFIG, TOKENIZERS, parsed, profiles

if TYPE_CHECKING:
    from collections.abc import Callable
    from random import Random

FORMATS = ["table", "json", "sarif", "github", "device-map"]
COMPILE = ["compile", "profile.yaml", "--dry-run"]
ON_PROFILES = [
    *([*COMPILE, "--no-simulate", "--format", name] for name in FORMATS * 6),
    COMPILE,
    ["check", "profile.yaml", "--format", "github"],
    ["explain", "profile.yaml"],
    ["diff", "good.yaml", "profile.yaml"],
    ["fit", "profile.yaml", "--on", "2x24GiB"],
]
"""What reads a profile; the formats take turns, and what takes as long as ten of them is had more rarely."""

SAY = ["run", "--no-probe", "--prompt", "the  a", "--max-new-tokens", "2"]
"""A card is not there, which is told after a tokenizer has read the prompt; on the CPU it writes the answer."""


@dataclass(frozen=True)
class Surface:
    """One way in.

    Attributes:
        make: returns an input; what it starts from, `Sources` have.
        file: where an input lies; `None` where it is not a file. Of a folder it is a mapping of names to texts.
        commands: one of these reads it, which is decided by the input alone; in place of `INPUT` stands its text.
        reaches: whether it is counted how many inputs reach placement.
    """

    make: Callable[[Random, Sources], bytes]
    commands: list[list[str]]
    file: str | None = None
    reaches: bool = False

    def write(self, data: bytes) -> None:
        """Put an input where it is read."""
        if self.file is None:
            return
        if Path(self.file).is_dir():
            for name, text in json.loads(data).items():
                Path(self.file, name).write_text(text, encoding="utf-8", errors="surrogatepass")
        else:
            Path(self.file).write_bytes(data)

    def command(self, data: bytes) -> list[str]:
        """Return the command line that reads an input."""
        if not self.commands:
            return [_argument(word.encode("utf-8", "surrogatepass")) for word in json.loads(data)]
        words = self.commands[zlib.crc32(data) % len(self.commands)]
        return [_argument(data) if word == INPUT else word for word in words]


def _argument(data: bytes) -> str:
    """Return bytes as Python has them of a command line, where no NUL can be."""
    return data.replace(b"\0", b"").decode("utf-8", "surrogateescape")


INPUT = "INPUT"


@dataclass(frozen=True)
class Sources:
    """What inputs are made from: the workspace, and the tests' cases."""

    folder: Path

    @cached_property
    def profiles(self) -> list[bytes]:
        """Texts of profiles that compile."""
        return profiles()

    @cached_property
    def values(self) -> list[Any]:
        """The same, parsed."""
        return parsed(self.profiles)

    @cached_property
    def pools(self) -> dict[str, Pool]:
        """Keys and values by what they are of."""
        files = ("locked.lock.json", "vendored.graph.json", "map.json")
        return {
            "profiles": Pool(self.values),
            "configs": Pool([*CONFIGS, CONFIG_KEYS]),
            "adapters": Pool([*ADAPTERS, *CONFIGS]),
            "machine": Pool(parsed([MACHINE.encode(), *self.profiles])),
            **{name: Pool([self.json(name)]) for name in files},
            "header": Pool([self.header]),
            "tokenizers": Pool([*TOKENIZERS, TOKENIZER_CONFIG]),
        }

    def text(self, name: str) -> bytes:
        """Return the content of a file of the workspace."""
        return (self.folder / name).read_bytes()

    def json(self, name: str) -> Any:
        """Return the value of one."""
        return json.loads(self.text(name))

    @cached_property
    def header(self) -> Any:
        """The header of the checkpoint."""
        data = self.text("weights/model.safetensors")
        return json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])


CONFIG_KEYS = dict.fromkeys(
    ["torch_dtype", "quantization_config", "text_config", "vision_config", "transformers_weights", "is_encoder_decoder",
     "num_labels", "rope_scaling", "head_dim", "tie_word_embeddings", "layer_types", "attn_implementation", "use_cache",
     "transformers_version", "sliding_window", "pruned_heads", "_name_or_path", "base_model_tp_plan",
     "initializer_range"],
)  # fmt: skip
"""What a config may hold besides."""


def _yaml(random: Random, sources: Sources) -> bytes:
    return mutated_bytes(random, random.choice(sources.profiles), sources.profiles)


def _values(random: Random, sources: Sources) -> bytes:
    return _dumped(random, mutated_value(random, random.choice(sources.values), sources.pools["profiles"]))


def _dumped(random: Random, value: Any) -> bytes:
    text = yaml.safe_dump(
        value, allow_unicode=True, default_flow_style=random.choice((True, False, None)), sort_keys=False
    )
    return text.encode("utf-8", "surrogatepass")


def _templates(random: Random, sources: Sources) -> bytes:
    """Return a profile with templates in the place of a value, of a part of one, or of a key."""
    value = random.choice(sources.values)
    variables = {"x": grammars.template(random), "last": 2, "size": "1GiB", "count": 3, "text": "abc" * 9}
    value = {**value, "variables": {**value.get("variables", {}), **variables}}
    text = grammars.template(random)
    for section, changed in random.sample(
        [
            ("name", text),
            ("workload", {"context_length": text}),
            ("placement", {"max_memory": {f"cuda:[0-{text}]": f"{text}MiB"}}),
            ("placement", {"pins": [{"match": f"model.layers.{text}", "device": "cpu", "optional": True}]}),
            ("hardware", {"devices": {"cuda:[0-1]": {"memory": f"{text}GiB"}, "cpu": {"memory": "1GiB"}}}),
        ],
        k=random.choice((1, 1, 2)),
    ):
        value[section] = changed
    return _dumped(random, value)


def _sealed(random: Random, value: Any) -> bytes:
    """Return the text of what holds a digest of itself, as a rule the right one."""
    value = json.loads(_json(value))  # where all keys are text
    if isinstance(value, dict) and random.random() < 0.95:
        left_out = ("digest", "made_with") if "lock_version" in value else ("digest",)
        with suppress(UnicodeEncodeError):  # half a character, of which there is no digest
            value = {**value, "digest": digest({key: part for key, part in value.items() if key not in left_out})}
    return _json(value)


def _json(value: Any) -> bytes:
    return json.dumps(value, default=str).encode()


def _locks(random: Random, sources: Sources) -> bytes:
    if random.random() < 0.1:
        return mutated_bytes(random, sources.text("locked.lock.json"), sources.profiles)
    lock, pool = sources.json("locked.lock.json"), sources.pools["locked.lock.json"]
    if random.random() < 0.6:  # what is held to the model; a change of inputs ends before that
        part = random.choice(("plan", "plan", "plan", "hardware", "made_with"))
        return _sealed(random, {**lock, part: mutated_value(random, lock[part], pool)})
    return _sealed(random, mutated_value(random, lock, pool))


def _graphs(random: Random, sources: Sources) -> bytes:
    if random.random() < 0.1:
        return mutated_bytes(random, sources.text("vendored.graph.json"), sources.profiles)
    value, pool = sources.json("vendored.graph.json"), sources.pools["vendored.graph.json"]
    part = random.choice(("graph", "graph", "workload", "dry_runs", None))
    changed = mutated_value(random, value if part is None else value[part], pool)
    return _sealed(random, changed if part is None else {**value, part: changed})


def _configs(random: Random, sources: Sources) -> bytes:
    config = random.choice(CONFIGS)
    if random.random() < 0.1:
        return mutated_bytes(random, _json(config), sources.profiles)
    return _json(mutated_value(random, config, sources.pools["configs"]))


def _adapters(random: Random, sources: Sources) -> bytes:
    adapter = random.choice(ADAPTERS)
    if random.random() < 0.1:
        return mutated_bytes(random, _json(adapter), sources.profiles)
    return _json(mutated_value(random, adapter, sources.pools["adapters"]))


def _headers(random: Random, sources: Sources) -> bytes:
    data = sources.text("weights/model.safetensors")
    if random.random() < 0.15:
        return mutated_bytes(random, data, sources.profiles)
    start = 8 + struct.unpack("<Q", data[:8])[0]
    header = mutated_value(random, sources.header, sources.pools["header"])
    if random.random() < 0.5:
        header = _laid_out(header)
    text = json.dumps(header, default=str).encode()
    length = (
        len(text)
        if random.random() < 0.9
        else random.choice((0, 1, len(text) - 1, len(text) + 1, 10**8, 2**60, 2**64 - 1))
    )
    size = max(max(_ends(header), default=0), 0) if random.random() < 0.8 else len(data) - start
    return struct.pack("<Q", length) + text + data[start:][:size].ljust(min(size, 100_000), b"\0")


def _laid_out(header: Any) -> Any:
    """Return a header whose tensors lie one after another, as long as they say, so that the lie is another."""
    position, found = 0, {}
    for name, entry in header.items() if isinstance(header, dict) else ():
        if not _ends({name: entry}):
            found[name] = entry
            continue
        length = entry["data_offsets"][1] - entry["data_offsets"][0]
        found[name] = {**entry, "data_offsets": [position, position + length]}
        position += length
    return found


def _ends(header: Any) -> list[int]:
    entries = [entry for entry in header.values() if isinstance(entry, dict)] if isinstance(header, dict) else []
    offsets = [entry.get("data_offsets") for entry in entries]
    return [
        place[1]
        for place in offsets
        if isinstance(place, list) and len(place) == 2 and all(isinstance(number, int) for number in place)
    ]


def _indices(random: Random, sources: Sources) -> bytes:
    index = {"metadata": {"total_size": 5_000}, "weight_map": dict.fromkeys(sources.header, "part.safetensors")}
    if random.random() < 0.1:
        return mutated_bytes(random, _json(index), sources.profiles)
    return _json(mutated_value(random, index, sources.pools["header"]))


def _maps(random: Random, sources: Sources) -> bytes:
    value = mutated_value(random, sources.json("map.json"), sources.pools["map.json"])
    text = random.choice((_json(value), repr(value).encode("utf-8", "replace")))
    return text if random.random() < 0.8 else mutated_bytes(random, text, sources.profiles)


def _hardware(random: Random, sources: Sources) -> bytes:
    if random.random() < 0.2:
        return mutated_bytes(random, MACHINE.encode(), sources.profiles)
    return _dumped(random, mutated_value(random, yaml.safe_load(MACHINE), sources.pools["machine"]))


def _tokenizers(random: Random, sources: Sources) -> bytes:
    """Return one of a tokenizer's files, or two of them."""
    pool, files = sources.pools["tokenizers"], {}
    for name in random.sample(
        ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"), k=random.choice((1, 2))
    ):
        if name == "chat_template.jinja":
            text = mutated_bytes(random, CHAT.encode(), [grammars.template(random).encode()]).decode("utf-8", "replace")
            files[name] = random.choice((text, CHAT + grammars.template(random), grammars.template(random)))
        else:
            good = TOKENIZER_CONFIG if "config" in name else random.choice(TOKENIZERS)
            files[name] = _json(mutated_value(random, good, pool)).decode()
    return json.dumps(files).encode()


SURFACES = {
    "yaml": Surface(_yaml, ON_PROFILES, "profile.yaml", reaches=True),
    "values": Surface(_values, ON_PROFILES, "profile.yaml", reaches=True),
    "templates": Surface(_templates, ON_PROFILES, "profile.yaml", reaches=True),
    "locks": Surface(
        _locks,
        [
            *(["check", "locked.yaml", "--format", name] for name in ("table", "json", "sarif", "github")),
            ["explain", "locked.yaml"],
            ["diff", "locked.lock.json", "good.yaml"],
            ["compile", "locked.yaml", "--keep", "--no-simulate"],
            ["run", "locked.yaml"],
            ["probe", "--against", "locked.lock.json"],
        ],
        "locked.lock.json",
        reaches=True,
    ),
    "graphs": Surface(
        _graphs,
        [*[["compile", "vendored.yaml", "--dry-run"], ["check", "vendored.yaml"]] * 12, ["simulate", "vendored.yaml"]],
        "vendored.graph.json",
        reaches=True,
    ),
    "configs": Surface(
        _configs,
        [
            *[["tree", "config.json"], ["compile", "config.yaml", "--dry-run", "--no-simulate"]] * 8,
            *[["compile", "workload.yaml", "--dry-run", "--no-simulate"]] * 4,
            *[["compile", "inputs.yaml", "--dry-run", "--no-simulate"]] * 2,
            ["compile", "workload.yaml", "--dry-run"],
            ["compile", "inputs.yaml", "--dry-run"],
            ["init", "config.json", "--on", "2xrtx-4090"],
        ],
        "config.json",
        reaches=True,
    ),
    "adapters": Surface(
        _adapters,
        [
            *[["compile", "adapted.yaml", "--dry-run", "--no-simulate", "--format", name] for name in FORMATS[:2]] * 6,
            ["compile", "adapted.yaml", "--dry-run"],
            ["explain", "adapted.yaml", "--caches"],
            ["run", "adapted.yaml", "--no-probe"],
        ],
        "adapter/adapter_config.json",
        reaches=True,
    ),
    "headers": Surface(
        _headers, [["compile", "weights.yaml", "--dry-run", "--no-simulate"]], "weights/model.safetensors", reaches=True
    ),
    "indices": Surface(
        _indices,
        [["compile", "sharded.yaml", "--dry-run", "--no-simulate"]],
        "sharded/model.safetensors.index.json",
        reaches=True,
    ),
    "tokenizers": Surface(
        _tokenizers,
        [
            *[[*SAY, "card.yaml"], [*SAY, "card.yaml", "--chat"]] * 4,
            [*SAY, "spoken.yaml"],
            [*SAY, "spoken.yaml", "--chat"],
        ],
        "spoken",
    ),
    "maps": Surface(
        _maps, [["adopt", "map.json", "--model", "llama"], ["adopt", "map.json", "--model", "llama", "--on",
        "2x24GiB"]], "map.json"
    ),
    "hardware": Surface(
        _hardware,
        [*[["fit", "weights.yaml", "--on", "machine.yaml"], ["check", "good.yaml"]] * 12, ["init", "weights", "--on",
        "machine.yaml"]],
        "machine.yaml",
        reaches=True,
    ),
    "machines": Surface(
        lambda random, _: grammars.machine(random).encode("utf-8", "surrogatepass"),
        [
            *[["fit", "weights.yaml", "--on", INPUT], ["adopt", "map.json", "--model", "llama", "--on", INPUT]] * 12,
            ["init", "weights", "--on", INPUT],
        ],
        reaches=True,
    ),
    "patterns": Surface(
        lambda random, _: grammars.pattern(random).encode("utf-8", "surrogatepass"),
        [
            *[["tree", "llama", "--match", INPUT], ["tree", "mixture", "--match", INPUT]] * 3,
            ["explain", "good.yaml", INPUT],
        ],
    ),
    "arguments": Surface(lambda random, _: json.dumps(grammars.arguments(random)).encode(), []),
}  # fmt: skip
