"""The methods with unknown sizes, whose weights are counted as before quantization, which is an upper bound.

The refusals come from transformers 5.24: `quantizers/quantizer_METHOD.py`, `validate_environment`. Methods without a
`refusal` do not check for the CPU or the disk there.

HQQ is among them because transformers 5.24 cannot load such models (`HqqHfQuantizer` has no `get_quantize_ops`).
"""

from __future__ import annotations

from devmap_config.devices import DISK, STORAGE_DEVICES
from devmap_config.quantization.method import Method, Refusal

UNSIZED = (
    Method(name="aqlm", needs_quantized_checkpoint=True),
    Method(name="auto-round", needs_quantized_checkpoint=True),
    # of these two `len(device_map) > 1`
    Method(
        name="bitnet",
        refusal=Refusal(devices=STORAGE_DEVICES, whole_is_fine=True),
        lowers_budgets=True,
        needs_quantized_checkpoint=True,
    ),
    Method(name="eetq", refusal=Refusal(devices=STORAGE_DEVICES, whole_is_fine=True)),
    Method(
        name="fbgemm_fp8",
        refusal=Refusal(devices=STORAGE_DEVICES, prequantized_is_fine=True),
        needs_fp8=True,
        offloads_buffers=True,
    ),
    Method(name="fouroversix"),
    # `len(device_map) > 1`; with `pseudoquantization`, which no card needs, only the disk is refused
    Method(name="fp_quant", refusal=Refusal(devices=STORAGE_DEVICES, whole_is_fine=True)),
    Method(name="gemma", needs_quantized_checkpoint=True),
    # in `update_device_map`
    Method(name="gguf", refusal=Refusal(devices=(DISK,)), needs_quantized_checkpoint=True),
    Method(name="higgs", refusal=Refusal(devices=STORAGE_DEVICES), needs_quantized_checkpoint=True),
    Method(name="hqq", refusal=Refusal(devices=STORAGE_DEVICES), needs_quantized_checkpoint=True),
    Method(name="metal", refusal=Refusal(devices=STORAGE_DEVICES, prequantized_is_fine=True)),
    Method(name="mxfp8"),
    # one CUDA device
    Method(name="nvfp4", refusal=Refusal(devices=STORAGE_DEVICES, one_device_only=True)),
    Method(name="quark", needs_quantized_checkpoint=True),
    # `len(device_map_values) > 1`
    Method(name="sinq", refusal=Refusal(one_device_only=True)),
    Method(name="spqr", needs_quantized_checkpoint=True),
    Method(name="vptq", needs_quantized_checkpoint=True),
)
