"""Finds the tokenizer of a checkpoint, or reports why it has none that can be used."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from devmap_config.graph.remote_code import READ_IT_FIRST, code_files, listed
from devmap_config.libraries.panics import panics_raised
from devmap_config.libraries.remote_code import tokenizer_config
from devmap_config.runner.loading import first_line

if TYPE_CHECKING:
    from devmap_config.diagnostics.diagnostic import Sink
    from devmap_config.runner.loading import LoadRequest

OTHER_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "tekken.json", "spiece.model", "vocab.json", "vocab.txt")
"""Files that transformers reads a vocabulary from, whatever the tokenizer's class."""


def load_tokenizer(request: LoadRequest, sink: Sink) -> Any:
    """Return the checkpoint's tokenizer; if it has none that can be used, report why and return `None`."""
    from transformers import AutoTokenizer, PreTrainedTokenizerBase

    stated = tokenizer_config(request.weights, request.revision)
    try:
        with panics_raised():
            tokenizer = AutoTokenizer.from_pretrained(
                request.weights, revision=request.revision, trust_remote_code=request.trust_remote_code
            )
    except Exception as error:  # a tokenizer's own code, or transformers without files, may raise anything
        files = code_files(stated)
        if files and not request.trust_remote_code:
            sink.warning(
                "remote-code",
                f"the tokenizer is code that comes with the model, which was not run: {listed(files)}; tokens stand in"
                " for text",
                help=READ_IT_FIRST,
            )
        elif stated:
            of_code = f", which is code ({listed(files)}), cannot be had or run" if files else " cannot be loaded"
            _warn_without_tokenizer(f"the tokenizer{of_code}: {_why(error)}", sink)
        return None  # a checkpoint without a tokenizer is still valid
    if not isinstance(tokenizer, PreTrainedTokenizerBase):  # the config may name any class
        _warn_without_tokenizer(f"a {type(tokenizer).__name__} is not a tokenizer", sink)
        return None
    if not _is_made_up(tokenizer, request):
        return tokenizer
    if stated:
        names = ", ".join(f"`{name}`" for name in _vocabulary_files(tokenizer))
        _warn_without_tokenizer(f"the tokenizer's vocabulary is not there, in none of {names}", sink)
    return None


def _warn_without_tokenizer(message: str, sink: Sink) -> None:
    sink.warning(
        "no-tokenizer",
        f"{message}; tokens stand in for text",
        help="see that the checkpoint has all of its tokenizer's files, and what these need is installed",
    )


def _why(error: Exception) -> str:
    """Return why a tokenizer could not be loaded, in our words if transformers' message only lists possible reasons."""
    if "backend tokenizer" in first_line(error):
        return "no file with its vocabulary is there that what is installed here can read"
    return f"{type(error).__name__}: {first_line(error)}"


def _is_made_up(tokenizer: Any, request: LoadRequest) -> bool:
    """Return whether a tokenizer has no files: transformers then makes up one without words for some models.

    Some tokenizers need no file, such as those of bytes.
    """
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        return True
    names = _vocabulary_files(tokenizer)
    return bool(names) and not any(_is_at_hand(name, request) for name in names)


def _vocabulary_files(tokenizer: Any) -> tuple[str, ...]:
    """Return the files that a tokenizer of this class may read its vocabulary from; any of them may suffice."""
    named = [name for name in tokenizer.vocab_files_names.values() if isinstance(name, str)]
    return tuple(dict.fromkeys([*named, *(OTHER_VOCABULARIES if named else ())]))


def _is_at_hand(name: str, request: LoadRequest) -> bool:
    """Return whether a file is in the model's folder or, for a model on the hub, has been fetched."""
    if Path(request.weights).is_dir():
        return Path(request.weights, name).is_file()
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(request.weights, name, revision=request.revision), str)
