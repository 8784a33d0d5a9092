"""Constants of timing that are neither in profiles nor in the catalogue, each with the measurement that it comes from.

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
"""The host's time for each operation of torch, even a view: Python, the dispatcher, the launch.

Servers with an H100 take 8.5 to 12.2 µs (a token of Llama-3.1-8B in 22 to 31 ms, of 2,460 operations, and of
Qwen3-30B-A3B in 62 to 66 ms, of 5,452: `devmap_config/runner/receipts/`); one with an A100 10.4 (Llama-2-7B, 25.8 ms:
`benchmarks/published_runs.csv`). A CPU of 2024, without an accelerator, takes 2.9 (`devmap probe --measure`).
"""

GENERATION_DISPATCHES = 76
"""The work of `generate` for a token besides the forward, as a number of operations: 0.22 ms at 2.9 µs each.

Llama with two layers of 64 hidden units, torch 2.13 and transformers 5.24, one thread. 38 are operations of torch's.
"""

HOOK_DISPATCHES = 12
"""The work of accelerate's hooks for a module whose weights they copy, likewise: 35 µs at 2.9 each, on that machine."""

KERNEL_NANOSECONDS = 2_500
"""The time of a kernel on an accelerator besides its work: Qwen3-30B-A3B keeps an H100 busy for 11.1 ms with 3,350
kernels, and reading its weights takes 2.6 ms of these (`devmap_config/runner/receipts/qwen3-30b-a3b.json`).
"""

CPU_DECODE_ATTENTION = 140
CPU_PREFILL_ATTENTION = 5
"""How many times as long an operation of attention takes a CPU in half precision as one of a linear layer.

One query at 3.1 GFLOP/s a thread, whatever its heads and the length of the cache; 448 at 85 and 1,024 at 125; layers at
430 to 480 (torch 2.13, one thread of an AMD EPYC with bfloat16, `scaled_dot_product_attention`). In float32, one query
takes a tenth of that.
"""

LATENCY_NANOSECONDS = 10_000
"""The time until a copy begins, if the profile does not say: 10 µs for a hop between peers (aiconfigurator)."""

NETWORK_LATENCY_NANOSECONDS = 50_000
"""The same between two hosts: a round trip over TCP in one rack, by gloo or NCCL's sockets, as vLLM sends. It is an
assumption; with RDMA, which takes a tenth, the profile should state it.
"""

UNPINNED_SHARE = Fraction(1, 2)
"""The share of a link's rate that is reached from memory that is not pinned: 6 of 12 GB/s over PCIe 3.0, in
accelerate's own benchmark of big models.
"""

UNPINNED_MOST_BYTES_PER_SECOND = 10 * 10**9
"""The most that the CPU copies from other memory into pinned memory: 10.6 GB/s, where an H100's link has 55
(`devmap_config/runner/receipts/`)."""

SPREADS: Mapping[tuple[Basis, str, str | None], Mapping[str, Spread]] = {
    ("stated", "cuda", None): {"decode": Spread(83, 241), "prefill": Spread(102, 144)},
    ("stated", "cuda", "`cache: static`"): {"decode": Spread(37, 38), "prefill": Spread(110, 114)},
    ("stated", "cuda", "bitsandbytes fp4 4 bit in float32"): {
        "decode": Spread(96, 188),
        "prefill": Spread(109, 1092),
    },
    ("measured", "cpu", None): {"decode": Spread(82, 124), "prefill": Spread(60, 139)},
    ("measured", "cpu", "torchao Int8WeightOnlyConfig"): {"decode": Spread(105, 106), "prefill": Spread(113, 114)},
}
"""The least and the most time that runs took relative to the prediction, by the basis of the rates, the kind of device
that ran everything, the kind of runs (`None` for dense weights with a cache that grows) and the phase. They come from
all rows of docs/fidelity.md and all receipts that it names, each run by itself. Other combinations were not observed.
"""

PROCESS_ANONYMOUS_BYTES = 293 * 2**20
"""The anonymous memory of a process in which torch, transformers and devmap-config ran a tiny model on the CPU:
Python 3.11, torch 2.13 for the CPU, transformers 5.24 on Linux, `/proc/self/status`."""

LIBRARY_FILE_BYTES = 170 * 2**20
"""The memory that such a process maps of the libraries' files: the middle of the 121 to 217 MiB that were observed. It
depends on the system's page cache, as Linux also maps cached pages around the one that is read.
"""

HELD_SHARE = Fraction(3, 4)
HELD_SHARE_END_BYTES = 256 * 2**20
"""The extra memory of glibc's allocator, as a share of the cache and the activations: 0.4 to 0.95 were observed with
Llamas of 0.3 and 0.65 billion parameters and a mixture of 0.7, with prompts of 256 to 1,024 tokens. Blocks of more than
32 MiB are returned to the system at once.
"""

PROGRAM_BYTES = 540_000
PROGRAM_SHAPES_MOST = 1_024
"""The most shapes of products in half precision for which oneDNN caches the code that it generates
(`ONEDNN_PRIMITIVE_CACHE_CAPACITY`). A mixture of 12 layers with 32 experts had 289 shapes, whose code took 157 MiB;
with a capacity of 16, it took half (torch 2.13, AVX-512, `ONEDNN_VERBOSE=1`).
"""
