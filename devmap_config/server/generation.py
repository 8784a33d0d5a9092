"""Writes texts with a loaded model: one after another, each token by token, until it ends or nobody waits for it."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from math import ceil
from time import perf_counter
from typing import TYPE_CHECKING, Any, Literal

from devmap_config.runner.context import PlannedContext
from devmap_config.runner.demonstration import require_fit_class, running
from devmap_config.runner.inputs import UserInput, placed, require_chat_template, text_inputs
from devmap_config.runner.loading import RunnerError, first_line
from devmap_config.runner.text_stream import TextStream
from devmap_config.runner.tokenizers import load_tokenizer
from devmap_config.server.requests import RequestError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from concurrent.futures import Future

    import torch
    from transformers import PreTrainedModel

    from devmap_config.diagnostics.diagnostic import Sink
    from devmap_config.runner.inputs import ModelInputs
    from devmap_config.runner.loading import LoadRequest
    from devmap_config.server.media import MediaReader
    from devmap_config.server.requests import GenerationRequest

MANY_TOKENS = 256
"""The tokens of an answer if neither the request nor the plan limits them."""

COLDEST = 0.01
"""Below this temperature the likeliest token is taken: what is divided by less may be too large for a number."""

STOPPED = "the server was told to stop"


class UntilStop:
    """Hands on text up to the first of some words, and holds back what may be the beginning of one."""

    def __init__(self, stops: list[str], hand_on: Callable[[str], None]) -> None:
        self._stops = stops
        self._hand_on = hand_on
        self._held = ""
        self.is_over = False

    def write(self, text: str) -> None:
        """Take text of which more may come."""
        if self.is_over:
            return
        self._held += text
        found = [place for stop in self._stops if (place := self._held.find(stop)) >= 0]
        self.is_over = bool(found)
        self._hand_out(min(found, default=len(self._held) - max(map(self._begun, self._stops), default=0)))

    def end(self) -> None:
        """Hand on what was held back."""
        if not self.is_over:
            self._hand_out(len(self._held))

    def _begun(self, stop: str) -> int:
        """Return with how many of a word's first characters the text ends."""
        return next((size for size in range(len(stop) - 1, 0, -1) if self._held.endswith(stop[:size])), 0)

    def _hand_out(self, size: int) -> None:
        if size:
            self._hand_on(self._held[:size])
            self._held = self._held[size:]


class Text:
    """A text that is written for a client: its pieces come as they are known.

    Attributes:
        prompt_tokens: how many tokens it goes on from, or answers.
        tokens: how many were written.
        finish_reason: whether it came to its end, or to so many tokens as were asked for; once it is written.
        seconds: how long that took.
    """

    def __init__(self, asked: GenerationRequest, inputs: ModelInputs, max_tokens: int) -> None:
        self.prompt_tokens = inputs.prompt_tokens
        self.tokens = 0
        self.finish_reason: Literal["stop", "length"] = "stop"
        self.seconds = 0.0
        self._asked, self._inputs, self._max_tokens = asked, inputs, max_tokens
        self._pieces: asyncio.Queue[str | None] = asyncio.Queue()
        self._is_unwanted = self._is_cut = False
        self._future: Future[None]

    def begin(self, model: PreTrainedModel, threads: ThreadPoolExecutor, done: Callable[[], None]) -> None:
        """Have it written by one of the threads, once one is free; call `done` when that is over."""
        loop = asyncio.get_running_loop()

        def in_loop(function: Callable[..., None], *arguments: Any) -> None:
            with suppress(RuntimeError):  # the server has ended meanwhile
                loop.call_soon_threadsafe(function, *arguments)

        def end(_future: Future[None]) -> None:
            in_loop(done)
            in_loop(self._pieces.put_nowait, None)

        self._future = threads.submit(self._write, model, lambda piece: in_loop(self._pieces.put_nowait, piece))
        self._future.add_done_callback(end)

    async def pieces(self) -> AsyncIterator[str]:
        """Yield the text piece by piece.

        Raises:
            RequestError: if the model does not run, or the text is cut.
        """
        while (piece := await self._pieces.get()) is not None:
            yield piece
        self._future.result()

    def discard(self) -> None:
        """Write no more of it than the token that is being made: nobody waits for it."""
        self._is_unwanted = True
        self._future.cancel()

    def cut(self) -> None:
        """Write no more of it, and tell whoever waits for it that it has no end."""
        self._is_unwanted = self._is_cut = True

    def _write(self, model: PreTrainedModel, hand_on: Callable[[str], None]) -> None:
        import torch

        self._require_whole()
        start_seconds = perf_counter()
        until_stop = UntilStop(self._asked.stop, hand_on)
        is_apart = model.config.is_encoder_decoder
        stream = TextStream(
            self._inputs.tokenizer,
            until_stop.write,
            shows_prompt=False,
            goes_on=self._inputs.goes_on and not is_apart,
        )
        prompt = self._inputs.tensors["input_ids"][0]
        stream.put(prompt)
        begin = 1 if is_apart else len(prompt)

        def is_over(input_ids: torch.Tensor, _scores: Any, **_options: Any) -> torch.Tensor:
            stream.put(input_ids[0, begin + self.tokens :])
            self.tokens = input_ids.shape[1] - begin
            over = until_stop.is_over or self._is_unwanted
            return torch.full((1,), over, dtype=torch.bool, device=input_ids.device)

        torch.manual_seed(torch.seed() if self._asked.seed is None else self._asked.seed)
        try:
            tokens = model.generate(
                **placed(self._inputs, model),
                **_sampling(self._asked, model),
                max_new_tokens=self._max_tokens,
                num_beams=1,
                tokenizer=self._inputs.tokenizer,  # for words by which a model's generation config ends texts
                stopping_criteria=[is_over],
            )
        except Exception as error:  # what a model's own code raises, or a device of which the memory is full
            message = f"the model does not run: {type(error).__name__}: {first_line(error)}"
            raise RequestError(message, status=500) from error
        finally:
            self.seconds = perf_counter() - start_seconds
        self._require_whole()
        stream.flush()
        until_stop.end()
        if self.tokens == self._max_tokens and not until_stop.is_over and int(tokens[0, -1]) not in _ends(model):
            self.finish_reason = "length"

    def _require_whole(self) -> None:
        if self._is_cut:
            raise RequestError(STOPPED, status=503)


