"""Recognises models in formats that transformers does not read, and advises what to write instead."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING, NamedTuple

from devmap_config.files import CONFIG, FileError, exists, is_folder, read_json
from devmap_config.wording import closest

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from devmap_config.files import Boundary

HUB_ADDRESS = re.compile(r"(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/(?P<id>[\w.\-]+/[\w.\-]+)(?:[/?#].*)?")

ORIGINAL = "name the repository of transformers that it was made from, such as `Qwen/Qwen3-8B`"

WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")


class OtherFormat(NamedTuple):
    """A format that transformers does not read, and advice."""

    message: str
    help: str


def other_format(path: Path, within: Boundary | None = None) -> OtherFormat | None:
    """Return the format of a file or folder without a model's `config.json`, if it is known."""
    if path.name.lower().endswith(".gguf"):
        return _gguf(path, str(path))
    if path.name.endswith((".yaml", ".yml")):
        return OtherFormat(f"`{path.name}` is YAML, and no model", "a profile is compiled by `devmap compile`")
    if not is_folder(path):
        return _weights(path) if path.name.lower().endswith(WEIGHTS) else None
    if exists(path / "config.json"):
        return None
    if exists(path / "adapter_config.json"):
        return _adapter(path, within)
    if exists(path / "model_index.json"):
        return _pipeline(path, within)
    files = sorted(os.listdir(path))  # noqa: PTH208
    if gguf := next((name for name in files if name.lower().endswith(".gguf")), None):
        return _gguf(path, str(path / gguf))
    if exists(path / "params.json"):
        return OtherFormat(
            f"`{path.name}` holds a checkpoint in its maker's own format, with a `params.json`",
            "name the same model in transformers' format: on the hub, that repository mostly ends in `-hf` or has a"
            " `config.json`",
        )
    if snapshots := list(_snapshots(path)):
        return OtherFormat(
            f"`{path.name}` is a folder of the hub's cache, and no model by itself",
            f"name the hub id, or the snapshot: `{snapshots[-1]}`",
        )
    return None


def advice_on_missing(text: str, path: Path) -> str | None:
    """Return advice on a source that does not exist: a web address, a home folder, a misspelt name."""
    if (address := HUB_ADDRESS.fullmatch(text)) is not None:
        return f"name the hub id: `source: {address['id']}`"
    if text.startswith("~"):
        return "write the path out: `~` stands for nothing here"
    folder = next((parent for parent in path.parents if is_folder(parent)), None)
    if folder is None or text.count("/") < len(path.relative_to(folder).parts):  # nothing of the path exists
        return None
    missing = path.relative_to(folder).parts
    close = closest(missing[0], os.listdir(folder))  # noqa: PTH208
    if close is None:
        return None
    return f"did you mean `{'/'.join([*text.split('/')[: -len(missing)], close, *missing[1:]])}`?"


def names_gguf(repository: str) -> bool:
    """Return whether the name of a hub id says that it holds GGUF files."""
    return "gguf" in repository.lower()


def _gguf(path: Path, file: str) -> OtherFormat:
    return OtherFormat(
        f"`{path.name}` is a model of llama.cpp (GGUF), which transformers does not place",
        f"{ORIGINAL}; or leave it to llama.cpp, which places it by itself: `llama-server -m {file}`",
    )


def _weights(path: Path) -> OtherFormat:
    return OtherFormat(
        f"`{path.name}` is a file of weights, and not a model",
        f"name the folder that it is in, with its `config.json`: `source: {path.parent}`",
    )


def _adapter(path: Path, within: Boundary | None) -> OtherFormat:
    base = _read(path / "adapter_config.json", within).get("base_model_name_or_path")
    named = f"name the model that it adapts: `source: {base}`" if base else "name the model that it adapts"
    named += f", and `adapter: {path.name}`"
    return OtherFormat(
        f"`{path.name}` is an adapter (LoRA), and no model by itself",
        f"{named}; or merge it first, by `merge_and_unload()` and `save_pretrained` of peft",
    )


def _pipeline(path: Path, within: Boundary | None) -> OtherFormat:
    parts = [
        name
        for name, described in _read(path / "model_index.json", within).items()
        if isinstance(described, list) and described[:1] == ["transformers"] and exists(path / name / "config.json")
    ]
    named = " or ".join(f"`source: {path / name}`" for name in parts)
    return OtherFormat(
        f"`{path.name}` is a pipeline of diffusers, and not one model",
        f"name a part of it that is a model of transformers: {named}"
        if parts
        else "devmap places transformers' models",
    )


def _snapshots(path: Path) -> Iterator[Path]:
    if is_folder(path / "snapshots"):
        yield from sorted(path / "snapshots" / name for name in os.listdir(path / "snapshots"))  # noqa: PTH208


def _read(path: Path, within: Boundary | None) -> dict[str, object]:
    try:
        value = read_json(path, CONFIG, within)
    except FileError:
        return {}
    return value if isinstance(value, dict) else {}
