"""Controls code that comes with a model: it runs only if allowed, and nothing ever prompts for permission."""

from __future__ import annotations

import sys
from contextlib import contextmanager, redirect_stdout
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

from devmap_config.libraries.messages import take_down_from_here, without_retries
from devmap_config.libraries.private import Private

if TYPE_CHECKING:
    from collections.abc import Iterator

TIME_TO_ANSWER = Private(
    "transformers.dynamic_module_utils.TIME_OUT_REMOTE_CODE",
    "the seconds that transformers waits for an answer when it asks whether a model's code may run; at 0 it "
    "raises an error instead of asking",
)
IMPORT_CLASS = Private(
    "transformers.dynamic_module_utils.get_class_in_module",
    "imports a model's own code; the last call before that code runs",
)
DYNAMIC_CLASS = Private(
    "transformers.dynamic_module_utils.get_class_from_dynamic_module",
    "returns the class that a model's own code defines",
    takes=("revision",),
)
ADD_GENERATE = Private(
    "transformers.models.auto.auto_factory.add_generation_mixin_to_remote_model",
    "adds `generate` to model classes written before 2024, which expect to inherit it from `PreTrainedModel`",
)
TOKENIZER_CONFIG = Private(
    "transformers.models.auto.tokenization_auto.get_tokenizer_config",
    "reads a tokenizer's config without running its code",
)


@contextmanager
def code_of_models(*, allowed: bool) -> Iterator[None]:
    """Let code that comes with a model run only if it is `allowed`, and prevent prompts on standard input.

    transformers prompts if `trust_remote_code` was not passed, as for inner models; this answers for them, too. Output
    of the libraries and the model's code goes to stderr, because stdout is for results; the hub client's messages about
    retries are silenced.
    """
    TIME_TO_ANSWER.find()
    IMPORT_CLASS.find()
    from transformers import dynamic_module_utils

    take_down_from_here()
    with patch.object(sys, "stdin", None), redirect_stdout(sys.stderr), without_retries():
        if allowed:
            with patch.object(dynamic_module_utils, "input", lambda _question: "y", create=True):
                yield
        else:
            with (
                patch.object(dynamic_module_utils, TIME_TO_ANSWER.attribute, 0),
                patch.object(dynamic_module_utils, IMPORT_CLASS.attribute, _refuse),
            ):
                yield


def _refuse(*_arguments: Any, **_options: Any) -> Any:
    raise ValueError("code that comes with the model is not allowed to run")


def class_from_code(reference: str, location: str, revision: str | None) -> Any:
    """Return the class that an `auto_map` refers to, from its folder or repository; this runs its code."""
    return ADD_GENERATE.find()(DYNAMIC_CLASS.find()(reference, location, revision=revision))


def tokenizer_config(location: str, revision: str | None) -> dict[str, Any]:
    """Return the config of a tokenizer; empty if there is none, or it is invalid."""
    config = TOKENIZER_CONFIG.find()(location, revision=revision)
    return config if isinstance(config, dict) else {}
