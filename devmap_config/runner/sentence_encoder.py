"""Turns an encoder into a sentence encoder, by the files of the modules that sentence-transformers adds."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from devmap_config.files import CONFIG, FileError, boundary_of, read_json
from devmap_config.runner.heads import Output

if TYPE_CHECKING:
    import torch

    from devmap_config.diagnostics.diagnostic import Sink
    from devmap_config.runner.loading import LoadRequest

MODES = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
"""The poolings in the order in which they are joined, by the keys of earlier versions."""


@dataclass(frozen=True, kw_only=True)
class SentenceEncoder:
    """The pooling that turns the vectors of tokens into one vector.

    Attributes:
        modes: the poolings, whose results are joined if there are several.
        normalizes: the vector is scaled to a length of 1.
        prompt: the text that is put before every text.
        max_tokens: the most tokens that are read.
        lowers_case: the text is converted to lower case.
    """

    modes: tuple[str, ...]
    normalizes: bool = False
    prompt: str = ""
    max_tokens: int | None = None
    lowers_case: bool = False

    def prepared(self, text: str) -> str:
        """Return a text in the form that the encoder reads."""
        return self.prompt + (text.lower() if self.lowers_case else text)

    def embedding(self, states: torch.Tensor, mask: torch.Tensor) -> Output:
        """Return the vector of a text, from the states of its tokens (1 × tokens × width) and the mask of those that
        are text.
        """
        import torch

        weights = mask.to(states).unsqueeze(-1)
        vector = torch.cat([_pooled(mode, states, weights) for mode in self.modes], -1)
        if self.normalizes:
            vector = torch.nn.functional.normalize(vector, dim=-1)
        values = vector[0].float().tolist()
        return Output(json.dumps(values), values)


def _pooled(mode: str, states: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    count = weights.sum(1)
    if mode == "cls":
        return states[:, 0]
    if mode == "lasttoken":
        return states[:, int(count.max()) - 1]
    if mode == "max":
        return states.masked_fill(weights == 0, -1e9).amax(1)
    if mode == "weightedmean":
        weights = weights * weights.cumsum(1)
        count = weights.sum(1)
    divisor = count.sqrt() if mode == "mean_sqrt_len_tokens" else count
    return (states * weights).sum(1) / divisor


def sentence_encoder(request: LoadRequest, sink: Sink) -> SentenceEncoder | None:
    """Return the sentence encoder of the checkpoint's modules; `None` if it has none, or unknown ones."""
    modules = _read(request, "modules.json")
    if not isinstance(modules, list):
        return None
    described = map(_as_object, modules)
    kinds = [(str(module.get("type")).rpartition(".")[2], str(module.get("path"))) for module in described]
    if [kind for kind, _ in kinds] not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        _warn_unknown(" → ".join(f"`{kind}`" for kind, _ in kinds), sink)
        return None
    pooling = _as_object(_read(request, f"{kinds[1][1]}/config.json"))
    stated = pooling.get("pooling_mode") or [mode for key, mode in MODES.items() if pooling.get(key)] or "mean"
    modes = tuple(stated) if isinstance(stated, list) else (stated,)
    whole = _as_object(_read(request, "config_sentence_transformers.json"))
    prompt = _as_object(whole.get("prompts")).get(str(whole.get("default_prompt_name")), "")
    if not all(mode in MODES.values() for mode in modes) or (prompt and pooling.get("include_prompt") is False):
        _warn_unknown(f"`Pooling` by {', '.join(map(str, modes))}", sink)
        return None
    text = _as_object(_read(request, "sentence_bert_config.json"))
    max_tokens = text.get("max_seq_length")
    return SentenceEncoder(
        modes=modes,
        normalizes=len(kinds) == 3,
        prompt=str(prompt),
        max_tokens=max_tokens if isinstance(max_tokens, int) else None,
        lowers_case=bool(text.get("do_lower_case")),
    )


def _warn_unknown(what: str, sink: Sink) -> None:
    sink.warning(
        "no-embedding",
        f"the checkpoint's `modules.json` asks for {what}, which is not known here: what the model gives is shown",
        help="use sentence-transformers for the embedding, on the model that `devmap_config.load_model` gives",
    )


def _as_object(value: Any) -> dict[str, Any]:
    """Return a value that should be a JSON object; an empty one if it is not."""
    return value if isinstance(value, dict) else {}


def _read(request: LoadRequest, name: str) -> Any:
    """Return the value in a file of the checkpoint; `None` if there is none that can be read."""
    folder = Path(request.weights)
    try:
        if folder.is_dir():
            return read_json(folder / name, CONFIG, boundary_of(folder / "modules.json"))
        return read_json(_fetched(request, name), CONFIG)
    except FileError:
        return None


def _fetched(request: LoadRequest, name: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    try:
        return Path(hf_hub_download(request.weights, name, revision=request.revision))
    except (EntryNotFoundError, OSError, ValueError):  # or it cannot be fetched, or the name is impossible
        return Path(name, "is-not-there")
