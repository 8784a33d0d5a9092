"""Reads requests in OpenAI's format; each field is either obeyed or refused by name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from devmap_config.files import REQUEST, FileError, parse_json
from devmap_config.runner.inputs import UserInput

if TYPE_CHECKING:
    from collections.abc import Mapping

MOST_CONNECTIONS = 512
"""The most connections at once; further ones are answered with 503, as the server is busy."""

NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "logprobs": (False,),
    "presence_penalty": (0, 0.0),
    "frequency_penalty": (0, 0.0),
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "store": (False,),
    "service_tier": ("auto", "default"),
}
"""Fields of unsupported features, with the values that do not request them."""

ABOUT_THE_CLIENT = ("user", "metadata", "safety_identifier", "prompt_cache_key")
"""Fields without an effect on the text."""


class RequestError(Exception):
    """A request is answered with an error.

    Attributes:
        status: the HTTP status.
        param: the wrong field, if there is one.
        code: OpenAI's code of the error.
        headers: the headers of the answer.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code, self.headers = status, param, code, headers

    def to_json(self) -> dict[str, Any]:
        """Return the error in OpenAI's format."""
        kinds = {429: "rate_limit_error", **dict.fromkeys((500, 503), "server_error")}
        kind = kinds.get(self.status, "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


class _Section(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


class StreamOptions(_Section):
    """The options of a stream."""

    include_usage: bool = False
    include_obfuscation: Literal[False] = False


class ImageUrl(_Section):
    """An image, as a `data:` URL."""

    url: str
    detail: Literal["auto"] = "auto"


class InputAudio(_Section):
    """A sound, in base64."""

    data: str
    format: Literal["wav"]


class MessagePart(_Section):
    """A part of a message: a text, an image or a sound."""

    type: Literal["text", "image_url", "input_audio"]
    text: str | None = None
    image_url: ImageUrl | None = None
    input_audio: InputAudio | None = None

    @model_validator(mode="after")
    def _is_of_its_type(self) -> MessagePart:
        for name in ("text", "image_url", "input_audio"):
            if (getattr(self, name) is None) == (name == self.type):
                fault = "is missing" if name == self.type else f"is not for a part of `type: {self.type}`"
                raise PydanticCustomError("unlike_its_type", "`{name}` {fault}", {"name": name, "fault": fault})
        return self

    @property
    def in_template(self) -> dict[str, str]:
        """The part in the form for a chat template; the processor takes the images and sounds."""
        if self.text is not None:
            return {"type": "text", "text": self.text}
        return {"type": "image" if self.image_url is not None else "audio"}


class ChatMessage(_Section):
    """A turn of a chat."""

    role: Literal["system", "user", "assistant"]
    content: tuple[MessagePart, ...]

    @model_validator(mode="after")
    def _is_seen_by_a_user(self) -> ChatMessage:
        if self.role != "user" and any(part.text is None for part in self.content):
            raise PydanticCustomError("unfit_role", "images and sound are for messages of the user")
        return self

    @property
    def in_template(self) -> dict[str, Any]:
        """The message in the form for a chat template; a message of only text is one text."""
        texts = [part.text for part in self.content if part.text is not None]
        if len(texts) == len(self.content):
            return {"role": self.role, "content": "".join(texts)}
        return {"role": self.role, "content": [part.in_template for part in self.content]}


class GenerationRequest(_Section):
    """The fields that both kinds of requests share; if one is `None`, the model's generation config decides."""

    given_by: ClassVar[str]
    """The field with the model's input."""

    default_tokens: ClassVar[int | None] = None
    """The default number of tokens to generate; `None` for as many as there is room for."""

    model: str
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    stop: list[Annotated[str, Field(min_length=1)]] = Field([], max_length=4)
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()

    @property
    def most_tokens(self) -> int | None:
        """The most tokens to generate, or `None`."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def given(self) -> UserInput:
        """The input for the model."""
        raise NotImplementedError

    @property
    def texts(self) -> tuple[str, ...]:
        """The texts of the client, unchanged."""
        raise NotImplementedError

    @property
    def images(self) -> Mapping[str, str]:
        """The URLs of the images, by the place of each."""
        return {}

    @property
    def sounds(self) -> Mapping[str, str]:
        """The sounds in base64, by the place of each."""
        return {}


class Completion(GenerationRequest):
    """A request to continue a text."""

    given_by = "prompt"
    default_tokens = 16  # OpenAI's default
    prompt: str = Field(min_length=1)

    @property
    def given(self) -> UserInput:
        """The input for the model."""
        return UserInput(prompt=self.prompt)

    @property
    def texts(self) -> tuple[str, ...]:
        """The text."""
        return (self.prompt,)


class ChatCompletion(GenerationRequest):
    """A request to answer a chat."""

    given_by = "messages"
    messages: list[ChatMessage] = Field(min_length=1)

    @property
    def given(self) -> UserInput:
        """The input for the model, without images and sounds, which are only read for a model that takes them."""
        return UserInput(messages=tuple(message.in_template for message in self.messages))

    @property
    def texts(self) -> tuple[str, ...]:
        """All texts of the chat."""
        return tuple(part.text for _, part in self._parts if part.text is not None)

    @property
    def images(self) -> Mapping[str, str]:
        """The URLs of the images by the place of each."""
        return {place: part.image_url.url for place, part in self._parts if part.image_url is not None}

    @property
    def sounds(self) -> Mapping[str, str]:
        """The sounds, in base64, by the place of each."""
        return {place: part.input_audio.data for place, part in self._parts if part.input_audio is not None}

    @property
    def _parts(self) -> list[tuple[str, MessagePart]]:
        return [
            (f"messages.{number}.content.{index}", part)
            for number, message in enumerate(self.messages)
            for index, part in enumerate(message.content)
        ]


def asked(kind: type[GenerationRequest], body: bytes) -> GenerationRequest:
    """Return the request in a body.

    Raises:
        RequestError: if it is invalid, or requests an unsupported feature; the error names the field.
    """
    try:
        value = parse_json(body.decode(), REQUEST)
    except UnicodeDecodeError:
        raise RequestError("the body is not UTF-8") from None
    except FileError as error:
        raise RequestError(f"the body {error}") from None
    if not isinstance(value, dict):
        raise RequestError("the body is not a JSON object")
    try:
        return kind.model_validate(_normalized(value))
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        param = ".".join(map(str, first["loc"]))
        known = {"extra_forbidden": "is not supported", "missing": "is missing"}
        problem = known.get(first["type"], f"is wrong: {first['msg']}")
        raise RequestError(f"`{param}` {problem}", param=param) from None


def _normalized(body: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields to read: with texts joined, and without neutral values."""
    fields = {name: value for name, value in body.items() if value is not None and name not in ABOUT_THE_CLIENT}
    for name in fields.keys() & NEUTRAL.keys():
        value = fields.pop(name)
        if not any(type(value) is type(neutral) and value == neutral for neutral in NEUTRAL[name]):
            raise RequestError(f"`{name}` is not supported: leave it out", param=name, code="unsupported_value")
    if isinstance(fields.get("stop"), str):
        fields["stop"] = [fields["stop"]]
    if isinstance(prompt := fields.get("prompt"), list):
        if len(prompt) != 1 or not isinstance(prompt[0], str):
            raise RequestError("`prompt` must be one text: several texts, or tokens, are not supported", param="prompt")
        fields["prompt"] = prompt[0]
    if isinstance(messages := fields.get("messages"), list):
        fields["messages"] = [_in_parts(message) for message in messages]
    return fields


def _in_parts(message: Any) -> Any:
    """Return a message with its content in parts, without null values."""
    if not isinstance(message, dict):
        return message
    message = {name: value for name, value in message.items() if value is not None}
    if isinstance(content := message.get("content"), str):
        message["content"] = ({"type": "text", "text": content},)
    elif isinstance(content, list):
        message["content"] = tuple(content)  # pydantic's strict mode does not accept a list
    return message
