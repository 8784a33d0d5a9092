"""Compares compiled and plain decoding on this machine's CUDA card or its CPU: times, tokens and logits.

A model of random weights is compiled into a plan with a static cache, loaded by its lock with and without
`compile=True`, and goes on from the same prompt. Random weights make logits that are nearly alike, so tokens part
sooner than those of a model that was trained.

On a card it has a published shape, fewer of its layers if wanted:

    python -m benchmarks.compiled_decoding profiles/models/llama-3.1-8b --layers 16 --folder /dev/shm/compiled

On the CPU it is one of `benchmarks/receipts.py`, or each of them by which `compiled_decoding.md` was made. The two take
turns in one process and one thread, and time is the processor's, which other processes take little of. What is refused,
such as bfloat16, is compiled all the same, to see why:

    OMP_NUM_THREADS=1 python -m benchmarks.compiled_decoding --on-cpu --folder /tmp/compiled

With `--half-on-disk` the first half of the layers is on disk, and of the others each is compiled by itself:

    OMP_NUM_THREADS=1 python -m benchmarks.compiled_decoding dense-0.4b --on-cpu --half-on-disk --folder /tmp/compiled
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import time
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml

from benchmarks.real_cards import locked_plan, make_checkpoint
from benchmarks.receipts import make_model
from devmap_config import load_model
from devmap_config.runner.compilation import compile_decoding

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

PROMPT_TOKENS, NEW_TOKENS = 448, 64
ON_CPU = ("learned-positions-0.1b", "dense-0.4b", "sliding-window-0.4b", "mixture-0.7b")
PROMPT_TOKENS_ON_CPU, NEW_TOKENS_ON_CPU, ROUNDS = 64, 32, 8
MOST_NOISE = 1.1
"""By how many times the even and the odd rounds of the same may differ, for a ratio to be printed."""


class Clock:
    """A clock of the tokens that `generate` emits, by the processor time of this process."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def put(self, _: torch.Tensor) -> None:
        """Record that the prompt, or a token, has arrived."""
        self.seconds.append(time.process_time())

    def end(self) -> None:
        """Note nothing: the last token was put."""

    @property
    def token_seconds(self) -> float:
        """The median of a token, of those after the first."""
        return statistics.median(after - before for before, after in pairwise(self.seconds[1:]))


def generated(model: Any, tokens: torch.Tensor, count: int, streamer: Clock | None = None) -> tuple[float, Any]:
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
        streamer=streamer,
    )
    if tokens.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start, output


def measured(model: Any, tokens: torch.Tensor) -> tuple[float, float, Any]:
    """Return the seconds of the first generation, those of a token after it, and what was generated."""
    first_seconds, _ = generated(model, tokens, NEW_TOKENS + 2)
    begin_seconds, _ = generated(model, tokens, 2)
    seconds, output = generated(model, tokens, NEW_TOKENS + 2)
    return first_seconds, (seconds - begin_seconds) / NEW_TOKENS, output


def agreement(plain: Any, compiled: Any, prompt_tokens: int) -> tuple[int, list[float]]:
    """Return how many tokens are the same, and how far the logits by which they were decoded differ."""
    same = int((plain.sequences == compiled.sequences).cumprod(1).sum()) - prompt_tokens
    return same, [
        float((one - other).float().norm() / one.float().norm())
        for one, other in zip(plain.logits[1:same], compiled.logits[1:same], strict=True)
    ]


def locked_profile(
    folder: Path,
    dtype: str,
    context_length: int,
    prompt_tokens: int,
    devices: dict[str, Any],
    on_disk: str | None = None,
) -> Path:
    """Write a profile of `folder / "model"` with a static cache and its lock; what matches `on_disk` is there."""
    profile = folder / "profile.yaml"
    workload = {"context_length": context_length, "prompt_length": prompt_tokens, "cache": "static"}
    parts = {"model": {"source": "model", "dtype": dtype}, "workload": workload, "hardware": {"devices": devices}}
    placement: dict[str, Any] = {"strategy": "single"}
    if on_disk is not None:
        pins = [{"match": on_disk, "device": "disk"}]
        placement = {"strategy": "sequential", "pins": pins, "offload": {"folder": "offload"}}
    profile.write_text(yaml.safe_dump({"version": 1, **parts, "placement": placement}))
    locked_plan(profile)
    return profile


def prompt(count: int) -> torch.Tensor:
    """Return a made-up prompt."""
    return torch.randint(3, 1000, (1, count), generator=torch.Generator().manual_seed(0))


