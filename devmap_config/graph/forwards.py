"""The forwards that `generate` runs: a prefill and the steps after it, with the inputs that each kind of
model takes.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from devmap_config.graph.costs import LEAST_WORDS, PARTLY
from devmap_config.graph.failures import OtherInputsError, PromptTooShortError
from devmap_config.graph.key_values import made_cache
from devmap_config.graph.sounds import SOUND_NAMES
from devmap_config.libraries.private import LibraryChangedError
from devmap_config.libraries.transformers import CACHE_NAMES, is_own_model, unnamed_cache
from devmap_config.libraries.versions import is_tried

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedModel

    from devmap_config.graph.costs import WorkloadShape
    from devmap_config.graph.media import Media

OTHER_INPUTS = ("pixel_values", "input_values", "hidden_states", "query_embeds")
"""Inputs of models for images and sound, and of models that continue from the states of others."""

IMAGES_ATTENDED = "image_encoder_embeddings"
"""The name of the input for images that were encoded before."""

WRITTEN = "language_model_outputs"
"""The name of the output of an inner language model, which decodes by itself (BLIP-2)."""

SOUND_LENGTH = 1500
PATCHES_ACROSS = 8
"""The number of patches across a tower's input if its config sets no limit."""


@dataclass
class Forwards:
    """Forwards of a model whose tensors are fake, under a workload.

    `offloads` says whether an offloaded cache is really moved between simulated devices; `offloaded_caches` are the
    modules whose part of it is offloaded, if not all are.
    """

    model: PreTrainedModel
    workload: WorkloadShape
    media: tuple[Media, ...] = ()
    offloads: bool = False
    offloaded_caches: tuple[str, ...] | None = None
    _encoded: Any = None
    _attended: Any = None
    _writer: Forwards | None = None

    def prefill_inputs(self, length: int) -> dict[str, Any]:
        """Return the inputs for a prompt of `length` tokens, including those that stand for images and sound.

        Raises:
            OtherInputsError: if the model takes no text, or needs more than the known inputs.
            PromptTooShortError: if the prompt has no room for the tokens of images and sound.
            LibraryChangedError: if the name of the input for text has changed.
        """
        self._require_inputs()
        tokens = self._tokens(length)
        inputs: dict[str, Any] = {"input_ids": tokens} if "input_ids" in self._accepted else {}
        if self._has_encoder:
            inputs["decoder_input_ids"] = tokens
            if self._hears_apart or self.model.main_input_name == "input_features":
                inputs.pop("input_ids", None)
            if self.model.main_input_name == "input_features" and not self.media:
                inputs["input_features"] = self._features()
        if self.media:
            inputs |= self._beside_media(length)
        if self.cache_name is not None:
            cache = made_cache(
                self.model, self.workload, length, offloading=self.offloads, offloaded=self.offloaded_caches
            )
            inputs |= {} if cache is None else {self.cache_name: cache}
        return inputs | self._options()

    def decode_inputs(self, cache: Any) -> dict[str, Any]:
        """Return the inputs for one more token, with the cache that a forward returned.

        Raises:
            LibraryChangedError: if the name of the input for the cache is unknown; `OtherInputsError` if it is not a
                model of transformers.
        """
        if self._writer is not None:
            return self._writer.decode_inputs(cache)
        if self.cache_name is None:
            raise self._unlike(f"takes its cache by none of the names {', '.join(CACHE_NAMES)}")
        token = self._tokens(1)
        inputs = {self.cache_name: cache} | self._options()
        if not self._has_encoder:
            return {"input_ids": token} | inputs | self._beside_each_token()
        return {"decoder_input_ids": token, "encoder_outputs": self._encoded} | inputs

    def run(self, inputs: dict[str, Any]) -> Any:
        """Run a forward, and return the cache that the model returned.

        Raises:
            LibraryChangedError: if the name of the cache in the output is unknown; `OtherInputsError` if it is not a
                model of transformers.
        """
        if self._writer is not None and self._writer.cache_name in inputs:
            return self._writer.run(inputs)
        output = self.model(**inputs)
        # As a dict, because transformers' class warns of deprecated names.
        held = dict(output) if isinstance(output, dict) else {}
        if isinstance(written := held.get(WRITTEN), dict):
            self._writer = Forwards(self.model.language_model, self.workload)
            return self._writer.cache_of(written)
        return self.cache_of(output)

    def cache_of(self, output: Any) -> Any:
        """Return the cache in the output of a forward, and remember the encoder's output."""
        if (encoded := getattr(output, "encoder_last_hidden_state", None)) is not None:
            from transformers.modeling_outputs import BaseModelOutput

            self._encoded = BaseModelOutput(last_hidden_state=encoded)
            self._encoded.attention_mask = None  # Moonshine's output has this mask, too
        if self.media and IMAGES_ATTENDED in self._accepted:
            self._attended = output.image_outputs.last_hidden_state
        held = dict(output) if isinstance(output, dict) else {}
        cache = next((cache for name in CACHE_NAMES if (cache := held.get(name)) is not None), None)
        if cache is None and (name := unnamed_cache(output)) is not None:
            raise self._unlike(f"returns its cache as `{name}`")
        return None if self._only_returns_its_cache else cache

    @property
    def makes_cache(self) -> bool:
        """True if the cache is made beforehand for every block, even for blocks that do not fill it."""
        if self.offloads and self.offloaded_caches != ():
            return self.workload.cache != "dynamic"
        return self.workload.cache not in ("dynamic", "offloaded", PARTLY)

    @property
    def _accepted(self) -> Any:
        return inspect.signature(self.model.forward).parameters

    @property
    def _only_returns_its_cache(self) -> bool:
        """True if the model returns a cache but does not decode: ColPali computes the embedding of a page."""
        return self.cache_name is None and not self.model.can_generate() and is_tried("transformers")

    @property
    def cache_name(self) -> str | None:
        """The name under which the model takes a cache; `None` if it takes none."""
        return next((name for name in CACHE_NAMES if name in self._accepted), None)

    def _beside_each_token(self) -> dict[str, Any]:
        """Return the extra inputs of layers that attend to images at every token (IDEFICS)."""
        if self._attended is None:
            return {}
        name = "perceiver_embeddings" if getattr(self.model.config, "use_resampler", False) else IMAGES_ATTENDED
        shape = (self.workload.batch_size, 1, self.workload.images)
        return {name: self._attended, "image_attention_mask": torch.ones(shape, dtype=torch.long)}

    def _beside_media(self, length: int) -> dict[str, Any]:
        """Return the inputs for images and sound, and for a prompt with tokens that stand for them."""
        inputs: dict[str, Any] = {}
        count = sum(medium.placeholders for medium in self.media)
        if count + LEAST_WORDS > length:
            raise PromptTooShortError(count)
        tokens, place = self._tokens(length), 1
        stands = torch.zeros_like(tokens, dtype=torch.bool)
        for medium in self.media:
            here = slice(place, place + medium.placeholders)
            stands[:, here] = True
            if medium.token is not None:
                tokens[:, here] = medium.token
            place += medium.placeholders
        for medium in self.media:
            inputs |= medium.tensors | medium.beside(tokens, stands)
        beside_text = {
            "input_ids": tokens,
            "attention_mask": torch.ones_like(tokens),
            "mm_token_type_ids": stands.long(),
            "token_type_ids": torch.zeros_like(tokens),
        }
        named = (name for name in beside_text if name in self._accepted)
        if "input_ids" in self._accepted and not self._hears_apart:
            inputs |= {name: beside_text[name] for name in named if name != "token_type_ids" or self._marks_prompts}
        return inputs

    @property
    def _hears_apart(self) -> bool:
        """True if the encoder takes sound instead of text."""
        return self._has_encoder and any(set(medium.tensors) & set(SOUND_NAMES) for medium in self.media)

    @property
    def _marks_prompts(self) -> bool:
        """True if token types mark the prompt, over which attention then is bidirectional."""
        return "mm_token_type_ids" not in self._accepted

    def _require_inputs(self) -> None:
        """Check that the model takes the inputs before its code runs on them."""
        name = self.model.main_input_name
        if type(self.model).forward is torch.nn.Module.forward:
            raise OtherInputsError("it has no forward of its own")
        given = {"input_ids", "input_features", "decoder_input_ids"}
        for medium in self.media:
            given |= {*medium.tensors}
        if not given & set(self._accepted):
            # Models for images often have the default name of the main input, because their class sets no other.
            other = next((name for name in OTHER_INPUTS if name in self._accepted), name)
            raise (
                self._unlike(f"takes no `{name}`")
                if other == "input_ids"
                else OtherInputsError(f"it takes `{other}`, and no text")
            )
        kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        for parameter in self._accepted.values():
            if parameter.default is parameter.empty and parameter.kind not in kinds and parameter.name not in given:
                raise OtherInputsError(f"it takes `{parameter.name}` besides text")

    def _unlike(self, what: str) -> Exception:
        """Return the error for a model that differs from transformers' models as they were when this was tested."""
        if is_own_model(self.model):
            return LibraryChangedError("transformers", f"`{type(self.model).__name__}.forward` {what}")
        return OtherInputsError(f"it {what}")

    @property
    def _has_encoder(self) -> bool:
        """True if the model takes the tokens of a decoder, too; the bare decoder of such a model does not."""
        return "decoder_input_ids" in self._accepted

    def _tokens(self, length: int) -> torch.Tensor:
        return torch.full((self.workload.batch_size, length), self._word, dtype=torch.long)

    @property
    def _word(self) -> int:
        """The id of a token without special treatment: some models give padding no position."""
        config = self.model.config.get_text_config(decoder=True)
        names = ("pad_token_id", "bos_token_id", "eos_token_id", "sep_token_id")
        special = [getattr(config, name, None) for name in names]
        return next(word for word in range(1, len(names) + 2) if word not in special)

    def _features(self) -> torch.Tensor:
        """Return the input of Whisper's encoder: windows of a fixed length, which convolutions reduce to every second
        frame.
        """
        config = self.model.config
        bins, positions = (getattr(config, name, None) for name in ("num_mel_bins", "max_source_positions"))
        if bins is None or positions is None:
            raise OtherInputsError("it takes `input_features` of another shape than Whisper's")
        shape = (self.workload.batch_size, bins, 2 * positions)
        return torch.ones(shape, dtype=self.model.dtype)

    def _options(self) -> dict[str, Any]:
        options: dict[str, Any] = {}
        if "logits_to_keep" in self._accepted:
            options["logits_to_keep"] = 0 if self.workload.all_logits else 1 + self.workload.proposed_tokens
        if "use_cache" in self._accepted and self.model.can_generate():
            options["use_cache"] = True
        return options


