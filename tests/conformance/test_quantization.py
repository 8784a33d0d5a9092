"""Predicted sizes of quantised weights are those that transformers holds, byte for byte and module by module.

Tests marked `zoo` quantise with the real packages on the CPU; these are in the extra `quantizers`, and a missing one is
a failure. The others need none: transformers loads fp8 by itself, and mxfp4 is compared with the modules that it builds
on the meta device.
"""

from __future__ import annotations

import json
import re
from contextlib import ExitStack
from pkgutil import iter_modules

import pytest
import torch
import transformers
from conftest import REPOSITORY
from transformers.integrations.accelerate import compute_module_sizes
from transformers.quantizers.auto import get_hf_quantizer
from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer

from devmap_config.compiler import Request, run_pipeline
from devmap_config.graph.introspection import build_graph, build_meta_model, graph_of
from devmap_config.graph.loading import vendor
from devmap_config.libraries.accelerate import hooks_of
from devmap_config.libraries.transformers import quantization_config
from devmap_config.quantization import methods
from devmap_config.quantization.arguments import QuantizationError
from devmap_config.quantization.method import QUANTISING, Quantization
from devmap_config.quantization.registry import METHODS, effective_quantization, transformers_arguments
from devmap_config.quantization.storage import PACKED_DTYPES
from devmap_config.quantization.unsized import UNSIZED

