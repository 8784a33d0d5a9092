"""Finds the processor for a model's images and sound in its checkpoint."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from devmap_config.graph.remote_code import READ_IT_FIRST
from devmap_config.runner.loading import RunnerError, first_line

if TYPE_CHECKING:
    from devmap_config.runner.loading import LoadRequest


def load_processor(request: LoadRequest, *, of_images: bool, with_text: bool) -> Any:
    """Return the checkpoint's processor for images or sound or, if there is none, its image processor or feature
    extractor.

    Args:
        request: the checkpoint.
        of_images: whether it must take images, rather than sound.
        with_text: whether it must combine them with text, which only a whole processor does.

    Raises:
        RunnerError: if the checkpoint has none that can be used.
    """
    from transformers import AutoFeatureExtractor, AutoImageProcessor, AutoProcessor, PreTrainedTokenizerBase

    errors: list[Exception] = []
    for loader in (AutoProcessor, AutoImageProcessor if of_images else AutoFeatureExtractor):
        try:
            processor = loader.from_pretrained(
                request.weights, revision=request.revision, trust_remote_code=request.trust_remote_code
            )
        except Exception as error:  # a processor's own code may raise anything
            errors.append(error)
            continue
        if not isinstance(processor, PreTrainedTokenizerBase) and (
            getattr(processor, "tokenizer", None) is not None or not with_text
        ):
            return processor
    said = " ".join(map(str, errors))
    if not request.trust_remote_code and ("trust_remote_code" in said or "not allowed to run" in said):
        message = "the processor is code that comes with the model, which was not run"
        raise RunnerError("remote-code", message, READ_IT_FIRST)
    # The error of the whole processor says more than that of a part, which a text may also need.
    why = f": {type(errors[0]).__name__}: {first_line(errors[0])}" if errors else ", but for a part of one"
    raise RunnerError(
        "no-processor",
        f"the checkpoint has no processor that makes inputs of images or sound{why}",
        "see that the checkpoint has all of its processor's files, and what these need is installed",
    )
