"""Lets a loaded model speak: text or tokens where it generates, else one forward and what came out."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from devmap_config.graph.remote_code import READ_IT_FIRST, code_files, listed
from devmap_config.libraries.accelerate import hooks_of
from devmap_config.libraries.remote_code import code_of_models, tokenizer_config
from devmap_config.runner.loading import RunnerError, first_line, telling_of_changes

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch
    from transformers import PreTrainedModel

    from devmap_config.diagnostics.diagnostic import Sink
    from devmap_config.runner.loading import LoadRequest

PROMPT = "A model is placed"
FALLBACK_LENGTH = 8
"""Tokens of the made-up input of a model that has no tokenizer."""

OTHER_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "tekken.json", "spiece.model", "vocab.json", "vocab.txt")
"""Files that transformers takes a vocabulary of, whatever the tokenizer's class."""


@telling_of_changes("the model is loaded and verified, and cannot be shown")
def demonstrate(
    model: PreTrainedModel, request: LoadRequest, prompt: str | None, sink: Sink, *, max_new_tokens: int
) -> str:
    """What the model makes of a prompt: generated text, or the shapes that a forward gives.

    Args:
        model: the model, loaded.
        request: what it was loaded from, and whether code that comes with it may run.
        prompt: what it goes on from; for `None`, a few words of ours.
        sink: takes why tokens are shown where text is wanted.
        max_new_tokens: how much it writes.

    Raises:
        RunnerError: where the model takes something else than tokens, or does not run.
    """
    import torch

    if model.main_input_name != "input_ids":
        raise RunnerError(
            "no-text-input",
            f"{type(model).__name__} takes `{model.main_input_name}`, for which a prompt is no input",
            "`--no-generate` loads and verifies; `devmap_config.load_model` gives the model for inputs of its own",
        )
    with torch.no_grad(), code_of_models(allowed=request.trust_remote_code):
        tokenizer = _tokenizer(request, sink)
        is_told = any(each.code in ("no-tokenizer", "remote-code") for each in sink)
        if tokenizer is None and prompt is not None and not is_told:
            sink.warning(
                "no-tokenizer",
                "there is no tokenizer to make tokens of the prompt, which is not used: made-up tokens stand in for it",
                help="put the tokenizer's files into the model's folder",
            )
        inputs = _inputs(model, tokenizer, prompt or PROMPT)
        try:
            return _spoken(model, tokenizer, inputs, max_new_tokens)
        except Exception as error:  # what a model's own code, or what its generation config asks for, may raise
            raise RunnerError(
                "forward-failed",
                f"the model is loaded and verified, and does not run: {type(error).__name__}: {first_line(error)}",
                "`--no-generate` loads and verifies; `devmap_config.load_model` gives the model for inputs of your own",
            ) from error


def _spoken(model: PreTrainedModel, tokenizer: Any, inputs: dict[str, torch.Tensor], max_new_tokens: int) -> str:
    if model.can_generate():
        tokens = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        return as_text(tokens[0], tokenizer)
    return "\n".join(_described(model(**inputs)))


def _tokenizer(request: LoadRequest, sink: Sink) -> Any:
    """The checkpoint's tokenizer; `None` where it has none that can be used, and why not is in the sink."""
    from transformers import AutoTokenizer

    stated = tokenizer_config(request.weights, request.revision)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            request.weights, revision=request.revision, trust_remote_code=request.trust_remote_code
        )
    except Exception as error:  # whatever a tokenizer's own code raises; without files, what transformers makes of that
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
        return None  # a checkpoint without a tokenizer is a checkpoint still
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
    """Why a tokenizer could not be loaded, in words of ours where transformers' are a list of all that might be."""
    if "backend tokenizer" in first_line(error):
        return "no file with its vocabulary is there that what is installed here can read"
    return f"{type(error).__name__}: {first_line(error)}"


def _is_made_up(tokenizer: Any, request: LoadRequest) -> bool:
    """Whether there are no files of a tokenizer: for some models, transformers makes one up then, which knows no words.

    Some need no file, such as those of bytes.
    """
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        return True
    names = _vocabulary_files(tokenizer)
    return bool(names) and not any(_is_at_hand(name, request) for name in names)


def _vocabulary_files(tokenizer: Any) -> tuple[str, ...]:
    """The files of which a tokenizer of this class has its words; any of them may do."""
    named = [each for each in tokenizer.vocab_files_names.values() if isinstance(each, str)]
    return tuple(dict.fromkeys([*named, *(OTHER_VOCABULARIES if named else ())]))


def _is_at_hand(name: str, request: LoadRequest) -> bool:
    """Whether a file is in the model's folder, or, of the hub, was fetched."""
    if Path(request.weights).is_dir():
        return Path(request.weights, name).is_file()
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(request.weights, name, revision=request.revision), str)


def _inputs(model: PreTrainedModel, tokenizer: Any, prompt: str) -> dict[str, torch.Tensor]:
    import torch

    if tokenizer is None:
        length = torch.arange(1, FALLBACK_LENGTH + 1)
        encoded = {"input_ids": (length % model.config.get_text_config().vocab_size).unsqueeze(0)}
    else:
        encoded = dict(tokenizer(prompt, return_tensors="pt", return_token_type_ids=False))
    device = _device_of_tokens(model)
    return {name: tensor.to(device) for name, tensor in encoded.items()}


def _device_of_tokens(model: PreTrainedModel) -> Any:
    """Where the embeddings run; a model's own code need not tell which they are."""
    try:
        hooks = hooks_of(model.get_input_embeddings())
    except NotImplementedError:
        hooks = hooks_of(model)
    devices = (getattr(hook, "execution_device", None) for hook in hooks)
    return next((device for device in devices if device is not None), model.device)


def as_text(tokens: torch.Tensor, tokenizer: Any) -> str:
    """Return what was generated as text; as tokens where no tokenizer makes any of it."""
    if tokenizer is None:
        return f"tokens {tokens.tolist()}"
    text = str(tokenizer.decode(tokens, skip_special_tokens=True))
    return text if text.strip() else f"tokens {tokens.tolist()}"


def _described(output: Any) -> Iterator[str]:
    import torch

    for name, value in output.items():
        if isinstance(value, torch.Tensor):
            mean = value.float().mean().item()
            yield f"{name}: {tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}, mean {mean:.6f}"