LLAMA = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "head_dim": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "dtype": "bfloat16",
}
MODELS = {
    "llama": transformers.LlamaConfig(**LLAMA),
    # No size here divides by a block of 64 or 128.
    "odd": transformers.LlamaConfig(
        **{**LLAMA, "hidden_size": 200, "intermediate_size": 328, "head_dim": 40, "vocab_size": 500}
    ),
    # `Conv1D`, biases, tied embeddings.
    "gpt2": transformers.GPT2Config(
        n_embd=128,
        n_layer=2,
        n_head=2,
        vocab_size=512,
        n_positions=64,
        bos_token_id=0,
        eos_token_id=0,
        dtype="bfloat16",
    ),
    "opt": transformers.OPTConfig(
        hidden_size=128,
        ffn_dim=256,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=512,
        word_embed_proj_dim=128,
        max_position_embeddings=64,
        dtype="bfloat16",
    ),
    "mixture": transformers.Qwen3MoeConfig(
        **{**LLAMA, "moe_intermediate_size": 96, "num_experts": 4, "num_experts_per_tok": 2, "decoder_sparse_step": 1}
    ),
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A random checkpoint of each of the models, made once."""
    made = {}

    def make(kind):
        if kind not in made:
            torch.manual_seed(0)
            made[kind] = tmp_path_factory.mktemp(kind)
            model = transformers.AutoModelForCausalLM.from_config(MODELS[kind], dtype=torch.bfloat16)
            model.save_pretrained(made[kind])
        return made[kind]

    return make


def loaded(folder, quantization=None):
    """Return the model as `from_pretrained` loads it, its graph, and the quantization."""
    config = json.loads((folder / "config.json").read_text())
    effective = effective_quantization(quantization, config)
    arguments = (
        {}
        if quantization is None
        else {"quantization_config": quantization_config(transformers_arguments(quantization))}
    )
    name = config["architectures"][0]
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, device_map="cpu", **arguments
    )
    graph = build_graph(folder, class_name=name, dtype="bfloat16", attention=None, quantization=effective)
    return model, graph, effective


def held_bytes(model):
    """Return bytes by module over every tensor that it holds: in its state, in dictionaries, within other tensors."""
    seen = set()
    held = {}
    for path, module in model.named_modules():
        attributes = [value for name, value in vars(module).items() if name not in ("_modules", "source_cls")]
        if size := sum(_bytes_within(value, seen) for value in attributes):
            held[path] = size
    return held


def _bytes_within(value, seen):
    value = getattr(value, "offloaded_values", value)  # compressed-tensors' own hooks, which replace accelerate's
    if isinstance(value, dict):
        return sum(_bytes_within(each, seen) for each in value.values())
    if isinstance(value, (list, tuple)):
        return sum(_bytes_within(each, seen) for each in value)
    if isinstance(value, torch.nn.Module) or not hasattr(value, "__dict__") or isinstance(value, type):
        return 0
    if id(value) in seen:
        return 0
    seen.add(id(value))
    if isinstance(value, torch.Tensor):
        if hasattr(value, "__tensor_flatten__"):
            return sum(_bytes_within(getattr(value, name), seen) for name in value.__tensor_flatten__()[0])
        within = _bytes_within(vars(value), seen)
        if value.device.type == "meta" or value.untyped_storage().data_ptr() in seen:
            return within
        seen.add(value.untyped_storage().data_ptr())
        return within + value.untyped_storage().nbytes()
    of_quantizer = type(value).__module__.partition(".")[0] in ("bitsandbytes", "optimum", "torchao")
    return _bytes_within(vars(value), seen) if of_quantizer else 0


def graph_bytes(graph, attribute="size_bytes"):
    """Return bytes by module according to the graph; tied tensors count where they first occur."""
    sizes = {
        path: sum(getattr(each, attribute) for each in module.own_tensors if graph.storage_of[each.name] == each.name)
        for path, module in graph.modules.items()
    }
    return {path: size for path, size in sizes.items() if size}


def planner_sizes(folder, quantization=None):
    """Return bytes by module as transformers' planner counts them, on the meta model that its quantizer prepared."""
    config = transformers.AutoConfig.from_pretrained(folder)
    arguments = None if quantization is None else quantization_config(transformers_arguments(quantization))
    quantizer, config, _ = get_hf_quantizer(config, arguments, None, True, {})
    model_class = transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    model = build_meta_model(model_class, config, torch.bfloat16)
    with ExitStack() as stack:
        for context in model_class.get_init_context(torch.bfloat16, True, False, None):
            stack.enter_context(context)
        quantizer.preprocess_model(model=model, dtype=torch.bfloat16, device_map=None, checkpoint_files=None)
    _, leaves = compute_module_sizes(model, quantizer)
    return {path: size for path, size in leaves.items() if size}


BNB = {"method": "bitsandbytes"}
BNB_4BIT = {**BNB, "load_in_4bit": True}
ON_THE_FLY = {
    "bnb-8bit": {**BNB, "load_in_8bit": True},
    "bnb-fp4": BNB_4BIT,
    "bnb-nf4-nested": {**BNB_4BIT, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "bnb-4bit-in-bfloat16": {**BNB_4BIT, "bnb_4bit_quant_storage": "bfloat16"},
    "bnb-8bit-but-some": {**BNB, "load_in_8bit": True, "llm_int8_skip_modules": ["lm_head", "q_proj", "c_attn"]},
    "torchao-int8": {"method": "torchao", "quant_type": "Int8WeightOnlyConfig"},
    "torchao-float8": {"method": "torchao", "quant_type": "Float8WeightOnlyConfig"},
    "quanto-int8": {"method": "quanto", "weights": "int8"},
    "quanto-float8": {"method": "quanto", "weights": "float8"},
    "quanto-int4": {"method": "quanto", "weights": "int4"},
    "quanto-int2": {"method": "quanto", "weights": "int2"},
}


@pytest.mark.zoo
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("name", ON_THE_FLY)
def test_sizes_are_those_of_weights_quantised_while_loading(name, kind, checkpoint):
    model, graph, quantization = loaded(checkpoint(kind), ON_THE_FLY[name])
    assert quantization.format() is not None
    assert graph_bytes(graph) == held_bytes(model)


@pytest.mark.zoo
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("name", ON_THE_FLY)
def test_planner_counts_quantised_sizes_as_transformers_does(name, kind, checkpoint):
    folder = checkpoint(kind)
    config = json.loads((folder / "config.json").read_text())
    quantization = effective_quantization(ON_THE_FLY[name], config)
    graph = build_graph(
        folder, class_name=config["architectures"][0], dtype="bfloat16", attention=None, quantization=quantization
    )
    assert graph_bytes(graph, "planner_bytes") == planner_sizes(folder, ON_THE_FLY[name])


@pytest.mark.zoo
@pytest.mark.parametrize("name", ["bnb-8bit", "bnb-fp4", "bnb-nf4-nested", "torchao-int8", "torchao-float8"])
@pytest.mark.parametrize("kind", ["llama", "odd", "opt"])
def test_sizes_are_those_of_a_quantised_checkpoint(name, kind, checkpoint, tmp_path):
    model, _, _ = loaded(checkpoint(kind), ON_THE_FLY[name])
    model.save_pretrained(tmp_path)
    model, graph, quantization = loaded(tmp_path)
    assert quantization.is_prequantized
    assert graph_bytes(graph) == held_bytes(model)
    assert graph_bytes(graph, "planner_bytes") == planner_sizes(tmp_path)


STANDING_IN_FOR_A_CARD = torch.device("cpu")
"""Only the strings `cpu` and `disk` of a map mean offloading."""


@pytest.mark.zoo
@pytest.mark.parametrize("name", ["bnb-8bit", "bnb-fp4"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "mixture"])
def test_bitsandbytes_does_not_quantise_offloaded_modules(name, kind, checkpoint):
    folder = checkpoint(kind)
    asked = {**ON_THE_FLY[name], "llm_int8_enable_fp32_cpu_offload": True}
    config = json.loads((folder / "config.json").read_text())
    graph = build_graph(
        folder,
        class_name=config["architectures"][0],
        dtype="bfloat16",
        attention=None,
        quantization=effective_quantization(asked, config),
    )
    offloaded = [path for path in graph.blocks if path.endswith(".1") or path == "lm_head"][:1]
    device_map = {path: "cpu" if path in offloaded else STANDING_IN_FOR_A_CARD for path in graph.blocks}
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.bfloat16,
        device_map=device_map,
        quantization_config=quantization_config(transformers_arguments(asked)),
    )
    assert offloaded
    held = held_bytes(model)
    converted = 0
    for path, module in graph.modules.items():
        if not module.own_tensors or any(graph.storage_of[each.name] != each.name for each in module.own_tensors):
            continue
        is_offloaded = any(path == block or path.startswith(f"{block}.") for block in offloaded)
        planned = sum(each.bytes_where(is_offloaded=is_offloaded) for each in module.own_tensors)
        if is_offloaded:
            weights = hooks_of(model.get_submodule(path))[0].weights_map
            found = sum(weights[name].nbytes for name, _ in model.get_submodule(path).named_parameters(recurse=False))
        else:
            found = held[path]
        assert found == planned, path
        converted += is_offloaded and any(each.offloaded_bytes is not None for each in module.own_tensors)
    assert converted


WEIGHTS = {"num_bits": 8, "symmetric": True, "strategy": "channel"}
COMPRESSED = {
    "pack-quantized": {"weights": {**WEIGHTS, "num_bits": 4, "type": "int", "strategy": "group", "group_size": 8}},
    "int-quantized": {"weights": {**WEIGHTS, "type": "int"}},
    "float-quantized": {
        "weights": {**WEIGHTS, "type": "float"},
        "input_activations": {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True},
    },
}


@pytest.mark.zoo
@pytest.mark.parametrize("form", COMPRESSED)
@pytest.mark.parametrize("kind", ["llama", "odd", "opt"])
def test_compressed_tensors_are_counted_dense_from_the_first_forward_on(form, kind, checkpoint, tmp_path):
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config

    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint(kind), dtype=torch.bfloat16)
    group = {"targets": ["Linear"], **COMPRESSED[form]}
    apply_quantization_config(
        model, QuantizationConfig(config_groups={"group_0": group}, ignore=["lm_head"], format=form)
    )
    for name, parameter in model.named_parameters():
        if name.endswith("_scale"):
            parameter.data.fill_(0.01)
    compressor = ModelCompressor.from_pretrained_model(model, quantization_format=form)
    compressor.compress_model(model)
    model.save_pretrained(tmp_path)
    compressor.update_config(tmp_path)

    model, graph, quantization = loaded(tmp_path)
    assert quantization.format() is not None
    assert 0 < sum(held_bytes(model).values()) < graph.size_bytes
    with torch.no_grad():
        model(torch.arange(4)[None])
    assert graph_bytes(graph) == held_bytes(model)
    assert graph_bytes(graph, "planner_bytes") == planner_sizes(tmp_path)


