"""Weights copied ahead to an accelerator are there when a module computes, and not overwritten meanwhile.

The accelerator is simulated (`late_copies.py`): each of its two streams must wait for the other.
"""

from __future__ import annotations

import gc
import os
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.hooks import attach_align_device_hook_on_blocks
from accelerate.utils import OffloadedWeightsLoader
from late_copies import POISON, LateCopies
from safetensors.torch import save_file
from small_models import MODELS as SMALL_MODELS
from small_models import TOKENS
from transformers import (
    LlamaForCausalLM,
    ViTConfig,
    ViTModel,
)

from devmap_config.devices import CPU, Device
from devmap_config.dispatch.loads import ALIGNMENT_BYTES, Load, TensorPlace, loads_of, streamed_pieces
from devmap_config.dispatch.streamed_weights import attach
from devmap_config.dispatch.streamer import ReaderThread, Slot, Streamer
from devmap_config.dispatch.weights_on_disk import TensorInFile, pages
from devmap_config.execution.assignment import Location
from devmap_config.execution.executor import AHEAD
from devmap_config.execution.pieces import copied_bytes, pieces_ahead, pieces_of
from devmap_config.graph.introspection import graph_of

MODELS = SMALL_MODELS | {
    "own tokens around its modules": lambda: ViTModel(
        ViTConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
            image_size=32,
            patch_size=4,
        )
    ),
}
CARD = Device("cuda", 0)


def outputs(model):
    given = {"decoder_input_ids": TOKENS} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        if isinstance(model, ViTModel):
            return model(pixel_values=torch.linspace(-1, 1, 3 * 32 * 32).view(1, 3, 32, 32)).last_hidden_state
        return model(input_ids=TOKENS, **given).logits


def offloaded(model, folder=None, is_on_disk=lambda _name: True):
    """Attach accelerate's hooks as for a map in which children of the model, or of its inner model, are streamed.

    With a folder, tensors for which `is_on_disk` are streamed from a file in it.
    """
    inner = dict(model.named_children())
    units = [
        f"{path}.{name}" if name else path
        for path, child in inner.items()
        for name in (dict(child.named_children()) if len(inner) < 3 and list(child.children()) else [""])
    ]
    held, index = dict(model.state_dict()), {}
    if folder is not None:
        path = folder / "model.safetensors"
        weights = {name: held.pop(name) for name in list(held) if is_on_disk(name)}
        files = {tensor.data_ptr(): name for name, tensor in weights.items()}  # what is shared is there once
        save_file({name: weights[name].contiguous() for name in files.values()}, path)
        for name, tensor in weights.items():
            index[name] = {"safetensors_file": str(path), "weight_name": files[tensor.data_ptr()], "dtype": "float32"}
    loader = OffloadedWeightsLoader(state_dict=held, index=index)
    attach_align_device_hook_on_blocks(
        model,
        execution_device=dict.fromkeys(["", *units], torch.device("cpu")),
        offload=dict.fromkeys(units, True),
        weights_map=loader,
    )
    return loader


def pieces(graph):
    """Return the planned loads of a model that is all on the CPU, and the bytes of their slots."""
    homes = dict.fromkeys(graph.tensors, Location(CPU, CARD))
    sizes = [copied_bytes(graph, piece, homes, AHEAD, CARD).get(CARD, 0) for piece in pieces_of(graph, AHEAD, CARD)]
    return pieces_ahead(graph, homes, AHEAD, CARD), max(sizes)


def streaming(model, order=(), folder=None):
    graph = graph_of(model, torch.float32)
    planned, slot_bytes = pieces(graph)
    place = {path: place for place, path in enumerate(order)}
    ordered = sorted(planned, key=lambda paths: place.get(paths[0], 0))
    streams, streamed = LateCopies(), streamed_pieces(model, ordered, folder)
    loads = loads_of(streamed)
    for module in (module for piece in streamed for module in piece.hooks):
        streams.watch(module)
    largest_bytes = max(load.size_bytes for load in loads)
    assert slot_bytes <= largest_bytes <= slot_bytes + ALIGNMENT_BYTES * len(graph.tensors)
    slots = tuple(Slot(torch.full((largest_bytes,), POISON, dtype=torch.uint8)) for _ in range(2))
    staging = [pages(max(load.piece.size_bytes for load in loads if load.piece)) for _ in range(2) if folder]
    attach(streamed, loads, Streamer(loads, streams, slots, ReaderThread(streams, staging)))
    return streams, loads