def tower_inputs(tower: PreTrainedModel) -> Iterator[dict[str, torch.Tensor]]:
    """Yield inputs that an inner model for images or sound may take, by its config; likely ones first."""
    config = tower.config
    name = tower.main_input_name

    def ones(*shape: int) -> torch.Tensor:
        return torch.ones(shape, dtype=tower.dtype)

    if name == "input_features" and (bins := getattr(config, "num_mel_bins", None)):
        yield {name: ones(1, bins, 2 * getattr(config, "max_source_positions", SOUND_LENGTH))}
    channels = getattr(config, "num_channels", None) or getattr(config, "in_channels", None) or 3
    size, patch = getattr(config, "image_size", None), getattr(config, "patch_size", None)
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    patch_height, patch_width = patch if isinstance(patch, (list, tuple)) else (patch, patch)
    if height and width:
        yield {name: ones(1, channels, height, width)}
    if patch_height and patch_width:
        patches = PATCHES_ACROSS**2
        flat = channels * patch_height * patch_width * (getattr(config, "temporal_patch_size", None) or 1)
        yield {name: ones(patches, flat), "grid_thw": torch.tensor([[1, PATCHES_ACROSS, PATCHES_ACROSS]])}
        yield {
            name: ones(1, patches, flat),
            "pixel_attention_mask": torch.ones((1, patches), dtype=torch.long),
            "spatial_shapes": torch.tensor([[PATCHES_ACROSS, PATCHES_ACROSS]]),
        }


CACHES_MADE_IN = ("transformers", "devmap_config.graph")
"""The modules that define the classes of caches and their layers."""


def cache_tensors(cache: Any) -> list[torch.Tensor]:
    """Return every tensor within a cache, whatever its class."""
    tensors: dict[int, torch.Tensor] = {}
    waiting, seen = [cache], set()
    while waiting:
        item = waiting.pop()
        if isinstance(item, torch.Tensor) and hasattr(item, "__tensor_flatten__"):  # quanto's hold others
            waiting += [getattr(item, name) for name in item.__tensor_flatten__()[0]]
        elif isinstance(item, torch.Tensor):
            tensors.setdefault(id(item), item)
        elif id(item) not in seen:
            seen.add(id(item))
            if isinstance(item, dict):
                waiting += item.values()
            elif isinstance(item, (list, tuple)):
                waiting += item
            elif type(item).__module__.startswith(CACHES_MADE_IN) and "configuration" not in type(item).__module__:
                waiting += vars(item).values()
    return list(tensors.values())