@pytest.fixture
def fp8_everywhere(monkeypatch):
    """Let fp8 load without an accelerator: transformers demands one to compute in fp8, but loading needs none."""
    monkeypatch.setattr(FineGrainedFP8HfQuantizer, "validate_environment", lambda self, **_: None)


FP8 = {"method": "fp8", "weight_block_size": [64, 32]}


@pytest.mark.parametrize("kind", ["llama", "mixture", "opt"])
@pytest.mark.parametrize("scale_format", ["float", "ue8m0"])
def test_fp8_sizes_are_those_that_transformers_loads(kind, scale_format, checkpoint, tmp_path, fp8_everywhere):
    asked = {**FP8, "scale_fmt": scale_format}
    if kind == "mixture":
        asked |= {"weight_block_size": [32, 32]}
    model, graph, _ = loaded(checkpoint(kind), asked)
    assert graph_bytes(graph) == held_bytes(model)
    assert graph_bytes(graph, "planner_bytes") == planner_sizes(checkpoint(kind), asked)
    model.save_pretrained(tmp_path)
    model, graph, quantization = loaded(tmp_path)
    assert quantization.is_prequantized
    assert graph_bytes(graph) == held_bytes(model)
    assert graph_bytes(graph, "planner_bytes") == planner_sizes(tmp_path)


