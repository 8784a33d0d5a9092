"""Turns a user's input (text, a chat, an image, sound) into a model's inputs, with the checkpoint's tokenizer or
processor.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from devmap_config.libraries.accelerate import hooks_of
from devmap_config.libraries.panics import panics_raised
from devmap_config.runner.chat_templates import TemplateFailedError, chat_text
from devmap_config.runner.loading import RunnerError, first_line

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch
    from transformers import PreTrainedModel

    from devmap_config.graph.costs import WorkloadShape
    from devmap_config.graph.media import Media
    from devmap_config.runner.media import Sound

PROMPT = "A model is placed"
"""The prompt if none is given."""

MASK = "[MASK]"
"""The placeholder in a prompt for the token that a masked language model should fill, whatever the model calls it."""

MADE_UP_LENGTH = 8
"""The number of tokens of the made-up input of a model without a tokenizer."""

IMAGE_INPUTS = ("pixel_values", "pixel_values_images")
SOUND_INPUTS = ("input_features", "input_values")
TEXT_INPUTS = ("input_ids", "decoder_input_ids")

USE_PYTHON = "`devmap_config.load_model` gives the model for inputs of its own, and `--no-generate` loads and verifies"


@dataclass(frozen=True, kw_only=True)
class UserInput:
    """The input that a user gives a model.

    Messages are a chat: each has a `role` and `content`, and the last one is the user's. The content is text, or a list
    of parts, each of which is text or stands for an image or a sound, in their order. If no part does, the images and
    the sounds go with the last message.
    """

    prompt: str | None = None
    messages: tuple[Mapping[str, Any], ...] = ()
    images: tuple[Any, ...] = ()
    sounds: tuple[Sound, ...] = ()

    @property
    def has_media(self) -> bool:
        """True if it holds images or sound."""
        return bool(self.images or self.sounds)

    @property
    def text(self) -> str | None:
        """The user's text, if the input is only text."""
        return self.messages[-1]["content"] if self.messages else self.prompt

    @property
    def in_parts(self) -> tuple[Mapping[str, Any], ...]:
        """The messages in parts; a prompt is one message."""
        messages = self.messages or ({"role": "user", "content": self.prompt or ""},)
        written = [{**message, "content": _parts(message["content"])} for message in messages]
        if not any(part["type"] != "text" for message in written for part in message["content"]):
            kinds = ["image"] * len(self.images) + ["audio"] * len(self.sounds)
            words = written[-1]["content"] or _parts(f"Describe this {kinds[0]}." if kinds else "")
            written[-1] = {**written[-1], "content": [*({"type": kind} for kind in kinds), *words]}
        return tuple(written)


def _parts(content: Any) -> list[Mapping[str, Any]]:
    return content if isinstance(content, list) else [{"type": "text", "text": content}] if content else []


@dataclass(frozen=True, kw_only=True)
class ModelInputs:
    """A model's inputs, with the tools for reading its output.

    Attributes:
        tensors: the tensors by the names of the model's arguments.
        tokenizer: the tokenizer; `None` if there is none.
        encoding: the encoding of `text`, with the characters of each token.
        text: the text that was encoded.
        goes_on: whether generated text continues the prompt rather than answering it.
    """

    tensors: Mapping[str, torch.Tensor]
    tokenizer: Any = None
    encoding: Any = None
    text: str = ""
    goes_on: bool = False

    @property
    def prompt_tokens(self) -> int:
        """The number of tokens of each text; 0 if there is none."""
        return self.tensors["input_ids"].shape[-1] if "input_ids" in self.tensors else 0


