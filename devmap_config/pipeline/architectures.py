"""The model classes that vLLM implements itself: `vllm_architectures.csv`, taken from its registry."""

from __future__ import annotations

import csv
from functools import cache
from pathlib import Path

from devmap_config.files import ANYWHERE, PACKAGED, read_text

VLLM_VERSION = "0.32.0"


@cache
def architectures() -> frozenset[str]:
    """Return the names of the classes that generate text.

    Example:
        >>> "LlamaForCausalLM" in architectures()
        True
    """
    text = read_text(Path(__file__).parent / "vllm_architectures.csv", PACKAGED, ANYWHERE)
    return frozenset(row["architecture"] for row in csv.DictReader(text.splitlines()))