def test_fp8_sizes_of_matrices_that_no_block_divides(checkpoint, fp8_everywhere, tmp_path):
    """Saved by hand, since transformers does not save such a checkpoint itself."""
    folder = _with_quantization(checkpoint("odd"), tmp_path, {"quant_method": "fp8"})
    model, graph, _ = loaded(folder)
    assert graph_bytes(graph) == held_bytes(model)


def _with_quantization(source, folder, quantization):
    """Save a checkpoint whose config says that it is quantised, with the weights unchanged."""
    for path in source.iterdir():
        (folder / path.name).symlink_to(path)
    config = {**json.loads((source / "config.json").read_text()), "quantization_config": quantization}
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_mxfp4_sizes_are_those_of_the_modules_that_transformers_builds():
    """A Triton kernel swizzles the weights when they are loaded; the loaded tensors are blocks with a scale for each
    32.
    """
    from transformers.integrations.mxfp4 import Mxfp4GptOssExperts

    config = transformers.GptOssConfig(
        hidden_size=128, intermediate_size=96, num_hidden_layers=1, num_local_experts=4, vocab_size=256
    )
    quantization = Quantization(METHODS["mxfp4"], {"modules_to_not_convert": ["lm_head"]}, is_prequantized=True)
    model = build_meta_model(transformers.GptOssForCausalLM, config, torch.bfloat16)
    graph = graph_of(model, torch.bfloat16, quantization)
    with torch.device("meta"):
        experts = Mxfp4GptOssExperts(config)
    path = "model.layers.0.mlp.experts."
    for name, parameter in experts.named_parameters():
        scales = 0 if name.endswith("bias") else parameter.numel() * 2 // 32
        assert graph.tensors[path + name].size_bytes == parameter.nbytes + scales
        assert graph.tensors[path + name].planner_bytes == parameter.nbytes


@pytest.mark.parametrize(
    ("kind", "quantization", "module", "expected_bytes"),
    [
        ("llama", {"bits": 4, "group_size": 128}, "model.layers.0.self_attn.q_proj", 35104),
        ("llama", {"bits": 4, "group_size": 64}, "model.layers.0.mlp.down_proj", 72736),
        ("llama", {"bits": 8, "group_size": -1}, "model.layers.0.mlp.gate_proj", 133648),
        ("odd", {"bits": 8, "group_size": -1}, "model.layers.0.mlp.down_proj", 67528),
        ("opt", {"bits": 4, "group_size": 128}, "model.decoder.layers.0.fc1", 18080),
        ("llama", {"quant_method": "awq", "group_size": 64}, "model.layers.0.mlp.gate_proj", 70656),
        ("opt", {"quant_method": "awq", "group_size": 64}, "model.decoder.layers.0.fc1", 18176),
    ],
)
def test_gptq_and_awq_sizes_are_those_of_gptqmodel(kind, quantization, module, expected_bytes, checkpoint, tmp_path):
    """Measured once with gptqmodel 7.7.0 and optimum 2.3.0 on the CPU; gptqmodel needs another version of torch than
    ours.
    """
    folder = _with_quantization(checkpoint(kind), tmp_path, {"quant_method": "gptq", **quantization})
    config = json.loads((folder / "config.json").read_text())
    graph = build_graph(
        folder,
        class_name=config["architectures"][0],
        dtype="bfloat16",
        attention=None,
        quantization=effective_quantization(None, config),
    )
    assert graph_bytes(graph)[module] == expected_bytes
    assert graph.tensors["lm_head.weight"].dtype == "bfloat16"


def test_a_checkpoint_that_is_dequantised_while_loading_is_counted_dense():
    config = {"quantization_config": {"quant_method": "fp8"}}
    assert effective_quantization(None, config, has_accelerator=False).arguments == {"dequantize": True}
    assert effective_quantization(None, config).arguments == {}
    asked = {"method": "fp8", "dequantize": True, "weight_block_size": [3, 3]}
    assert effective_quantization(asked, config).arguments == {"dequantize": True}


