"""Shows the output of a loaded model: text, labels, embeddings, or else the shapes of its output."""

from __future__ import annotations

import time
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from devmap_config.graph.costs import LEAST_WORDS
from devmap_config.libraries.panics import panics_raised
from devmap_config.libraries.remote_code import code_of_models
from devmap_config.runner.caches import cache_arguments
from devmap_config.runner.context import (
    PlannedContext,
    planned_media,
    require_room_for_inputs,
    require_room_for_media,
    require_room_for_sound,
)
from devmap_config.runner.generation_times import GenerationWorkload, ignore_stop_strings, measure_generation
from devmap_config.runner.heads import Output, output_of
from devmap_config.runner.inputs import (
    MADE_UP_LENGTH,
    ONE_TEXT,
    PROMPT,
    USE_PYTHON,
    MadeUp,
    UserInput,
    made_up_inputs,
    media_inputs,
    placed,
    planned_numbers,
    require_chat_template,
    require_fit,
    takes_text,
    text_inputs,
)
from devmap_config.runner.loading import RunnerError, first_line, telling_of_changes
from devmap_config.runner.processors import load_processor
from devmap_config.runner.sentence_encoder import sentence_encoder
from devmap_config.runner.text_stream import TextStream
from devmap_config.runner.tokenizers import load_tokenizer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from transformers import PreTrainedModel

    from devmap_config.diagnostics.diagnostic import Sink
    from devmap_config.graph.costs import Measurement, WorkloadShape
    from devmap_config.profile.schema import Workload
    from devmap_config.runner.generation_times import GenerationTimes
    from devmap_config.runner.inputs import ModelInputs
    from devmap_config.runner.loading import LoadRequest
    from devmap_config.runner.sentence_encoder import SentenceEncoder
    from devmap_config.runner.text_stream import Speed

    Write = Callable[[str], None]

FEW_TOKENS, MANY_TOKENS = 24, 256
"""The default number of generated tokens: for continuing a text, and for an answer."""


@dataclass(frozen=True, kw_only=True)
class Demonstration:
    """The output of a model, and the seconds that it took; `speed` is that of generated text."""

    output: Output
    seconds: float
    speed: Speed | None = None


@dataclass(frozen=True, kw_only=True)
class Demonstrator:
    """Makes inputs from text, images and sound with a checkpoint's tokenizer and processor; created before the model is
    loaded.

    Attributes:
        processor: transformers' processor; `None` if only text is given.
        tokenizer: the tokenizer; `None` if none can be used, so that the tokens of `made_up` replace text.
        context: the tokens that the plan has room for.
        planned: the workload whose images and sound are the most that it has room for; `None` if that is not known.
        writes_all: generate as much as allowed, ignoring end tokens, as with random weights.
    """

    request: LoadRequest
    sink: Sink
    tokenizer: Any
    context: PlannedContext
    planned: WorkloadShape | None = None
    processor: Any = None
    max_new_tokens: int | None = None
    made_up: MadeUp = ONE_TEXT
    writes_all: bool = False

    def show(self, model: PreTrainedModel, given: UserInput, write: Write) -> Demonstration:
        """Return the model's output for an input, and pass text to `write` as it is generated.

        Raises:
            RunnerError: if the model takes other inputs, or does not run.
        """
        if self.made_up.besides is None:
            require_fit(type(model), given)
        with running(self.request):
            encoder = None if model.can_generate() or given.has_media else sentence_encoder(self.request, self.sink)
            with _failures_told():
                inputs = self._inputs(model, given, encoder)
                if model.can_generate():
                    return self._written(model, inputs, write)
                self.context.require_room(inputs.prompt_tokens)
                start_seconds = time.perf_counter()
                output = _read(model, inputs, encoder)
                seconds = time.perf_counter() - start_seconds
        write(output.text)
        return Demonstration(output=output, seconds=seconds)

    def new_tokens(self, inputs: ModelInputs) -> int:
        """Return the number of tokens to generate after inputs.

        Raises:
            RunnerError: if the plan has no room for them.
        """
        default = FEW_TOKENS if inputs.goes_on else MANY_TOKENS
        return self.context.new_tokens(inputs.prompt_tokens, wanted=self.max_new_tokens, default=default)

    def _inputs(self, model: PreTrainedModel, given: UserInput, encoder: SentenceEncoder | None) -> ModelInputs:
        if given.has_media:
            inputs = media_inputs(type(model), self.processor, self.tokenizer, given)
            if self.planned is not None:
                require_room_for_inputs(planned_numbers(model, self.planned), inputs)
            return inputs
        if self.tokenizer is None and not given.messages:
            return made_up_inputs(model, self.made_up)
        if encoder is not None:
            given = replace(given, prompt=encoder.prepared(given.prompt or PROMPT))
        max_tokens = None if encoder is None else encoder.max_tokens
        return text_inputs(type(model), self.tokenizer, given, max_tokens=max_tokens)

    def _written(self, model: PreTrainedModel, inputs: ModelInputs, write: Write) -> Demonstration:
        is_apart = model.config.is_encoder_decoder
        count = self.new_tokens(inputs)
        shows_prompt = inputs.tokenizer is None or (inputs.goes_on and not is_apart)
        stream = TextStream(inputs.tokenizer, write, shows_prompt=shows_prompt)
        # transformers does not stream beams: the best one is known only at the end.
        streams = (model.generation_config.num_beams or 1) == 1
        if inputs.tokenizer is None:
            ignore_stop_strings(model)
        tokens = model.generate(
            **placed(inputs, model),
            max_new_tokens=count,
            do_sample=False,
            **({"min_new_tokens": count} if self.writes_all else {}),
            **({"streamer": stream} if streams else {}),
            **({"tokenizer": inputs.tokenizer} if model.generation_config.stop_strings else {}),
        )
        if not streams:
            prompt_length = 1 if is_apart else inputs.tensors["input_ids"].shape[1]
            stream.put(tokens[0, :prompt_length])
            stream.put(tokens[0, prompt_length:])
            stream.end()
        speed = stream.speed(sees_each=streams)
        return Demonstration(output=Output(stream.text, stream.text), seconds=speed.seconds, speed=speed)


