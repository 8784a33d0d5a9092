"""Times transformers' products with experts on the CPU, for the numbers of tokens of decoding and prefills.

The experts of one layer of a published shape, with random weights in bfloat16 and another choice of experts each
round, in which every implementation takes a turn. Times are those of the processor, of all threads, which other
processes on the machine lengthen less than the clock's. `batched_mm` copies the weights of each chosen expert for each
token first: it is left out where that is more than 4 GiB.

    OMP_NUM_THREADS=1 python benchmarks/experts.py > table.md
"""

from __future__ import annotations

import argparse
import time
from statistics import median
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from devmap_config.libraries.transformers import chooses_experts_implementation, set_experts_implementation

SHAPES: dict[str, tuple[str, dict[str, int]]] = {
    "Qwen3-30B-A3B": (
        "qwen3_moe",
        {"hidden_size": 2048, "moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8},
    ),
    "OLMoE-1B-7B": (
        "olmoe",
        {"hidden_size": 2048, "intermediate_size": 1024, "num_experts": 64, "num_experts_per_tok": 8},
    ),
    "gpt-oss-20b": (
        "gpt_oss",
        {"hidden_size": 2880, "intermediate_size": 2880, "num_local_experts": 32, "num_experts_per_tok": 4},
    ),
    "Mixtral-8x7B": (
        "mixtral",
        {"hidden_size": 4096, "intermediate_size": 14336, "num_local_experts": 8, "num_experts_per_tok": 2},
    ),
}
TOKENS = (1, 2, 8, 64, 448, 2048)
IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm")
MOST_GATHERED_BYTES = 4 * 2**30
TARGET_SECONDS = 6.0


def experts_of(model_type: str, shape: dict[str, int]) -> torch.nn.Module:
    """Return the experts of a layer, with random weights."""
    config = AutoConfig.for_model(model_type, num_hidden_layers=1, vocab_size=16, pad_token_id=None, **shape)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    experts = next(module for module in model.modules() if chooses_experts_implementation(module))
    experts.to_empty(device="cpu")
    for parameter in experts.parameters():
        parameter.data.uniform_(-0.02, 0.02)
    return experts.requires_grad_(requires_grad=False)


def seconds(experts: torch.nn.Module, implementation: str, given: tuple[torch.Tensor, ...]) -> float:
    """Return the processor seconds of one product."""
    set_experts_implementation(experts.config, implementation)
    start = time.process_time()
    experts(*given)
    return time.process_time() - start


def given_to(shape: dict[str, int], tokens: int) -> tuple[torch.Tensor, ...]:
    """Return hidden states of so many tokens, the experts that are chosen for each, and their weights."""
    count = shape.get("num_experts", shape.get("num_local_experts", 0))
    chosen = torch.rand(tokens, count).topk(shape["num_experts_per_tok"])
    hidden = torch.randn(tokens, shape["hidden_size"], dtype=torch.bfloat16)
    return hidden, chosen.indices, chosen.values.to(torch.bfloat16)


def rounds_of(experts: torch.nn.Module, shape: dict[str, int], tokens: int) -> list[dict[str, float]]:
    """Return the seconds of each implementation, round by round; the first, which warms up, is left out."""
    held_bytes = sum(parameter.nbytes for parameter in experts.parameters())
    count = shape.get("num_experts", shape.get("num_local_experts", 0))
    gathered_bytes = held_bytes // count * shape["num_experts_per_tok"] * tokens
    taking_part = [name for name in IMPLEMENTATIONS if name != "batched_mm" or gathered_bytes <= MOST_GATHERED_BYTES]
    found: list[dict[str, float]] = []
    start = time.perf_counter()
    while len(found) < 6 or (time.perf_counter() - start < TARGET_SECONDS and len(found) < 100):
        given = given_to(shape, tokens)
        turn = len(found) % len(taking_part)
        found.append({name: seconds(experts, name, given) for name in (*taking_part[turn:], *taking_part[:turn])})
    return found[1:]


def ratios(found: list[dict[str, float]], name: str) -> str:
    """Return how many times the time of `eager` an implementation takes: the median, and the middle half of rounds."""
    if name not in found[0]:
        return "—"
    each = sorted(times[name] / times["eager"] for times in found)
    return f"{median(each):.2f} ({each[len(each) // 4]:.2f}–{each[-1 - len(each) // 4]:.2f})"


@torch.no_grad()
def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--shapes", nargs="*", default=list(SHAPES), choices=list(SHAPES))
    given: Any = parser.parse_args()
    torch.manual_seed(0)
    print("| experts of | tokens | `eager` ms | `grouped_mm` × | `batched_mm` × |")
    print("|---|--:|--:|--:|--:|")
    for name in given.shapes:
        model_type, shape = SHAPES[name]
        experts = experts_of(model_type, shape)
        for tokens in TOKENS:
            found = rounds_of(experts, shape, tokens)
            eager = median(times["eager"] for times in found) * 1e3
            row = (name, f"{tokens:,}", f"{eager:.1f}", ratios(found, "grouped_mm"), ratios(found, "batched_mm"))
            print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