@pytest.mark.parametrize("name", MODELS)
def test_logits_of_streamed_weights_are_those_of_a_resident_model(name):
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    expected = outputs(model)
    offloaded(model)
    streams, loads = streaming(model)
    assert len(loads) > 2
    for _ in range(3):
        assert torch.equal(outputs(model), expected)
    assert streams.computed
    assert len(streams.copies) > 2 * len(loads)
    assert all(parameter.is_meta for load in loads for module in load.places for parameter in module.parameters())


@pytest.mark.parametrize(
    "is_on_disk",
    [lambda _name: True, lambda name: any(f".{index}." in name for index in "02")],
    ids=["all", "in turn with the CPU"],
)
@pytest.mark.parametrize(
    "name", ["dense", "tied head", "encoder and decoder", "parameters around modules in every block"]
)
def test_logits_of_weights_on_disk_are_those_of_a_resident_model(name, is_on_disk, tmp_path):
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    expected, order = outputs(model), run_order(model)
    offloaded(model, tmp_path, is_on_disk)
    streams, loads = streaming(model, order, tmp_path)
    on_disk = [load for load in loads if load.piece is not None]
    assert len(on_disk) > 1
    assert all(load.memory is None for load in on_disk)
    for _ in range(3):
        assert torch.equal(outputs(model), expected)
    assert streams.computed


@pytest.fixture
def read(tmp_path):
    """A model that is all on disk, with its streams, loads and file."""
    model = MODELS["dense"]().eval()
    order = run_order(model)
    offloaded(model, tmp_path)
    return (model, *streaming(model, order, tmp_path), tmp_path / "model.safetensors")


def test_the_next_load_is_read_while_a_module_computes(read, monkeypatch):
    model, _streams, loads, _file = read
    outputs(model)
    began, fetched = [], []
    fetch = ReaderThread.fetch
    monkeypatch.setattr(
        ReaderThread,
        "fetch",
        lambda self, load, *rest: (fetched.append(loads.index(load)), fetch(self, load, *rest))[1],
    )
    for number, load in enumerate(loads):
        first = next(iter(load.places))
        watched = first._old_forward
        first._old_forward = lambda *given, watched=watched, number=number: (
            began.append((number, list(fetched))),
            watched(*given),
        )[1]
    outputs(model)
    following = [*range(1, len(loads)), 0]
    assert all(following[number] in fetched_by_then for number, fetched_by_then in began)
    assert fetched == following


def test_a_failed_read_is_an_error_and_is_retried(read):
    model, _streams, loads, file = read
    expected, content = outputs(model), file.read_bytes()
    os.truncate(file, 4096)
    for _ in range(2):
        with pytest.raises(OSError, match=r"`model.safetensors` ends at .* bytes, before its tensors do"):
            outputs(model)
    file.write_bytes(content)
    for _ in range(2):
        assert torch.equal(outputs(model), expected)
    assert all(each.is_meta for load in loads for module in load.places for each in module.parameters())


def run_order(model):
    order = []
    hooks = [
        module.register_forward_pre_hook(lambda *_, path=path: order.append(path))
        for path, module in model.named_modules()
    ]
    outputs(model)
    for hook in hooks:
        hook.remove()
    return order


@pytest.fixture
def dense():
    """A model whose modules are streamed in the order in which they run, with its streams and loads."""
    model = MODELS["dense"]().eval()
    order = run_order(model)
    offloaded(model)
    return (model, *streaming(model, order))


