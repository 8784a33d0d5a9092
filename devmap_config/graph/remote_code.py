"""Reads the references of a config to code that comes with its model, without running it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

READ_IT_FIRST = "read it, then pass `--trust-remote-code`: it runs with all that you may do"
"""The help for a model that comes with its own code."""


def code_files(config: Mapping[str, object]) -> tuple[str, ...]:
    """Return the files that the config, or an inner config, would have run; in order, each once.

    A file of another repository than the model's is written `owner/name: file.py`.
    """
    return tuple(dict.fromkeys(map(_file, _references(config))))


def hub_kernel(config: Mapping[str, object]) -> str | None:
    """Return the repository of the hub whose code the config, or an inner config, names for attention."""
    for key, value in config.items():
        if key in ("attn_implementation", "_attn_implementation") and isinstance(value, str) and "/" in value:
            return value
        if isinstance(value, Mapping) and (repository := hub_kernel(value)) is not None:
            return repository
    return None


def class_reference(config: Mapping[str, object], class_name: str) -> str | None:
    """Return the config's reference to code for a class, by the name of an Auto class or of the class itself."""
    auto_map = config.get("auto_map")
    if not isinstance(auto_map, Mapping):
        return None
    models = {name: reference for name, reference in auto_map.items() if isinstance(reference, str)}
    if class_name in models:
        return models[class_name]
    return next(
        (
            reference
            for name, reference in models.items()
            if name.startswith("AutoModel") and reference.rpartition(".")[2] == class_name
        ),
        None,
    )


def fails_without(config: Mapping[str, object], class_name: str, error: Exception) -> bool:
    """Return whether transformers failed to make the model because the code that the config names was not run."""
    import transformers

    if hub_kernel(config) is not None:
        return True
    if not code_files(config):
        return False
    is_known = str(config.get("model_type")) in transformers.CONFIG_MAPPING and hasattr(transformers, class_name)
    return not is_known or "trust_remote_code" in str(error)  # the argument that the error asks for, for inner models


def listed(files: tuple[str, ...]) -> str:
    """Return files as a message names them."""
    return ", ".join(f"`{file}`" for file in files)


def not_run(config: Mapping[str, object]) -> str:
    """Return a sentence about the code that a config names and that was not allowed to run."""
    if (kernel := hub_kernel(config)) is not None:
        return f"the model's config has attention computed by code of the hub, which was not run: `{kernel}`"
    return f"the model brings code of its own, which was not run: {listed(code_files(config))}"


def _references(config: Mapping[str, object]) -> Iterator[str]:
    for key, value in config.items():
        if key == "auto_map":
            yield from _texts(value)
        elif isinstance(value, Mapping):
            yield from _references(value)


def _texts(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from _texts(list(value.values()))
    elif isinstance(value, list):  # for a tokenizer, the slow and the fast one
        for item in value:
            yield from _texts(item)


def _file(reference: str) -> str:
    repository, _, dotted = reference.rpartition("--")
    file = f"{dotted.rpartition('.')[0] or dotted}.py"
    return f"{repository}: {file}" if repository else file