def require_fit(model_class: Any, given: UserInput) -> None:
    """Check that a model takes the user's input.

    Raises:
        RunnerError: if it does not, or also needs something else.
    """
    name, main = model_class.__name__, model_class.main_input_name
    for what, names, is_given in (
        ("image", IMAGE_INPUTS, bool(given.images)),
        ("audio", SOUND_INPUTS, bool(given.sounds)),
    ):
        if is_given and not _takes(model_class, names):
            takes = ", ".join(
                f"`{name}`" for name in (*TEXT_INPUTS, *IMAGE_INPUTS, *SOUND_INPUTS) if _takes(model_class, (name,))
            )
            raise RunnerError(
                "unfit-input", f"{name} takes {takes or f'`{main}`'}, and no {what}", f"leave `--{what}` out"
            )
        if main in names and not is_given:
            raise RunnerError(
                "no-text-input",
                f"{name} takes `{main}`, for which a prompt is not an input",
                f"`devmap run` gives it one by `--{what} FILE`; {USE_PYTHON}",
            )
    if main not in (*TEXT_INPUTS, *IMAGE_INPUTS, *SOUND_INPUTS):
        raise RunnerError("no-text-input", f"{name} takes `{main}`, for which a prompt is not an input", USE_PYTHON)
    if given.messages and not model_class.can_generate():
        raise RunnerError("unfit-input", f"{name} writes no text, and so does not chat", "leave `--chat` out")


def takes_text(model_class: Any) -> bool:
    """Return whether the main input of a model is the tokens of a text."""
    return (
        model_class.main_input_name == "input_ids" and "input_ids" in inspect.signature(model_class.forward).parameters
    )


def takes_images(model_class: Any) -> bool:
    """Return whether a model takes images."""
    return _takes(model_class, IMAGE_INPUTS)


def takes_sound(model_class: Any) -> bool:
    """Return whether a model takes sound."""
    return _takes(model_class, SOUND_INPUTS)


def _takes(model_class: Any, names: tuple[str, ...]) -> bool:
    arguments = inspect.signature(model_class.forward).parameters
    return model_class.main_input_name in names or any(name in arguments for name in names)


@dataclass(frozen=True, kw_only=True)
class MadeUp:
    """Tokens in place of texts: the number of texts, and of tokens in each; `besides` names other content of each."""

    batch_size: int = 1
    length: int = MADE_UP_LENGTH
    besides: WorkloadShape | None = None


ONE_TEXT = MadeUp()


def made_up_inputs(model: PreTrainedModel, made_up: MadeUp) -> ModelInputs:
    """Return made-up tokens in place of text, for a model without a tokenizer."""
    import torch

    if made_up.besides is not None:
        return _made_up_media(model, made_up, made_up.besides)
    tokens = torch.arange(1, made_up.batch_size * made_up.length + 1) % model.config.get_text_config().vocab_size
    # All texts are different, because equal ones would use the same experts.
    tensors = {"input_ids": tokens.reshape(made_up.batch_size, made_up.length)}
    if _takes(type(model), ("attention_mask",)):
        tensors["attention_mask"] = torch.ones_like(tensors["input_ids"])
    return ModelInputs(tensors=tensors, goes_on=True)


def _made_up_media(model: PreTrainedModel, made_up: MadeUp, workload: WorkloadShape) -> ModelInputs:
    """Return prompts of made-up tokens with random images and sound, in the shapes that the plan was measured with."""
    import torch

    from devmap_config.graph.forwards import Forwards

    workload = replace(workload, batch_size=made_up.batch_size)
    with torch.device(_device_of_tokens(model)):
        given = Forwards(model, workload, _planned_media(model, workload)).prefill_inputs(made_up.length)
    tensors = {name: value for name, value in given.items() if isinstance(value, torch.Tensor)}
    if not model.config.is_encoder_decoder:
        tensors.pop("decoder_input_ids", None)  # for models whose decoder may be of either kind (BLIP-2)
    noise = {name: torch.rand_like(value) for name, value in tensors.items() if value.is_floating_point()}
    return ModelInputs(tensors=tensors | noise, goes_on=True)