def test_each_load_is_copied_once_per_forward_before_it_is_needed(dense):
    model, streams, loads = dense
    outputs(model)
    asked, copied = [], len(streams.copies)
    for load in loads:
        first = next(iter(load.places))
        first.register_forward_pre_hook(
            lambda *_, load=load: asked.append([*map(id, sources(streams))][-1] == id(load.memory))
        )
    outputs(model)
    assert asked == [True] * len(loads)
    assert [*map(id, sources(streams))][copied:] == [id(load.memory) for load in (*loads[1:], loads[0])]


def sources(streams):
    return [copy.source for copy in streams.copies]


def test_an_unknown_order_of_loads_is_learnt():
    model = MODELS["dense"]().eval()
    offloaded(model)
    paths = [path for path, _ in model.named_modules()]
    streams, _loads = streaming(model, sorted(paths, key=lambda path: "layers.1" not in path))
    copies = []
    for _ in range(4):
        before = len(streams.copies)
        outputs(model)
        copies.append(len(streams.copies) - before)
    assert copies[0] > copies[1] > copies[2]  # in the second, it is learnt what is first in the next
    assert copies[3] == copies[2]


def test_loads_cover_all_modules_and_none_exceeds_the_largest(dense):
    model, _streams, loads = dense
    largest = max(sum(each.nbytes for each in module.parameters()) for load in loads for module in load.places)
    assert max(load.memory.nbytes for load in loads) == largest
    held = [module for load in loads for module in load.places]
    assert len(held) == len(set(held)) == sum(1 for each in model.modules() if list(each.parameters(recurse=False)))


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failed_forward_frees_its_slots(dense, error):
    model, _streams, loads = dense
    expected = outputs(model)
    broken = model.model.layers[1].mlp.down_proj

    def fail(*_):
        raise error("out of memory")

    forward, broken._old_forward = broken._old_forward, fail  # what accelerate's hook is around
    for _ in range(3):
        with pytest.raises(error, match="out of memory"):
            outputs(model)
    broken._old_forward = forward
    assert all(each.is_meta for load in loads for module in load.places for each in module.parameters())
    assert torch.equal(outputs(model), expected)
    with ThreadPoolExecutor(1) as other:
        assert torch.equal(other.submit(outputs, model).result(timeout=60), expected)


def test_an_interrupted_copy_is_repeated(dense, monkeypatch):
    """Its progress is unknown, and the previous content of the slot is gone."""
    model, streams, _loads = dense
    expected, copy = outputs(model), streams.copy

    def interrupted(source, target):
        copy(source, target)
        if len(streams.copies) == last:
            raise KeyboardInterrupt

    monkeypatch.setattr(streams, "copy", interrupted)
    for more in range(1, 7):
        last = len(streams.copies) + more
        with pytest.raises(KeyboardInterrupt):
            outputs(model)
        assert torch.equal(outputs(model), expected)


def test_concurrent_forwards_do_not_overwrite_each_others_weights(dense, monkeypatch):
    """While one computes with its weights, the other's copies must not overwrite them."""
    model, _streams, _loads = dense
    expected, linear = outputs(model), torch.nn.functional.linear
    at_work, others_done = threading.Event(), threading.Event()

    def slowly(*arguments):
        if threading.current_thread() is not threading.main_thread() and not at_work.is_set():
            at_work.set()
            others_done.wait(0.5)
        return linear(*arguments)

    monkeypatch.setattr(torch.nn.functional, "linear", slowly)
    with ThreadPoolExecutor(1) as other:
        found = other.submit(outputs, model)
        at_work.wait()
        assert torch.equal(outputs(model), expected)
        others_done.set()
        assert torch.equal(found.result(), expected)