def _read(model: PreTrainedModel, inputs: ModelInputs, encoder: SentenceEncoder | None) -> Output:
    tensors = placed(inputs, model)
    forward = model(**tensors)
    if encoder is not None and "last_hidden_state" in forward and "attention_mask" in tensors:
        return encoder.embedding(forward.last_hidden_state, tensors["attention_mask"])
    return output_of(model, forward, inputs)


@contextmanager
def running(request: LoadRequest) -> Iterator[None]:
    """Let a model run while the context lasts, including code that comes with it if that is allowed."""
    import torch

    changes = telling_of_changes("what the model does with a prompt cannot be shown")
    with changes, torch.no_grad(), code_of_models(allowed=request.trust_remote_code):
        yield


@contextmanager
def _failures_told() -> Iterator[None]:
    """Turn errors of a model's own code, or of what its generation config requests, into `RunnerError`."""
    try:
        with panics_raised():
            yield
    except RunnerError:
        raise
    except Exception as error:
        raise RunnerError(
            "forward-failed",
            f"the model is loaded and verified, and does not run: {type(error).__name__}: {first_line(error)}",
            USE_PYTHON,
        ) from error


def measured_generation(
    model: PreTrainedModel,
    request: LoadRequest,
    workload: GenerationWorkload,
    *,
    rounds: int = 1,
    least_seconds: float = 0,
) -> GenerationTimes:
    """Return the times of a loaded model for a generation, like `measure_generation`.

    Raises:
        RunnerError: if the model takes no tokens, or does not run.
    """
    if workload.prompts.besides is None:
        require_fit(type(model), UserInput())
    with running(request), _failures_told():
        return measure_generation(model, workload, rounds=rounds, least_seconds=least_seconds)


def numbers_planned(model: PreTrainedModel, request: LoadRequest, workload: WorkloadShape) -> int:
    """Return the number of elements of a sequence's images and sound in the measurement of a loaded model's plan.

    Raises:
        RunnerError: if the model does not run.
    """
    with running(request), _failures_told():
        return planned_numbers(model, workload)


