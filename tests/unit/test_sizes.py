"""The bytes of weights depend on their device: buffers, and quantizers that leave modules on the CPU dense."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from devmap_config.cli.compile import compile_command
from devmap_config.cli.plan_table import plan_lines
from devmap_config.compiler import Request, run_pipeline
from devmap_config.devices import CPU, DISK, Device
from devmap_config.execution.assignment import Assignment, Location
from devmap_config.execution.executor import LEFT, OFFLOADED
from devmap_config.execution.units import fold
from devmap_config.graph.cache import library_versions
from devmap_config.graph.model import ModelGraph, Module, ModulePath, Tensor, TensorName
from devmap_config.graph.serialization import graph_from_json, graph_to_json
from devmap_config.graph.source import digest
from devmap_config.locked import compile_locked
from devmap_config.placement.problem import Aim, Problem
from devmap_config.placement.strategies import Infeasible, Placed, place
from devmap_config.plan.drift import Drift
from devmap_config.plan.lock import lock_of, read_lock
from devmap_config.plan.plan import Plan, assemble
from devmap_config.plan.verify import verify
from devmap_config.runner.inspection import misread_by_quantizer, unquantized_tensors
from devmap_config.simulate.memory import simulation_of

LLAMA_13B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "dtype": "float16",
    "hidden_size": 5120,
    "intermediate_size": 13824,
    "num_hidden_layers": 40,
    "num_attention_heads": 40,
    "num_key_value_heads": 40,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True}

MAP_OF_8_LAYERS = """\
version: 1
model: {{source: big}}
workload: {{context_length: 512}}
hardware: {{devices: {{cuda:0: {{memory: {memory}}}, cpu: {{memory: 30GiB}}}}}}
placement:
  strategy: manual
  device_map: {{model.embed_tokens: 0, "model.layers.[0-7]": 0, "model.layers.[8-39]": cpu, model.norm: cpu,
               model.rotary_emb: 0, lm_head: cpu}}
  offload: {{{offload}}}
"""

FASTEST_IN_4_BIT = """\
version: 1
model:
  source: big
  quantization: {method: bitsandbytes, load_in_4bit: true, llm_int8_enable_fp32_cpu_offload: true}
workload: {context_length: 2048}
hardware: {devices: {cuda:0: {accelerator: rtx-3060, memory: 8GiB}, cpu: {memory: 64GiB}}}
placement: {strategy: fastest}
"""

GIB = 2**30
FIRST_CARD, SECOND_CARD = Device("cuda", 0), Device("cuda", 1)

IN_4_BIT = "llama, quantization: {method: bitsandbytes, load_in_4bit: true, llm_int8_enable_fp32_cpu_offload: true}"


def compiled(text):
    Path("profile.yaml").write_text(text)
    return run_pipeline(Request(path=Path("profile.yaml")))


def drift_of(lock):
    return compile_locked(Path("profile.yaml"), lock)[1]


def errors(compilation):
    return [each for each in compilation.diagnostics if each.severity == "error"]


def used_bytes(plan, device):
    (use,) = (each for each in plan.devices if str(each.id) == device)
    return use.capacity_bytes - use.free_bytes


@pytest.fixture
def big(workspace):
    """Return the config of a model of 13 billion parameters, as given."""

    def write(**more):
        Path("big").mkdir(exist_ok=True)
        Path("big/config.json").write_text(json.dumps({**LLAMA_13B, **more}))

    return write


# -- buffers


def test_buffers_are_offloaded_if_nothing_else_fits(big):
    big(quantization_config=GPTQ)
    fits = compiled(MAP_OF_8_LAYERS.format(memory="4GiB", offload="")).plan
    assert fits.executor.offload_buffers
    assert used_bytes(fits, "cuda:0") < 3 * GIB

    left = compiled(MAP_OF_8_LAYERS.format(memory="8GiB", offload="")).plan
    assert not left.executor.offload_buffers
    assert 7.2 * GIB < used_bytes(left, "cuda:0") < 7.4 * GIB


def test_buffers_that_must_stay_and_do_not_fit_are_an_error(big):
    big(quantization_config=GPTQ)
    compilation = compiled(MAP_OF_8_LAYERS.format(memory="4GiB", offload="buffers: false"))
    (finding,) = errors(compilation)
    assert (finding.code, finding.span.line, finding.span.column) == ("over-capacity", 9, 22)
    assert "buffers: false" in finding.message
    assert "2.5 GiB" in finding.message
    assert "buffers: true" in finding.help

    (finding,) = errors(compiled(MAP_OF_8_LAYERS.format(memory="1GiB", offload="buffers: false")))
    assert "buffers: true" not in finding.help  # it would not fit with these either


def test_offload_buffers_of_a_profile_is_followed(workspace):
    text = """\
