"""The constants of timing that no profile states and the catalogue does not have, each with what it was measured on.

A profile's `hardware` overrides these, and `devmap probe --measure` measures those that it can.
"""

from __future__ import annotations

from fractions import Fraction
from typing import TYPE_CHECKING

from devmap_config.profile.quantities import Spread

if TYPE_CHECKING:
    from collections.abc import Mapping

    from devmap_config.profile.quantities import Basis

DISPATCH_NANOSECONDS = 10_000
"""What the host needs for an operation that torch is asked for, be it a view: Python, the dispatcher, the launch.

Servers with an H100 take 8.5 to 12.2 µs (a token of Llama-3.1-8B in 22 to 31 ms, of 2,460 operations, and of
Qwen3-30B-A3B in 62 to 66 ms, of 5,452: `devmap_config/runner/receipts/`); one with an A100 10.4 (Llama-2-7B, 25.8 ms:
`benchmarks/published_runs.csv`). A CPU of 2024 at work alone takes 2.9 (`devmap probe --measure`).
"""

GENERATION_DISPATCHES = 76
"""What `generate` does for a token besides the forward, in operations of the model's: 0.22 ms of 2.9 µs each.

Llama with two layers of 64 hidden units, torch 2.13 and transformers 5.24, one thread. 38 are operations of torch's.
"""

HOOK_DISPATCHES = 12
"""What accelerate's hooks do for a module whose weights they bring, likewise: 35 µs of 2.9 each, on that machine."""

KERNEL_NANOSECONDS = 2_500
"""What a kernel takes on an accelerator besides its work: Qwen3-30B-A3B keeps an H100 busy for 11.1 ms with 3,350 of
them, of which reading takes 2.6 (`devmap_config/runner/receipts/qwen3-30b-a3b.json`)."""

CPU_DECODE_ATTENTION = 140
CPU_PREFILL_ATTENTION = 5
"""How many times as long as a linear layer's an operation of attention takes a CPU in half precision.

One query at 3.1 GFLOP/s a thread, whatever its heads and the length of the cache; 448 at 85 and 1,024 at 125; layers at
430 to 480 (torch 2.13, one thread of an AMD EPYC with bfloat16, `scaled_dot_product_attention`). In float32, one query
takes a tenth of that.
"""

LATENCY_NANOSECONDS = 10_000
"""Until a copy begins, where the profile does not say: 10 µs a peer hop (aiconfigurator)."""

NETWORK_LATENCY_NANOSECONDS = 50_000
"""The same between two hosts: what a round over TCP in one rack takes, in vLLM's way through gloo or NCCL's sockets;
assumed, and to be given by the profile where RDMA takes a tenth."""

UNPINNED_SHARE = Fraction(1, 2)
"""Of a link's rate, what is reached from memory that is not pinned: 6 of 12 GB/s over PCIe 3.0, accelerate's own
benchmark of big models."""

UNPINNED_MOST_BYTES_PER_SECOND = 10 * 10**9
"""More the CPU does not copy to what is pinned: 10.6 GB/s of the 55 of an H100's link
(`devmap_config/runner/receipts/`)."""

SPREADS: Mapping[tuple[Basis, str], Mapping[str, Spread]] = {
    ("stated", "cuda"): {"decode": Spread(88, 148), "prefill": Spread(108, 144)},
    ("measured", "cpu"): {"decode": Spread(96, 121), "prefill": Spread(101, 127)},
}
"""What runs took of what was predicted, the least and the most: by the basis of the rates, the kind of the devices that
all of it ran on, and phase. The rows of docs/fidelity.md with which nothing was fitted: 11 tokens and 8 prefills with
stated rates, and on a CPU that was measured before, 30 of each. What is not here was not seen often enough.
"""

PROCESS_ANONYMOUS_BYTES = 293 * 2**20
"""What a process has of its own in which torch, transformers and devmap-config ran a model of no size on the CPU:
Python 3.11, torch 2.13 for the CPU, transformers 5.24 on Linux, `/proc/self/status`."""

LIBRARY_FILE_BYTES = 170 * 2**20
"""What is mapped there of the libraries' own files: the middle of the 121 to 217 MiB that were seen, by what of these
the system has at hand: it maps the pages around the one that is asked for, where it need not read them."""

HELD_SHARE = Fraction(3, 4)
HELD_SHARE_END_BYTES = 256 * 2**20
"""Of the cache and the activations, what glibc's allocator holds besides: 0.4 to 0.95, seen of Llamas of 0.3 and 0.65
billion parameters and a mixture of 0.7, with prompts of 256 to 1,024 tokens. What is larger than 32 MiB it gives back
to the system at once."""

PROGRAM_BYTES = 540_000
PROGRAM_SHAPES_MOST = 1_024
"""What oneDNN keeps for each shape of a product in half precision: the code that it made for it, of 1,024 shapes at
most (`ONEDNN_PRIMITIVE_CACHE_CAPACITY`). A mixture of 12 layers with 32 experts ran with 289 shapes and held 157 MiB,
with a capacity of 16 half of it (torch 2.13, AVX-512, `ONEDNN_VERBOSE=1`)."""