def demonstrator(
    request: LoadRequest,
    workload: Workload,
    measurement: Measurement | None,
    given: UserInput,
    sink: Sink,
    *,
    max_new_tokens: int | None = None,
) -> Demonstrator:
    """Return the demonstrator of a model that is about to be loaded, after checking that it takes the input.

    Raises:
        RunnerError: if it does not, the plan has no room for the input, or the checkpoint has nothing to make it with.
    """
    model_class = require_fit_class(request, given)
    planned = planned_media(measurement, model_class)
    if planned is not None:
        require_room_for_media(planned, images=len(given.images), sounds=len(given.sounds))
        for sound in given.sounds:
            require_room_for_sound(planned, sound)
    with running(request):
        tokenizer = load_tokenizer(request, sink)
        processor = None
        if given.has_media:
            with_text = model_class is not None and takes_text(model_class)
            processor = load_processor(request, of_images=bool(given.images), with_text=with_text)
    if given.messages and not given.has_media:
        require_chat_template(tokenizer)
    is_told = any(finding.code in ("no-tokenizer", "remote-code") for finding in sink)
    if tokenizer is None and given.prompt is not None and not given.has_media and not is_told:
        sink.warning(
            "no-tokenizer",
            "there is no tokenizer, so the prompt is not used: made-up tokens stand in for it",
            help="put the tokenizer's files into the model's folder",
        )
    shows = Demonstrator(
        request=request,
        sink=sink,
        tokenizer=tokenizer,
        context=PlannedContext.of(workload),
        planned=planned,
        processor=processor,
        max_new_tokens=max_new_tokens,
    )
    if tokenizer is not None and not given.has_media and model_class is not None and model_class.can_generate():
        with running(request):  # inputs that are too long are reported before anything is loaded
            shows.new_tokens(text_inputs(model_class, tokenizer, given))
    return shows


def demonstrator_of_plan(
    request: LoadRequest,
    workload: Workload,
    measurement: Measurement | None,
    sink: Sink,
    *,
    max_new_tokens: int | None = None,
) -> Demonstrator:
    """Return a demonstrator that generates as much as the plan has room for, with random weights and made-up inputs.

    The inputs are tokens, and images and sound of random numbers in the shapes of the plan's `measurement`.

    Raises:
        RunnerError: if the model takes no tokens, or the plan has no room for that many.
    """
    planned = planned_generation(workload, max_new_tokens, measurement)
    if planned.prompts.besides is None:
        require_fit_class(request, UserInput())
    warn_of_text_only(measurement, sink)
    return Demonstrator(
        request=request,
        sink=sink,
        tokenizer=None,
        context=PlannedContext.of(workload),
        max_new_tokens=planned.new_tokens,
        made_up=planned.prompts,
        writes_all=True,
    )


def planned_generation(
    workload: Workload, new_tokens: int | None, measurement: Measurement | None = None, *, decodes: bool = True
) -> GenerationWorkload:
    """Return a generation that fills a workload: a made-up prompt and, if the model `decodes`, `new_tokens` after it.

    The made-up tokens include those of the images and the sound that the plan was measured with.

    Raises:
        RunnerError: if the workload has no room for that many.
    """
    context_length = workload.context_length.value or MADE_UP_LENGTH + (new_tokens or FEW_TOKENS)
    media = None if measurement is None else measurement.media
    besides = None if measurement is None or media is None or media.problem is not None else measurement.workload
    least = 1 if besides is None or media is None else media.tokens + LEAST_WORDS
    count = (new_tokens or max(min(FEW_TOKENS, context_length - least), 1)) if decodes else 0
    length = max(min(workload.prompt_length or context_length, context_length - count), 1)
    if decodes:
        PlannedContext.of(workload).new_tokens(length, wanted=count, default=FEW_TOKENS)
    if length < least:
        taken = f"images and sound take {least - LEAST_WORDS:,} tokens"
        message = f"{taken}, and {count:,} are to follow a prompt of {length:,}"
        raise RunnerError("prompt-too-short", message, "have it write fewer tokens, or plan for a longer prompt")
    return GenerationWorkload(
        prompts=MadeUp(batch_size=workload.batch_size, length=length, besides=besides),
        new_tokens=count,
        cache=cache_arguments(workload.cache),
    )


def warn_of_text_only(measurement: Measurement | None, sink: Sink) -> None:
    """Warn if a workload has images or sound, but made-up inputs are only text, because the plan was measured so."""
    media = None if measurement is None else measurement.media
    if media is not None and media.problem is not None:
        sink.warning(
            "untried-inputs",
            f"the model is given text alone: it was not measured with images or sound ({media.reason})",
            help="`devmap run` gives it one with its checkpoint, by `--image` or `--audio`",
        )


def require_fit_class(request: LoadRequest, given: UserInput) -> Any:
    """Return a model's class after checking that it takes the input; `None` if the class is code that is not run yet.

    Raises:
        RunnerError: if it does not.
    """
    import transformers

    model_class = getattr(transformers, request.class_name, None)
    if not hasattr(model_class, "main_input_name"):
        return None
    require_fit(model_class, given)
    return model_class