def test_a_failed_thread_does_not_block_the_others(dense):
    model, _streams, _loads = dense
    expected = outputs(model)
    hook = model.lm_head.register_forward_pre_hook(lambda *_: 1 / 0)
    with ThreadPoolExecutor(1) as other:
        assert isinstance(other.submit(outputs, model).exception(), ZeroDivisionError)
    hook.remove()
    assert torch.equal(outputs(model), expected)


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.half(),
        lambda model: torch.nn.init.zeros_(model.lm_head.weight),
        lambda model: setattr(model.lm_head, "weight", torch.nn.Parameter(torch.zeros(256, 64))),
    ],
    ids=["another dtype", "written to", "replaced"],
)
def test_changing_streamed_weights_is_an_error(dense, change):
    model, _streams, _loads = dense
    change(model)
    with pytest.raises(RuntimeError, match="was changed, which is copied to the accelerator as it was loaded"):
        outputs(model)


def test_a_merged_adapter_is_used(dense):
    """PEFT merges through the hook, outside of a call."""
    model, _streams, _loads = dense
    expected, head = outputs(model), model.lm_head
    head._hf_hook.pre_forward(head)
    head.weight = torch.nn.Parameter(2 * head.weight.detach(), requires_grad=False)
    head._hf_hook.weights_map = {"weight": head.weight.to("cpu")}
    head._hf_hook.post_forward(head, torch.tensor([]))
    for _ in range(2):
        assert torch.equal(outputs(model), 2 * expected)


def test_a_streamed_model_can_be_saved(dense, tmp_path):
    model, _streams, _loads = dense
    expected = outputs(model)
    model.hf_device_map = {"": "cpu"}
    model.save_pretrained(tmp_path)
    assert torch.equal(outputs(LlamaForCausalLM.from_pretrained(tmp_path)), expected)
    assert torch.equal(outputs(model), expected)


def test_modules_within_a_module_with_parameters_are_in_its_load():
    model = MODELS["parameters around modules in every block"]().eval()
    offloaded(model)
    _streams, loads = streaming(model)
    for layer in model.backbone.layers:
        within = [module for module in layer.mixer.modules() if list(module.parameters(recurse=False))]
        assert layer.mixer in within
        assert sum(set(within) <= set(load.places) for load in loads) == 1


@pytest.mark.parametrize("name", ["tied head", "a bias that is shared with a module within"])
def test_shared_weights_are_pinned_once_and_copied_once_per_token(name):
    model = MODELS[name]().eval()
    order, held = run_order(model), [parameter.nbytes for parameter in model.parameters()]
    offloaded(model)
    streams, loads = streaming(model, order)
    assert 0 <= sum(load.memory.nbytes for load in loads) - sum(held) < ALIGNMENT_BYTES * len(held)
    outputs(model)
    before = len(streams.copies)
    outputs(model)
    assert [*map(id, sources(streams))][before:] == [id(load.memory) for load in (*loads[2:], *loads[:2])]


def test_streamed_weights_are_held_once_and_freed_with_the_model():
    model = MODELS["dense"]().eval()
    loader = offloaded(model)
    names, held = list(loader.state_dict), [weakref.ref(each) for each in loader.state_dict.values()]
    streams, loads = streaming(model)
    spans = [(load.memory.data_ptr(), load.memory.data_ptr() + load.memory.nbytes) for load in loads]
    parameters = [name for name in names if name in dict(model.named_parameters())]
    for name in parameters:
        at = loader.state_dict[name].data_ptr()
        assert any(start <= at < end for start, end in spans), name
    gc.collect()
    assert not any(reference() is not None for reference, name in zip(held, names, strict=True) if name in parameters)
    gone = weakref.ref(loads[0].memory)
    del model, loader, loads, streams
    gc.collect()
    assert gone() is None


def load_of(*modules):
    """Return a load of the weights of modules, each filled with one number."""
    memory = torch.zeros(ALIGNMENT_BYTES * len(modules), dtype=torch.uint8)
    places = {}
    for number, module in enumerate(modules):
        start = number * ALIGNMENT_BYTES
        places[module] = {"weight": TensorPlace(start, start + 4, torch.float32, module.weight.shape)}
        places[module]["weight"].within(memory).copy_(module.weight)
    return Load(places, memory.nbytes, memory=memory)