def _ends(model: PreTrainedModel) -> list[int]:
    """Return the tokens that end a text."""
    ends = model.generation_config.eos_token_id
    return ends if isinstance(ends, list) else [ends]


def _sampling(asked: GenerationRequest, model: PreTrainedModel) -> dict[str, Any]:
    """Return how tokens are chosen: as is asked for, else as the model's generation config says."""
    if asked.temperature is not None and asked.temperature < COLDEST:
        return {"do_sample": False}
    given = {name: value for name in ("temperature", "top_p") if (value := getattr(asked, name)) is not None}
    # transformers would else choose among the 50 likeliest, which nobody asked for.
    return {"do_sample": True, "top_k": model.generation_config.top_k or 0, **given} if given else {}


class Writer:
    """Writes texts one after another; so many may wait besides.

    Weights that are streamed are brought in for one forward at a time, so no two run at once. Where no context is
    planned, it ends where the model's does.

    Attributes:
        media: makes inputs of requests with images or sound.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: Any, media: MediaReader, planned: PlannedContext, *, queue_length: int
    ) -> None:
        end = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
        self._context = planned if planned.tokens else PlannedContext(tokens=end, prompt_tokens=end)
        self._default_tokens = planned.tokens or MANY_TOKENS
        self._model = model
        self._tokenizer = tokenizer
        self.media = media
        self._queue_length = queue_length
        self._texts: list[Text] = []
        self._is_cut = False
        self._last_seconds = 0.0
        self._reader, self._writer = ThreadPoolExecutor(1), ThreadPoolExecutor(1)

    @property
    def waiting(self) -> int:
        """The number of texts that wait."""
        return max(len(self._texts) - 1, 0)

    async def begin(self, asked: GenerationRequest) -> Text:
        """Return a text that is being written, or waits for those before it.

        Raises:
            RequestError: if the model cannot be given this, the plan has no room for it, or too many wait.
        """
        self._require_place()  # before work is done for it
        loop = asyncio.get_running_loop()
        try:
            text = await loop.run_in_executor(self._reader, self._read, asked)
        except RunnerError as error:
            code = "context_length_exceeded" if error.code == "beyond-context" else error.code
            raise RequestError(str(error), param=asked.given_by, code=code) from error
        self._require_place()
        self._texts.append(text)
        text.begin(self._model, self._writer, lambda: self._finish(text))
        return text

    def cut(self) -> None:
        """Write no text to its end, and begin none."""
        self._is_cut = True
        for text in tuple(self._texts):
            text.cut()

    def close(self) -> None:
        """Write nothing more; wait for the token that is being made."""
        self._reader.shutdown(cancel_futures=True)
        self._writer.shutdown(cancel_futures=True)

    def _read(self, asked: GenerationRequest) -> Text:
        inputs = self._inputs(asked)
        if not inputs.prompt_tokens:
            raise RunnerError("unfit-input", "the prompt has no tokens")
        default = asked.default_tokens or self._default_tokens
        return Text(
            asked, inputs, self._context.new_tokens(inputs.prompt_tokens, wanted=asked.most_tokens, default=default)
        )

    def _inputs(self, asked: GenerationRequest) -> ModelInputs:
        given, model_class = asked.given, type(self._model)
        for text in asked.texts:
            self.media.require_text(text)
        if asked.images or asked.sounds:
            return self.media.inputs(asked, model_class, self._tokenizer)
        if given.messages:
            require_chat_template(self._tokenizer)
        return text_inputs(model_class, self._tokenizer, given)

    def _require_place(self) -> None:
        if self._is_cut:
            raise RequestError(STOPPED, status=503)
        if len(self._texts) > self._queue_length:
            raise RequestError(
                f"one request is answered at a time, and {self._queue_length} wait already",
                status=429,
                code="rate_limit_exceeded",
                headers={"Retry-After": str(max(ceil(self._last_seconds), 1))},
            )

    def _finish(self, text: Text) -> None:
        self._texts.remove(text)
        self._last_seconds = text.seconds


def writing_tokenizer(request: LoadRequest, sink: Sink) -> Any:
    """Return the tokenizer of a model that is to be loaded and writes text.

    Raises:
        RunnerError: if it writes none, or has no tokenizer.
    """
    model_class = require_fit_class(request, UserInput())
    if model_class is not None:
        require_writes(model_class)
    with running(request):
        tokenizer = load_tokenizer(request, sink)
    if tokenizer is None:
        raise RunnerError(
            "no-tokenizer", "there is no tokenizer to make text of tokens with", "put its files into the model's folder"
        )
    return tokenizer


def require_writes(model_class: Any) -> None:
    """Check that a model writes text.

    Raises:
        RunnerError: if it does not.
    """
    if not model_class.can_generate():
        raise RunnerError(
            "unfit-input", f"{model_class.__name__} writes no text to serve", "`devmap run` shows what it gives"
        )