def compare_on_card(published: Path, layers: int | None, folder: Path) -> None:
    """Print times, and how far logits and tokens agree, of a published shape on the first card."""
    config = json.loads((published / "config.json").read_text())
    (folder / "published").mkdir(parents=True)
    (folder / "published" / "config.json").write_text(
        json.dumps(config | ({} if layers is None else {"num_hidden_layers": layers}))
    )
    make_checkpoint(folder / "published", folder / "model", smallest=False)
    card = {"cuda:0": {"memory": torch.cuda.mem_get_info(0)[1], "reserve": 2**30}}
    profile = locked_profile(folder, "bfloat16", 1024, PROMPT_TOKENS, card)
    tokens = prompt(PROMPT_TOKENS).to("cuda:0")
    found = {}
    for name, compiles in (("as it is", False), ("compiled", True)):
        model = load_model(profile, compile=compiles, probe=False)
        first_seconds, token_seconds, found[name] = measured(model, tokens)
        print(f"{name}: {first_seconds:.1f} s the first time, then {token_seconds * 1e3:.2f} ms a token")
    same, differences = agreement(*found.values(), PROMPT_TOKENS)
    print(f"of {NEW_TOKENS + 2} tokens the first {same} are the same")
    print(f"while they are, decoded logits differ by {min(differences):.3f} to {max(differences):.3f} of their norm")


def compile_layers(layers: Sequence[torch.nn.Module]) -> None:
    """Compile each layer by itself for decoding, as many layers as there are."""
    torch.compiler.config.recompile_limit = len(layers)  # eight, else: each has its place in the cache in its code
    for layer in layers:
        layer.forward = _decoding(layer.forward, torch.compile(layer.forward))


def _decoding(plain: Callable[..., Any], compiled: Callable[..., Any]) -> Callable[..., Any]:
    def forward(states: torch.Tensor, *arguments: Any, **named: Any) -> Any:
        return (compiled if states.shape[1] == 1 else plain)(states, *arguments, **named)

    return forward


def compare_on_cpu(name: str, dtype: str, folder: Path, *, half_on_disk: bool, round_count: int) -> str:
    """Return a row of `compiled_decoding.md`."""
    make_model(name, dtype, folder / "model", is_tiny=False)
    context_length = PROMPT_TOKENS_ON_CPU + NEW_TOKENS_ON_CPU + 2
    devices = {"cpu": {"memory": "16GiB"}, **({"disk": {"memory": "16GiB"}} if half_on_disk else {})}
    half = json.loads((folder / "model" / "config.json").read_text())["num_hidden_layers"] // 2 if half_on_disk else 0
    on_disk = f"model.layers.[:{half}]" if half_on_disk else None
    profile = locked_profile(folder, dtype, context_length, PROMPT_TOKENS_ON_CPU, devices, on_disk)
    models = {"plain": load_model(profile, probe=False), "compiled": load_model(profile, probe=False)}
    if half_on_disk:
        models["compiled"].generation_config.cache_implementation = "static"
        compile_layers(models["compiled"].model.layers[half:])
    else:
        compile_decoding(models["compiled"])
    tokens, found, seconds = prompt(PROMPT_TOKENS_ON_CPU), {}, {}
    for which, model in models.items():
        seconds[which], found[which] = generated(model, tokens, NEW_TOKENS_ON_CPU + 2)
    rounds: dict[str, list[float]] = {which: [] for which in models}
    for number in range(round_count):
        for which in sorted(models, reverse=bool(number % 2)):
            clock = Clock()
            generated(models[which], tokens, NEW_TOKENS_ON_CPU + 2, clock)
            rounds[which].append(clock.token_seconds)
    torch.compiler.reset()
    same, differences = agreement(found["plain"], found["compiled"], PROMPT_TOKENS_ON_CPU)
    plain, compiled = (statistics.median(rounds[which]) * 1e3 for which in models)
    ratios = sorted(one / other for one, other in zip(rounds["plain"], rounds["compiled"], strict=True))
    noise = max(_noise(times) for times in rounds.values())
    gain = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f}–{ratios[-1]:.2f})"
    return (
        f"| {name} | {dtype} | {plain:.1f} | {compiled:.1f} | {gain if noise <= MOST_NOISE else 'too noisy'} |"
        f" {noise:.2f} | {seconds['compiled'] - seconds['plain']:.0f} | {same} of {NEW_TOKENS_ON_CPU + 2} |"
        f" {max(differences):.1e} |"
    )


def _noise(times: list[float]) -> float:
    """Return by how many times the even rounds and the odd ones differ."""
    even, odd = statistics.median(times[::2]), statistics.median(times[1::2])
    return max(even, odd) / min(even, odd)


def main() -> None:
    """Print what the arguments ask for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("models", nargs="*", help="a folder with a published config.json; names, on the CPU")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--on-cpu", action="store_true")
    parser.add_argument("--half-on-disk", action="store_true", help="on the CPU")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="on the CPU")
    parser.add_argument("--dtypes", default="float32,bfloat16", help="on the CPU")
    parser.add_argument(
        "--folder", type=Path, required=True, help="where the checkpoint is written: a RAM disk is quick"
    )
    given = parser.parse_args()
    if not given.on_cpu:
        [published] = given.models
        compare_on_card(Path(published), given.layers, given.folder)
        return
    for name in given.models or ON_CPU:
        for dtype in given.dtypes.split(","):
            folder = given.folder / f"{name}-{dtype}"
            folder.mkdir(parents=True)
            print(
                compare_on_cpu(name, dtype, folder, half_on_disk=given.half_on_disk, round_count=given.rounds),
                flush=True,
            )
            shutil.rmtree(folder)


if __name__ == "__main__":
    main()