@pytest.mark.parametrize(
    "quantization",
    [
        {"method": "eetq"},
        {"method": "gptq"},
        {"method": "bitsandbytes", "load_in_8bit": True, "llm_int8_has_fp16_weight": True},
        {"method": "torchao", "quant_type": "Float8DynamicActivationFloat8WeightConfig"},
    ],
)
def test_an_unknown_quantization_leaves_sizes_unchanged(quantization):
    assert effective_quantization(quantization, {}).format() is None


@pytest.mark.parametrize(
    "quantization",
    [
        {"method": "bitsandbytes"},
        {"method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": True},
        {"method": "bitsandbytes", "load_in_4bit": "much"},
        {"method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf5"},
        {"method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": ["nf4"]},
        {"method": "bitsandbytes", "load_in_8bit": True, "llm_int8_skip_modules": "lm_head"},
        {"method": "torchao"},
        {"method": "torchao", "quant_type": "int8_weight_only"},
        {"method": "torchao", "quant_type": {"default": {"_type": "Int4WeightOnlyConfig", "_data": {"group_size": 0}}}},
        {"method": "quanto", "weights": "int5"},
        {"method": "quanto", "weights": ["int8"]},
        {"method": "gptq", "bits": 5},
        {"method": "gptq", "group_size": -2},
        {"method": "awq", "bits": [4]},
        {"method": "fp8", "weight_block_size": [0, 128]},
        {"method": "fp8", "dequantize": 1},
        {"method": "mxfp4", "modules_to_not_convert": [1]},
    ],
)
def test_invalid_quantization_arguments_are_refused(quantization):
    with pytest.raises(QuantizationError):
        effective_quantization(quantization, {}).format()


ARGUMENTS = {
    "awq": ("bits", "group_size", "version", "modules_to_not_convert"),
    "bitsandbytes": ("llm_int8_skip_modules", "bnb_4bit_quant_type", "bnb_4bit_quant_storage"),
    "compressed-tensors": ("config_groups", "ignore", "format"),
    "fp8": ("weight_block_size", "scale_fmt", "activation_scheme", "modules_to_not_convert", "expert_dtype"),
    "gptq": ("bits", "group_size", "block_name_to_quantize", "modules_in_block_to_quantize", "checkpoint_format"),
    "mxfp4": ("dequantize", "modules_to_not_convert"),
    "quanto": ("weights", "activations", "modules_to_not_convert"),
    "torchao": ("quant_type", "modules_to_not_convert"),
}
RIGHT = {
    "bitsandbytes": {"load_in_4bit": True},
    "compressed-tensors": {
        "config_groups": {"group_0": {"targets": ["Linear"], **COMPRESSED["int-quantized"]}},
        "format": "int-quantized",
        "quantization_status": "compressed",
    },
    "torchao": {"quant_type": "Int8WeightOnlyConfig"},
}
ODD_QUANT_TYPE = {"_type": "Int8WeightOnlyConfig", "_data": {"granularity": 3}}
ODD_GROUP = {"weights": {"strategy": "block", "block_structure": "128x128"}}
ODD_VALUES = (
    None,
    -1,
    0,
    1.5,
    True,
    "x",
    "*",
    [],
    ["*"],
    [1],
    [[]],
    {},
    {"group_0": 1},
    ODD_QUANT_TYPE,
    {"g": ODD_GROUP},
)


FLOATS = ("bfloat16", "float16", "float32", "float64")
SIZED = sorted(METHODS.keys() - {method.name for method in UNSIZED})


@pytest.mark.parametrize("method", SIZED)
def test_any_quantization_arguments_give_a_size_or_a_diagnostic(method):
    model = build_meta_model(transformers.LlamaForCausalLM, MODELS["llama"], torch.bfloat16)
    for name in ARGUMENTS[method]:
        for value in ODD_VALUES:
            quantization = Quantization(METHODS[method], {**RIGHT.get(method, {}), name: value}, is_prequantized=True)
            try:
                graph = graph_of(model, torch.bfloat16, quantization)
            except QuantizationError as error:
                assert str(error)
                assert error.help
            else:
                assert {tensor.dtype for tensor in graph.tensors.values()} <= {*PACKED_DTYPES, *FLOATS}
                assert graph.size_bytes > 0