version: 1
model: {source: quantized}
hardware: {devices: {cuda:0: {memory: 1GiB}, cpu: {memory: 1GiB}}}
placement: {strategy: auto, offload: {buffers: true}}
"""
    assert compiled(text).plan.executor.offload_buffers
    assert not compiled(text.replace("{buffers: true}", "{}")).plan.executor.offload_buffers


def test_buffers_that_transformers_always_offloads_are_offloaded(workspace):
    config = json.loads(Path("llama/config.json").read_text()) | {"quantization_config": {"quant_method": "fbgemm_fp8"}}
    Path("llama/config.json").write_text(json.dumps(config))
    text = """\
version: 1
model: {source: llama}
hardware: {devices: {cuda:0: {memory: 1GiB}, cpu: {memory: 1GiB}}}
placement: {pins: [{match: model.layers.0, device: cpu}], offload: {buffers: false}}
"""
    assert compiled(text).plan.executor.offload_buffers


def test_buffers_of_an_unknown_quantizer_are_offloaded(workspace):
    config = json.loads(Path("quantized/config.json").read_text())
    config["quantization_config"]["bits"] = 3
    Path("quantized/config.json").write_text(json.dumps(config))
    text = """\
version: 1
model: {source: quantized}
hardware: {devices: {cuda:0: {memory: 1GiB}, cpu: {memory: 1GiB}}}
placement: {strategy: sequential, pins: [{match: lm_head, device: cpu}]}
"""
    compilation = compiled(text)
    assert [each.code for each in compilation.diagnostics] == ["quantization-not-measured"]
    assert compilation.plan.streams_buffers
    assert not compiled(text.replace("lm_head, device: cpu", "lm_head, device: 0")).plan.streams_buffers


@pytest.mark.parametrize("strategy", ["sequential", "fastest"])
def test_offloading_beside_apples_gpu_saves_no_memory(workspace, strategy):
    text = f"""\
version: 1
model: {{source: llama}}
hardware: {{devices: {{mps: {{memory: MEMORY, bandwidth: 1TB/s}}, cpu: {{memory: 1GiB}}}}, links: {{host: 25GB/s}}}}
placement: {{strategy: {strategy}, pins: [{{match: "model.layers.0", device: cpu}}]}}
"""
    plan = compiled(text.replace("MEMORY", "1GiB")).plan
    held = {str(use.id): use.weights_bytes for use in plan.devices}
    assert held["cpu"] == 0
    assert plan.prediction.streamed_bytes_per_token == 0
    (finding,) = errors(compiled(text.replace("MEMORY", f"{held['mps'] - 1}")))
    assert finding.code == "over-capacity"


CARD = "{memory: 300KiB, bandwidth: 1TB/s, flops: 100TFLOP/s}"
SMALL = f"""\
version: 1
model: {{source: quantized}}
workload: {{context_length: 64}}
hardware:
  devices: {{cuda:0: {CARD}, cpu: {{memory: 1GiB}}}}
  links: {{host: 25GB/s}}