class SlowPiece:
    """A piece of one number on a disk, read once that is allowed."""

    def __init__(self, number):
        self.number, self.size_bytes, self.place = number, 4, TensorInFile(Path("f"), str(number), 0, 4)
        self.may_be_read = threading.Event()

    def read(self, memory):
        self.may_be_read.wait(10)
        memory.view(np.float32)[:] = self.number
        return {self.place: torch.from_numpy(memory)}


def slow_load(number, *modules):
    piece, place = SlowPiece(number), TensorPlace(0, 4, torch.float32, torch.Size((1, 1)))
    return Load({module: {"weight": place} for module in modules}, 4, piece=piece, targets={piece.place: place})


def number_in(memory):
    return memory[:4].view(torch.float32).item()


def test_a_buffer_is_not_overwritten_while_it_is_copied():
    """None of the copies has been waited for yet."""
    streams = LateCopies()
    reader = ReaderThread(streams, [pages(4) for _ in range(2)])
    slots = [torch.zeros(4, dtype=torch.uint8) for _ in range(5)]
    events = []
    for number, slot in enumerate(slots):
        load = slow_load(number)
        load.piece.may_be_read.set()
        events.append(reader.fetch(load, slot, streams.computing.record_event())())
    events[-1].synchronize()
    assert [number_in(slot) for slot in slots] == [0, 1, 2, 3, 4]


def test_a_late_read_does_not_overwrite_the_slots_new_load():
    """The read of the expected load has not ended when its slot is given to another load."""
    around, expected, instead = (torch.nn.Linear(1, 1, bias=False) for _ in range(3))
    streams, late = LateCopies(), slow_load(7.0, expected)
    loads = [load_of(around), late, load_of(instead)]
    slots = tuple(Slot(torch.zeros(ALIGNMENT_BYTES, dtype=torch.uint8)) for _ in range(2))
    streamer = Streamer(loads, streams, slots, ReaderThread(streams, [pages(4) for _ in range(2)]))
    streamer.begin(around, loads[0])
    threading.Timer(0.1, late.piece.may_be_read.set).start()
    weight = streamer.begin(instead, loads[2])["weight"]
    slots[1].copied()
    time.sleep(0.2)
    assert torch.equal(weight, instead.weight)


def test_outer_modules_keep_their_weights_while_inner_ones_run():
    """If modules of both slots run, the next load is copied beside them, and nothing overwrites what runs."""
    modules = [torch.nn.Linear(1, 1, bias=False) for _ in range(4)]
    loads = [load_of(module) for module in modules]
    slots = (
        Slot(torch.zeros(ALIGNMENT_BYTES, dtype=torch.uint8)),
        Slot(torch.zeros(ALIGNMENT_BYTES, dtype=torch.uint8)),
    )
    streams = LateCopies()
    streamer = Streamer(loads, streams, slots, ReaderThread(streams, ()))
    held = {}
    for module, load in zip(modules, loads, strict=True):
        held[module] = streamer.begin(module, load)["weight"]
        for running, weight in held.items():
            assert torch.equal(weight, running.weight)
    for module in modules:
        streamer.end(module)
    assert torch.equal(streamer.begin(modules[3], loads[3])["weight"], modules[3].weight)
    assert any(slot.load is loads[3] for slot in slots)


def test_tensors_in_a_load_are_aligned():
    odd, wide = torch.nn.Linear(3, 1, bias=False).bfloat16(), torch.nn.Linear(2, 1, bias=False).double()
    model = torch.nn.Sequential(odd, wide)
    loader = OffloadedWeightsLoader(state_dict=dict(model.state_dict()))
    attach_align_device_hook_on_blocks(model, torch.device("cpu"), offload={"0": True, "1": True}, weights_map=loader)
    (load,) = loads_of(streamed_pieces(model, [("0", "1")], None))
    assert [places["weight"].start for places in load.places.values()] == [0, ALIGNMENT_BYTES]
    assert load.memory.nbytes == 2 * ALIGNMENT_BYTES
    assert torch.equal(load.places[wide]["weight"].within(load.memory), loader["1.weight"])