def planned_numbers(model: PreTrainedModel, workload: WorkloadShape) -> int:
    """Return the number of elements of the images and the sound of one sequence, in the measurement of the plan."""
    return sum(_numbers(media.tensors) for media in _planned_media(model, replace(workload, batch_size=1)))


def numbers_of_media(inputs: ModelInputs) -> int:
    """Return the number of elements of the images and the sound among a model's inputs."""
    return _numbers(inputs.tensors)


def _numbers(tensors: Mapping[str, Any]) -> int:
    return sum(tensor.numel() for tensor in tensors.values() if hasattr(tensor, "numel") and tensor.is_floating_point())


def _planned_media(model: PreTrainedModel, workload: WorkloadShape) -> tuple[Media, ...]:
    """Return the images and sound that a plan was measured with, for a loaded model."""
    import torch

    from devmap_config.graph.features import media_of

    with torch.device(_device_of_tokens(model)):  # features are computed without the model's own hooks
        return media_of(model, workload)


def text_inputs(model_class: Any, tokenizer: Any, given: UserInput, *, max_tokens: int | None = None) -> ModelInputs:
    """Return the inputs for a chat, or for text, which is cut to `max_tokens`.

    Raises:
        RunnerError: if there is no chat template, no mask to fill, or no text to answer a question from.
    """
    if given.messages:
        return _chat_inputs(tokenizer, given)
    text, pair = given.prompt or PROMPT, None
    name = model_class.__name__
    if name.endswith("ForMaskedLM"):
        text = _masked(given.prompt or f"{PROMPT} {MASK}", tokenizer)
    elif name.endswith("ForQuestionAnswering"):
        text, _, pair = text.partition("\n")
        if not pair.strip():
            help = "write the question in the prompt's first line, and the text that answers it below"
            raise RunnerError("unfit-input", "there is no text to answer the question by", help)
    ends = {"truncation": True, "max_length": max_tokens} if max_tokens else {}
    encoding = _encoded(tokenizer, text, pair, **ends)
    return ModelInputs(
        tensors=_taken(model_class, encoding), tokenizer=tokenizer, encoding=encoding, text=text, goes_on=True
    )


def _encoded(tokenizer: Any, *texts: str | None, **options: Any) -> Any:
    try:
        with panics_raised():
            return tokenizer(*texts, return_tensors="pt", **options)
    except Exception as error:  # unchecked values in its files may raise anything
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise RunnerError("unfit-input", f"the tokenizer takes no text: {reason}", USE_PYTHON) from error


def _masked(prompt: str, tokenizer: Any) -> str:
    """Return a prompt with the tokenizer's own mask."""
    mask = tokenizer.mask_token
    if mask is None:
        raise RunnerError("unfit-input", "the tokenizer has no mask that could be filled", USE_PYTHON)
    text = prompt.replace(MASK, mask)
    if mask not in text:
        raise RunnerError(
            "unfit-input", "the prompt has no mask to fill", f"write `{MASK}` where a word is to be found"
        )
    return text


def require_chat_template(tokenizer: Any) -> None:
    """Check that a tokenizer, or a processor, has a chat template.

    Raises:
        RunnerError: if it does not.
    """
    if not getattr(tokenizer, "chat_template", None):
        what = "the checkpoint has no tokenizer" if tokenizer is None else "the checkpoint has no chat template"
        raise RunnerError("no-chat-template", f"{what}: it was not made to chat", "leave `--chat` out")


def _chat_inputs(tokenizer: Any, given: UserInput) -> ModelInputs:
    text, user_text = _chat_text(tokenizer, given.messages), str(given.text).strip()
    if user_text not in text and user_text in (of_parts := _chat_text(tokenizer, given.in_parts)):
        text = of_parts  # templates for images ignore content that is not in parts (LLaVA)
    encoding = _encoded(tokenizer, text, add_special_tokens=False)
    return ModelInputs(tensors=_without_types(encoding), tokenizer=tokenizer)