placement: {{strategy: STRATEGY}}
"""


@pytest.mark.parametrize("strategy", ["fastest", "longest-context", "fewest-devices"])
def test_our_strategies_offload_buffers_if_that_is_better(workspace, strategy):
    compilation = compiled(SMALL.replace("STRATEGY", strategy))
    plan = compilation.plan
    assert plan.executor.offload_buffers
    assert any(str(each.location.stored_on) == "cpu" for each in plan.assignments)
    assert plan.prediction.streamed_bytes_per_token > 0
    (finding,) = errors(compiled(SMALL.replace("STRATEGY}", f"{strategy}, offload: {{buffers: false}}}}")))
    assert "`buffers: true`" in finding.help

    roomy = compiled(SMALL.replace("STRATEGY", strategy).replace("300KiB", "8MiB")).plan
    assert roomy.executor.offload_buffers == (strategy == "longest-context")


def test_a_lock_records_whether_buffers_are_offloaded(big):
    big(quantization_config=GPTQ)
    text = MAP_OF_8_LAYERS.format(memory="4GiB", offload="")
    compilation = compiled(text)
    made_with, hardware = library_versions(), compilation.inventory.accelerators_to_json()
    lock = read_lock(lock_of(compilation.plan, compilation.inputs, {}, made_with, hardware).to_text())
    assert lock.plan["offload_buffers"] is True
    assert drift_of(lock) is None
    forged = replace(lock, plan={**lock.plan, "offload_buffers": False})
    assert isinstance(drift_of(forged), Drift)
    text = MAP_OF_8_LAYERS.format(memory="4GiB", offload="buffers: true")
    compilation = compiled(text)
    lock = lock_of(replace(compilation.plan, executor=LEFT), compilation.inputs, {}, made_with, hardware)
    assert "profile rules out" in drift_of(lock).message


def test_offloaded_buffers_are_reported(big):
    big(quantization_config=GPTQ)
    compilation = compiled(MAP_OF_8_LAYERS.format(memory="4GiB", offload=""))
    heading, *_, note = (line.plain for line in plan_lines(compilation, 140) if hasattr(line, "plain"))
    assert ": 6.8 GiB in float16, gptq 4 bit, placed by" in heading
    assert "offload_buffers=True" in note
    arguments = ["profile.yaml", "--dry-run", "--no-simulate", "--format", "device-map"]
    done = CliRunner().invoke(compile_command, arguments, standalone_mode=False)
    assert "offload_buffers=True" in done.stderr
    assert json.loads(done.stdout)["lm_head"] == "cpu"


# -- what a quantizer leaves as it is on the CPU


def test_layers_are_4_bit_on_the_card_and_dense_on_the_cpu(big):
    big()
    compilation = compiled(FASTEST_IN_4_BIT)
    warning, passed_over = compilation.diagnostics
    assert passed_over.code == "cpu-passed-over"
    assert (warning.code, warning.help) == (
        "computes-in-float32",
        "write `bnb_4bit_compute_dtype: float16`; or `float32`, if that is meant",
    )
    plan, graph = compilation.plan, compilation.model.graph
    layers = {str(each.location.stored_on): each for each in plan.assignments if each.unit.startswith("model.layers.")}
    on_card = [
        each
        for each in plan.assignments
        if each.unit.startswith("model.layers.") and str(each.location.stored_on) != "cpu"
    ]
    assert 24 <= len(on_card) <= 27
    layer_bytes = {
        device: graph.weights_bytes(each.tensors, each.tensors if device == "cpu" else ())
        for device, each in layers.items()
    }
    assert 0.16 * GIB < layer_bytes["cuda:0"] < 0.17 * GIB
    assert layer_bytes["cpu"] == 2 * (4 * 5120**2 + 3 * 5120 * 13824 + 2 * 5120)
    heading = next(plan_lines(compilation, 140)).plain
    assert "bitsandbytes fp4 4 bit (what is on the CPU stays in float16: 13.6 GiB in all)" in heading


def test_the_copy_of_a_weight_for_computing_has_the_compute_dtypes_size(big):
    big()

    def active_bytes(computes_in):
        said = f"load_in_4bit: true, bnb_4bit_compute_dtype: {computes_in}"
        compilation = compiled(FASTEST_IN_4_BIT.replace("load_in_4bit: true", said))
        assert [each.code for each in compilation.diagnostics] == ["cpu-passed-over"]
        return next(use.activation_bytes for use in compilation.plan.devices if str(use.id) == "cuda:0")

    assert active_bytes("float32") - active_bytes("float16") == 2 * 5120 * 13824


@pytest.mark.parametrize(
    ("quantization", "copy_bytes", "token_bytes"),
    [
        ("method: torchao, quant_type: Int8WeightOnlyConfig", 2, 1 + 4),
        ("method: torchao, quant_type: Float8WeightOnlyConfig", 10, 1 + 20),
        ("method: quanto, weights: int8", 2, 1 + 4),
        ("method: quanto, weights: int4", 2, 0.5),
        ("method: bitsandbytes, load_in_8bit: true", 2, 1),
    ],
)
def test_a_token_writes_and_reads_the_dequantised_copies(quantization, copy_bytes, token_bytes, big):
    big()

    def costs(model):
        compilation = compiled(
            f"version: 1\nmodel: {{source: big{model}}}\nworkload: {{context_length: 512}}\n"
            "hardware: {devices: {cuda:0: {memory: 40GiB}}}\nplacement: {strategy: single}\n"
        )
        found = {each.path: each for each in compilation.model.graph.measurement.modules}
        return found["model.layers.0.mlp.down_proj"]

    dense, quantised = costs(""), costs(f", quantization: {{{quantization}}}")
    elements = 5120 * 13824
    assert quantised.own_peak_bytes - dense.own_peak_bytes == copy_bytes * elements
    assert quantised.decode_touched_bytes / elements == pytest.approx(token_bytes, rel=0.08)  # scales take some


def test_our_strategies_count_dense_layers_on_the_cpu(big):
    big()
    compilation = compiled(FASTEST_IN_4_BIT.replace("context_length: 2048", "context_length: 512"))
    needed = used_bytes(compilation.plan, "cpu")
    aim = Aim(phases=(("decode", 1),), inventory=compilation.inventory)

    def placed(cpu_bytes):
        capacities = {**compilation.inventory.capacities, CPU: cpu_bytes}
        return place(Problem(compilation.model.graph, capacities, aim=aim), "fastest")

    assert isinstance(placed(needed), Placed)
    assert isinstance(placed(needed - 1), Infeasible)  # though as many bytes would do in 4 bit


def test_nothing_is_quantised_if_all_is_on_the_cpu(workspace):
    text = f"""\
