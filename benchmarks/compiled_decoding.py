"""Decodes on this machine's CUDA card as it is and by compiled code, and holds the two to each other.

A published shape with random weights, fewer of its layers if wanted, is compiled into a plan with a static cache,
loaded by its lock with and without `compile=True`, and goes on from the same prompt. Random weights make logits that
are nearly alike, so tokens part sooner than those of a model that was trained.

    python benchmarks/compiled_decoding.py profiles/models/llama-3.1-8b --layers 16 --folder /dev/shm/compiled
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from real_cards import locked_plan, make_checkpoint

from devmap_config import load_model

PROMPT_TOKENS, NEW_TOKENS = 448, 64


def generated(model: Any, tokens: torch.Tensor, count: int) -> tuple[float, Any]:
    """Return the seconds that so many tokens take, and what was generated with its logits."""
    start = time.perf_counter()
    output = model.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        max_new_tokens=count,
        min_new_tokens=count,
        do_sample=False,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_logits=True,
    )
    torch.cuda.synchronize()
    return time.perf_counter() - start, output


def measured(model: Any, tokens: torch.Tensor) -> tuple[float, float, Any]:
    """Return the seconds of the first generation, those of a token after it, and what was generated."""
    first_seconds, _ = generated(model, tokens, NEW_TOKENS + 2)
    begin_seconds, _ = generated(model, tokens, 2)
    seconds, output = generated(model, tokens, NEW_TOKENS + 2)
    return first_seconds, (seconds - begin_seconds) / NEW_TOKENS, output


def main() -> None:
    """Print times, and how far logits and tokens agree."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", type=Path, help="a folder with a published config.json")
    parser.add_argument("--layers", type=int)
    parser.add_argument(
        "--folder", type=Path, required=True, help="where the checkpoint is written: a RAM disk is quick"
    )
    given = parser.parse_args()
    config = json.loads((given.model / "config.json").read_text())
    published = given.folder / "published"
    published.mkdir(parents=True)
    (published / "config.json").write_text(
        json.dumps(config | ({} if given.layers is None else {"num_hidden_layers": given.layers}))
    )
    make_checkpoint(published, given.folder / "model", smallest=False)
    profile = given.folder / "profile.yaml"
    workload = {"context_length": 1024, "prompt_length": PROMPT_TOKENS, "cache": "static"}
    hardware = {"devices": {"cuda:0": {"memory": torch.cuda.mem_get_info(0)[1], "reserve": 2**30}}}
    parts = {"model": {"source": "model", "dtype": "bfloat16"}, "workload": workload, "hardware": hardware}
    profile.write_text(yaml.safe_dump({"version": 1, **parts, "placement": {"strategy": "single"}}))
    locked_plan(profile)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(3, 1000, (1, PROMPT_TOKENS), generator=generator).to("cuda:0")
    found = {}
    for name, compiles in (("as it is", False), ("compiled", True)):
        model = load_model(profile, compile=compiles, probe=False)
        first_seconds, token_seconds, found[name] = measured(model, tokens)
        print(f"{name}: {first_seconds:.1f} s the first time, then {token_seconds * 1e3:.2f} ms a token")
    plain, compiled = found.values()
    same = int((plain.sequences == compiled.sequences).cumprod(1).sum()) - PROMPT_TOKENS
    print(f"of {NEW_TOKENS + 2} tokens the first {same} are the same")
    differences = [
        float((one - other).float().norm() / one.float().norm())
        for one, other in zip(plain.logits[1:same], compiled.logits[1:same], strict=True)
    ]
    print(f"while they are, decoded logits differ by {min(differences):.3f} to {max(differences):.3f} of their norm")


if __name__ == "__main__":
    main()
