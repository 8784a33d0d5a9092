"""The methods whose sizes are not known: their weights are counted as they are before quantization, an upper bound.

HQQ is among them because transformers 5.24 loads no such model (`HqqHfQuantizer` has no `get_quantize_ops`).
"""

from __future__ import annotations

from devmap_config.devices import DISK, STORAGE_DEVICES
from devmap_config.quantization.method import Method, Refusal

UNSIZED = (
    Method(name="aqlm"),
    Method(name="auto-round"),
    Method(name="bitnet", refusal=Refusal(devices=STORAGE_DEVICES, alone_is_fine=True), lowers_budgets=True),
    Method(name="eetq", refusal=Refusal(devices=STORAGE_DEVICES, alone_is_fine=True)),
    Method(
        name="fbgemm_fp8",
        refusal=Refusal(devices=STORAGE_DEVICES, prequantized_is_fine=True),
        needs_fp8=True,
        offloads_buffers=True,
    ),
    Method(name="fouroversix"),
    Method(name="fp_quant", refusal=Refusal(devices=STORAGE_DEVICES, alone_is_fine=True)),
    Method(name="gemma"),
    Method(name="gguf", refusal=Refusal(devices=(DISK,))),
    Method(name="higgs", refusal=Refusal(devices=STORAGE_DEVICES)),
    Method(name="hqq", refusal=Refusal(devices=STORAGE_DEVICES)),
    Method(name="metal", refusal=Refusal(devices=STORAGE_DEVICES, prequantized_is_fine=True)),
    Method(name="mxfp8"),
    Method(name="nvfp4", refusal=Refusal(devices=STORAGE_DEVICES)),
    Method(name="quark"),
    Method(name="sinq"),
    Method(name="spqr"),
    Method(name="vptq"),
)