version: 1
model: {{source: {IN_4_BIT}}}
hardware: {{devices: {{cuda:0: {{memory: 1GiB}}, cpu: {{memory: 1GiB}}}}}}
placement: {{strategy: single, device: DEVICE}}
"""
    dense, quantised = (
        used_bytes(compiled(text.replace("DEVICE", device)).plan, device) for device in ("cpu", "cuda:0")
    )
    plain = compiled(text.replace("DEVICE", "cpu").replace(IN_4_BIT, "llama")).plan
    assert dense == used_bytes(plain, "cpu")
    assert quantised < dense


def test_a_quantised_checkpoint_cannot_be_dense_on_the_cpu(workspace):
    quantized = {"quant_method": "bitsandbytes", "load_in_4bit": True, "llm_int8_enable_fp32_cpu_offload": True}
    config = json.loads(Path("llama/config.json").read_text()) | {"quantization_config": quantized}
    Path("llama/config.json").write_text(json.dumps(config))
    text = """\
version: 1
model: {source: llama}
hardware: {devices: {cuda:0: {memory: 1GiB}, cpu: {memory: 1GiB}}}
placement: {pins: [{match: model.layers.0, device: cpu}]}
"""
    (finding,) = errors(compiled(text))
    assert finding.code == "quantizer-refuses"
    assert "of a quantised checkpoint" in finding.message


# -- every figure of a plan, added up anew


@pytest.fixture
def graphs(workspace):
    profile = """\