def test_graphs_are_cached_by_their_quantization(workspace):
    def compiled(model):
        text = f"version: 1\nmodel: {model}\nhardware: {{devices: {{cuda:0: {{memory: 1GiB}}}}}}\n"
        (workspace / "profile.yaml").write_text(text)
        compilation = run_pipeline(Request(path=workspace / "profile.yaml"))
        return compilation, [each.code for each in compilation.diagnostics]

    quantized = "{source: llama, quantization: {method: bitsandbytes, load_in_8bit: true}}"
    plain, _ = compiled("{source: llama}")
    first, _ = compiled(quantized)
    assert first.model.graph.size_bytes < plain.model.graph.size_bytes
    (workspace / "profile.graph.json").write_text(vendor(first.loaded, first.model, {}).to_text())
    again, codes = compiled(quantized)
    assert again.model.graph == first.model.graph
    assert codes == []
    other, codes = compiled("{source: llama}")
    assert other.model.graph == plain.model.graph
    assert codes == ["stale-graph"]


def test_every_quantization_method_of_transformers_is_known_by_its_name():
    from transformers.utils.quantization_config import QuantizationMethod

    assert list(METHODS) == sorted(method.value for method in QuantizationMethod)
    assert sorted(file.name.replace("_", "-") for file in iter_modules(methods.__path__)) == SIZED
    assert len(METHODS) == len(SIZED) + len(UNSIZED)


def test_the_page_says_which_methods_are_counted_from_a_profile_and_which_from_a_config():
    group = {"weights": {"num_bits": 4, "strategy": "group", "group_size": 128}}
    arguments = {
        "bitsandbytes": {"load_in_4bit": True},
        "torchao": {"quant_type": {"default": {"_type": "Int8WeightOnlyConfig"}}},
        "compressed-tensors": {
            "config_groups": {"group_0": group},
            "format": "pack-quantized",
            "quantization_status": "compressed",
        },
    }
    page = (REPOSITORY / "docs" / "quantization.md").read_text(encoding="utf-8")
    for name in SIZED:
        told = []
        for is_prequantized in (False, True):
            quantization = Quantization(METHODS[name], arguments.get(name, {}), is_prequantized=is_prequantized)
            try:
                told.append("no" if quantization.format() is None else "yes")
            except QuantizationError:
                told.append("error")
        assert re.search(rf"^\| {name} \| {told[0]}\b.* \| {told[1]}\b.* \|$", page, re.MULTILINE), (name, told)


def test_methods_that_quantise_nothing_while_loading_are_those_of_transformers():
    """A calibration is required, or the quantizer has no operation for weights that it says need quantization."""
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
    from transformers.quantizers.base import HfQuantizer

    quantizers = {**AUTO_QUANTIZER_MAPPING, "bitsandbytes": AUTO_QUANTIZER_MAPPING["bitsandbytes_4bit"]}
    for name, method in METHODS.items():
        quantizer = quantizers[name]
        wants = quantizer.param_needs_quantization is not HfQuantizer.param_needs_quantization
        cannot = quantizer.get_quantize_ops is HfQuantizer.get_quantize_ops
        assert method.needs_quantized_checkpoint == (quantizer.requires_calibration or (wants and cannot)), name
        quantization = effective_quantization({"method": name}, {})
        if method.needs_quantized_checkpoint:
            with pytest.raises(QuantizationError, match="quantises no weights while loading") as raised:
                quantization.format()
            assert all(not METHODS[each].needs_quantized_checkpoint for each in QUANTISING)
            assert raised.value.help.endswith(", ".join(QUANTISING))
        prequantized = {"quantization_config": {"quant_method": name, "load_in_4bit": True, "quant_type": "AnyConfig"}}
        effective_quantization(None, prequantized).format()


def test_torchaos_config_is_completed_as_torchao_wants_it():
    whole = {"_type": "Int8WeightOnlyConfig", "_version": 2, "_data": {}}
    for said in ("Int8WeightOnlyConfig", {"default": "Int8WeightOnlyConfig"}, {"_type": "Int8WeightOnlyConfig"}, whole):
        arguments = transformers_arguments({"method": "torchao", "quant_type": said})
        assert arguments == {"quant_method": "torchao", "quant_type": {"default": whole}}
    with pytest.raises(QuantizationError) as raised:
        effective_quantization({"method": "torchao", "quant_type": "int8_weight_only"}, {}).format()
    assert raised.value.help == "write `quant_type: Int8WeightOnlyConfig`"


def test_methods_that_lower_the_planners_budgets_are_those_of_transformers():
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
    from transformers.quantizers.base import HfQuantizer

    quantizers = {**AUTO_QUANTIZER_MAPPING, "bitsandbytes": AUTO_QUANTIZER_MAPPING["bitsandbytes_4bit"]}
    for name, method in METHODS.items():
        assert method.lowers_budgets == (quantizers[name].adjust_max_memory is not HfQuantizer.adjust_max_memory), name