def _chat_text(writer: Any, messages: Sequence[Mapping[str, Any]]) -> str:
    try:
        return chat_text(writer, messages)
    except TemplateFailedError as error:
        message = f"the model's chat template refuses this: {error}"
        raise RunnerError("no-chat-template", message, "leave `--chat` out") from error


def _taken(model_class: Any, encoding: Mapping[str, Any]) -> dict[str, Any]:
    """Return the tensors that a model takes, including token types, which tell two texts apart."""
    arguments = inspect.signature(model_class.forward).parameters
    if model_class.can_generate() or "token_type_ids" not in arguments:
        return _without_types(encoding)
    return dict(encoding)


def _without_types(encoding: Mapping[str, Any]) -> dict[str, Any]:
    return {name: tensor for name, tensor in encoding.items() if name != "token_type_ids"}


def media_inputs(model_class: Any, processor: Any, tokenizer: Any, given: UserInput) -> ModelInputs:
    """Return the inputs for images or sound, and for the text that goes with them.

    Raises:
        RunnerError: if the processor does not take the input.
    """
    parts: dict[str, Any] = {}
    if given.images:
        parts["images"] = _one_or_many(given.images)
    if given.sounds:
        rate = getattr(getattr(processor, "feature_extractor", processor), "sampling_rate", given.sounds[0].rate)
        parts |= {"audio": _one_or_many([sound.at(rate) for sound in given.sounds]), "sampling_rate": rate}
    if (own := getattr(processor, "tokenizer", None)) is not None:
        tokenizer = own
        parts |= _text_part(processor, given)
    elif "audio" in parts:
        parts["raw_speech"] = parts.pop("audio")  # the name that a feature extractor uses
    try:
        with panics_raised():
            encoding = processor(**parts, return_tensors="pt")
    except Exception as error:  # a processor may raise anything
        message = f"{type(processor).__name__} cannot take this: {type(error).__name__}: {first_line(error)}"
        raise RunnerError("unfit-input", message, USE_PYTHON) from error
    # For some models, token types mark the tokens that stand for images (Gemma 3).
    is_typed = "token_type_ids" in inspect.signature(model_class.forward).parameters
    return ModelInputs(tensors=dict(encoding) if is_typed else _without_types(encoding), tokenizer=tokenizer)


def _one_or_many(things: Sequence[Any]) -> Any:
    return things[0] if len(things) == 1 else list(things)


def _text_part(processor: Any, given: UserInput) -> dict[str, Any]:
    """Return the text with the images or sound, by the chat template if there is one, which decides their place."""
    token = getattr(processor, "image_token" if given.images else "audio_token", None)
    if getattr(processor, "chat_template", None):
        text = _chat_text(processor, given.in_parts)
        begins = processor.tokenizer.bos_token
        return {"text": text, **({"add_special_tokens": False} if begins and text.startswith(begins) else {})}
    if given.messages:
        require_chat_template(processor)
    if token is None:
        return {} if given.prompt is None else {"text": given.prompt}
    return {"text": given.prompt if given.prompt and token in given.prompt else f"{token}{given.prompt or ''}"}


def placed(inputs: ModelInputs, model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Return the tensors on the device that takes them, with floating-point ones in the model's dtype."""
    device = _device_of_tokens(model)
    return {
        name: tensor.to(device, model.dtype) if tensor.is_floating_point() else tensor.to(device)
        for name, tensor in inputs.tensors.items()
        if hasattr(tensor, "is_floating_point")
    }


def _device_of_tokens(model: PreTrainedModel) -> Any:
    """Return the device of the embeddings, which a model's own code need not identify."""
    try:
        hooks = hooks_of(model.get_input_embeddings())
    except NotImplementedError:
        hooks = hooks_of(model)
    devices = (getattr(hook, "execution_device", None) for hook in hooks)
    return next((device for device in devices if device is not None), model.device)