version: 1
model: {source: SOURCE}
workload: {context_length: 16}
hardware: {devices: {cuda:0: {memory: 1GiB}}}
"""

    return [compiled(profile.replace("SOURCE", source)).model.graph for source in ("quantized", IN_4_BIT, "llama")]


@pytest.mark.parametrize("executor", [LEFT, OFFLOADED])
def test_a_plans_bytes_are_the_sum_of_its_tensors(graphs, executor):
    choice = random.Random(0)
    places = [(FIRST_CARD, None), (SECOND_CARD, None), (CPU, None), (CPU, CPU), (DISK, None)]
    for graph in graphs * 5:
        homes = {}
        for block in graph.blocks:
            homes |= dict.fromkeys((tensor.name for tensor in graph.modules[block].tensors()), choice.choice(places))
        homes[next(iter(graph.tensors))] = (FIRST_CARD, None)
        plan = assemble(
            graph,
            fold(graph, homes),
            dict.fromkeys([FIRST_CARD, SECOND_CARD, CPU, DISK], GIB),
            strategy="manual",
            executor=executor,
        )
        held, copied, pieces = {}, 0, {}
        for name, tensor in graph.tensors.items():
            stored_on, compute = homes[name]
            is_streamed = stored_on in (CPU, DISK) and compute is None
            size_bytes = tensor.size_bytes
            if is_streamed and tensor.offloaded_bytes is not None:
                size_bytes = tensor.element_count * 2
            is_buffer = tensor.kind == "buffer" or tensor.in_buffer
            leaves = is_streamed and is_buffer and not (executor.offload_buffers and tensor.persistent)
            home = FIRST_CARD if leaves else stored_on
            held[home] = held.get(home, 0) + size_bytes
            if is_streamed and not leaves:
                copied += size_bytes
                module = name.rpartition(".")[0]
                pieces[module] = pieces.get(module, 0) + size_bytes
        assert {use.id: use.weights_bytes for use in plan.devices if use.weights_bytes} == held
        assert plan.prediction.streamed_bytes_per_token == copied
        assert plan.devices[0].overhead_bytes == max(pieces.values(), default=0)
        kinds = {violation.kind for violation in verify(plan, graph, dict.fromkeys(held, GIB))}
        assert "over-capacity" not in kinds
        tight = {use.id: max(use.capacity_bytes - use.free_bytes, use.loading_bytes) for use in plan.devices}
        assert "over-capacity" not in {each.kind for each in verify(plan, graph, tight)}
        tight[FIRST_CARD] -= 1
        assert "over-capacity" in {each.kind for each in verify(plan, graph, tight)}


def test_a_quantised_graph_round_trips_through_json(graphs):
    for graph in graphs:
        assert graph_from_json(json.loads(json.dumps(graph_to_json(graph)))) == graph
    plain = graph_to_json(graphs[2])
    assert digest(plain["root"]) == digest(graph_to_json(graph_from_json(plain))["root"])
    assert all(len(each) == 7 for each in plain["root"][4][1][2])  # nothing is added to the graphs of most models


# -- how a quantizer reads the map


def linear(path):
    weight = Tensor(TensorName(f"{path}.weight"), (4, 4), "uint8", 8, 8, offloaded_bytes=32)
    return Module(ModulePath(path), "Linear", (weight,))


def plan_with(graph, homes):
    return Plan(
        strategy="manual",
        executor=LEFT,
        main_device=FIRST_CARD,
        assignments=tuple(
            Assignment(
                unit, tuple(n for n in graph.tensors if f"{n}.".startswith(f"{unit}.")), Location(home, FIRST_CARD)
            )
            for unit, home in homes.items()
        ),
        devices=(),
    )


@pytest.mark.parametrize(
    ("homes", "subject"),
    [
        ({"head": CPU, "inner_head": FIRST_CARD}, "inner_head.weight"),  # a key is also the end of another's name
        ({"head.weight": CPU, "inner_head": FIRST_CARD}, "head.weight"),  # the key of a tensor is no module's name
        ({"head": CPU, "inner_head": CPU}, None),
        ({"head": FIRST_CARD, "inner_head": CPU}, None),
    ],
)
def test_verifier_finds_a_map_that_a_quantizer_misreads(homes, subject):
    root = Module(ModulePath(""), "Model", children=(linear("head"), linear("inner_head")))
    found = verify(plan_with(ModelGraph(root), homes), ModelGraph(root), {})
    assert [each.subjects for each in found if "as it is" in each.message or "is quantised" in each.message] == (
        [] if subject is None else [(subject,)]
    )


def test_a_layer_whose_name_begins_like_one_on_the_cpu_is_misread():
    layers = Module(ModulePath("layers"), "ModuleList", children=(linear("layers.1"), linear("layers.10")))
    graph = ModelGraph(Module(ModulePath(""), "Model", children=(layers,)))
    plan = plan_with(graph, {"layers.1": CPU, "layers.10": FIRST_CARD})
    before_5_21 = tuple(map(int, version("transformers").split(".")[:2])) < (5, 21)
    assert misread_by_quantizer(plan, graph) == (("layers.10.weight",) if before_5_21 else ())


def test_tensors_left_unquantised_are_found():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.head = torch.nn.Linear(4, 4, bias=False)
            self.inner_head = torch.nn.Linear(4, 4, bias=False)
            packed = torch.zeros(8, 1, dtype=torch.uint8)
            self.packed = torch.nn.Module()
            self.packed.weight = torch.nn.Parameter(packed, requires_grad=False)

        def get_parameter_or_buffer(self, name):
            return self.get_parameter(name)

    root = Module(ModulePath(""), "Model", children=(linear("head"), linear("inner_head"), linear("packed")))
    graph = ModelGraph(root)
    plan = plan_with(graph, {"head": CPU, "inner_head": FIRST_CARD, "packed": FIRST_CARD})
    assert unquantized_tensors(Model(), plan, graph) == ("inner_head.weight",)


def test_missing_bytes_are_computed_with_buffers_offloaded(big):
    big(quantization_config=GPTQ)
    (finding,) = errors(compiled(MAP_OF_8_LAYERS.format(memory="1GiB", offload="")))
    (with_buffers,) = errors(compiled(MAP_OF_8_LAYERS.format(memory="1GiB", offload="buffers: true")))
    assert finding == with_buffers


@pytest.mark.parametrize("source", ["quantized", IN_4_BIT])
@pytest.mark.parametrize("buffers", ["true", "false"])
def test_dry_run_copies_the_bytes_that_the_plan_predicts(workspace, source, buffers):
    compilation = compiled(
        f"""\
version: 1
model: {{source: {source}}}
workload: {{context_length: 16}}
hardware: {{devices: {{cuda:0: {{memory: 1GiB}}, cpu: {{memory: 1GiB}}}}}}
placement:
  pins: [{{match: "model.layers.[1-2]", device: cpu}}]
  offload: {{buffers: {buffers}}}
"""
    )
    simulation = simulation_of(compilation.plan, compilation.model)
    assert simulation.outcome == "runs"
    copied = {link.phase: link.weights_bytes for link in simulation.links if link.weights_bytes}
    assert copied == dict.fromkeys(("prefill", "decode"), compilation.plan.prediction.streamed_bytes_per_token)
