"""Lets a loaded model speak: text or tokens where it generates, else one forward and what came out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from devmap_config.libraries.accelerate import hooks_of
from devmap_config.runner.loading import RunnerError

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch
    from transformers import PreTrainedModel

FALLBACK_LENGTH = 8
"""Tokens of the made-up input of a model that has no tokenizer."""


def demonstrate(
    model: PreTrainedModel, weights: str, prompt: str, *, max_new_tokens: int, revision: str | None = None
) -> str:
    """What the model makes of a prompt: generated text, or the shapes that a forward gives.

    Raises:
        RunnerError: where the model takes something else than tokens.
    """
    import torch

    if model.main_input_name != "input_ids":
        raise RunnerError(
            "no-text-input",
            f"{type(model).__name__} takes `{model.main_input_name}`, for which a prompt is no input",
            "`--no-generate` loads and verifies; `devmap_config.load_model` gives the model for inputs of its own",
        )
    tokenizer = _tokenizer(weights, revision)
    inputs = _inputs(model, tokenizer, prompt)
    with torch.no_grad():
        if model.can_generate():
            tokens = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
            return _as_text(tokens[0], tokenizer)
        return "\n".join(_described(model(**inputs)))


def _tokenizer(weights: str, revision: str | None) -> Any:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(weights, revision=revision or "main")
    except (OSError, ValueError, KeyError):  # a checkpoint without a tokenizer is a checkpoint still
        return None
    # For some models, transformers makes one up then, which knows no words.
    return tokenizer if len(tokenizer) > len(tokenizer.all_special_tokens) else None


def _inputs(model: PreTrainedModel, tokenizer: Any, prompt: str) -> dict[str, torch.Tensor]:
    import torch

    if tokenizer is None:
        length = torch.arange(1, FALLBACK_LENGTH + 1)
        encoded = {"input_ids": (length % model.config.get_text_config().vocab_size).unsqueeze(0)}
    else:
        encoded = dict(tokenizer(prompt, return_tensors="pt", return_token_type_ids=False))
    devices = (getattr(hook, "execution_device", None) for hook in hooks_of(model.get_input_embeddings()))
    device = next((device for device in devices if device is not None), model.device)
    return {name: tensor.to(device) for name, tensor in encoded.items()}


def _as_text(tokens: torch.Tensor, tokenizer: Any) -> str:
    if tokenizer is None:
        return f"tokens {tokens.tolist()}"
    return str(tokenizer.decode(tokens, skip_special_tokens=True))


def _described(output: Any) -> Iterator[str]:
    import torch

    for name, value in output.items():
        if isinstance(value, torch.Tensor):
            mean = value.float().mean().item()
            yield f"{name}: {tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}, mean {mean:.6f}"
