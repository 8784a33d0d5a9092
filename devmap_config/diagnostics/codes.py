"""The registry of diagnostic codes. Each code has a page under `docs/codes/` with its meaning and a remedy.

A diagnostic is added by an entry here, a page, and the call that reports it; CONTRIBUTING.md shows how.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal, get_args

from devmap_config.files import ANYWHERE, PACKAGED, read_text

Severity = Literal["error", "warning"]

AlwaysError = Literal[
    "accelerate-missing",
    "accelerate-too-old",
    "bad-adapter",
    "bad-compute",
    "bad-device-name",
    "bad-group",
    "bad-pattern",
    "bad-quantity",
    "bad-quantization",
    "beyond-context",
    "beyond-vllm",
    "compute-on-cpu",
    "conflicting-pins",
    "decided-argument",
    "dequantized",
    "device-mismatch",
    "device-missing",
    "duplicate-key",
    "empty-pin",
    "extends-cycle",
    "forbidden-device",
    "forward-failed",
    "hosts-need-vllm",
    "internal-error",
    "load-failed",
    "memory-beyond-card",
    "memory-held",
    "misplaced-tensors",
    "misread-map",
    "missing-figure",
    "missing-file",
    "missing-key",
    "missing-memory",
    "missing-workload",
    "mixed-accelerators",
    "model-not-found",
    "needs-quotes",
    "no-architecture",
    "no-capacity",
    "no-chat-template",
    "no-processor",
    "no-safetensors",
    "no-text-input",
    "no-weights",
    "not-a-device-map",
    "not-compiled",
    "other-accelerators",
    "outside-repository",
    "over-capacity",
    "overlapping-units",
    "peft-missing",
    "pillow-missing",
    "prompt-too-short",
    "quantizer-refuses",
    "range-beyond-end",
    "server-missing",
    "syntax",
    "template-error",
    "template-limit",
    "too-large",
    "too-little-memory",
    "too-noisy",
    "torch-missing",
    "undefined-variable",
    "unfit-adapter",
    "unfit-assistant",
    "unfit-cache",
    "unfit-export",
    "unfit-input",
    "unfit-receipts",
    "unknown-accelerator",
    "unknown-argument",
    "unknown-device",
    "unknown-key",
    "unknown-strategy",
    "unknown-unit",
    "unknown-variable",
    "unlisted-device",
    "unmatched-pattern",
    "unproven-lock",
    "unreadable-checkpoint",
    "unsupported-dtype",
    "unsupported-model",
    "unsupported-version",
    "unused-key",
    "usage",
    "wrong-checkpoint",
    "wrong-type",
]
"""Codes that always stop a command."""

AlwaysWarning = Literal[
    "another-card",
    "computes-in-float32",
    "cpu-passed-over",
    "few-bytes",
    "figures-moved",
    "foreign-to-vllm",
    "guessed-order",
    "ignored-key",
    "kept-together",
    "library-warning",
    "never-on-cards",
    "no-embedding",
    "not-measured",
    "not-new",
    "not-simulated",
    "quantization-not-measured",
    "shadowed-pin",
    "stale-graph",
    "unchecked-checkpoint",
    "unexpected-tensors",
    "unknown-dtype",
    "unmeasured-model",
    "unseen-accelerator",
    "untried-inputs",
    "untried-version",
]
"""Codes that never stop a command."""

ErrorOrWarning = Literal[
    "broken-lock",
    "context-too-long",
    "library-changed",
    "measuring-failed",
    "missing-lock",
    "missing-offload-folder",
    "newer-lock",
    "no-tokenizer",
    "remote-code",
    "split-block",
    "split-tie",
    "stale-lock",
    "stranded-tensor",
    "too-little-disk",
    "uncovered-tensor",
    "unreadable-lock",
]
"""Codes that may or may not stop a command; the page of each says when."""

ErrorCode = Literal[AlwaysError, ErrorOrWarning]
WarningCode = Literal[AlwaysWarning, ErrorOrWarning]
Code = Literal[AlwaysError, AlwaysWarning, ErrorOrWarning]

CODES: tuple[Code, ...] = tuple(sorted(get_args(Code)))

PAGES = Path(__file__).parent / "pages"
"""The pages, as data of the package; in a checkout, a link to `docs/codes`."""


def severities(code: Code) -> tuple[Severity, ...]:
    """Return the severities with which a code may be reported, the more serious first.

    >>> severities("stale-lock")
    ('error', 'warning')
    """
    may_be: dict[Severity, tuple[Code, ...]] = {"error": get_args(ErrorCode), "warning": get_args(WarningCode)}
    return tuple(severity for severity, codes in may_be.items() if code in codes)


def page(code: str) -> str:
    """Return the page of a code, in Markdown.

    >>> page("duplicate-key").splitlines()[0]
    '# duplicate-key'
    """
    return read_text(PAGES / f"{code}.md", PACKAGED, ANYWHERE)


def summary(code: Code) -> str:
    """Return the meaning of a code in one sentence: the first of its page.

    >>> summary("duplicate-key")
    'A mapping gives one key twice.'
    """
    _, _, text = page(code).partition(" · ")
    return SENTENCE_END.split(text, maxsplit=1)[0].replace("\n", " ")


SENTENCE_END = re.compile(r"(?<=\.)\s")
