"""Fixtures and settings of all tests: no hub, quiet libraries, small models, and imports of the modules beside the
tests.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
from hypothesis import settings
from small_media_models import LLAVA

from devmap_config.cli import main, progress
from devmap_config.libraries import versions

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["NO_COLOR"] = "1"
os.environ["COLUMNS"] = "80"
os.environ["OMP_NUM_THREADS"] = "1"  # each worker of the tests has a core; threads that wait for one take another's

progress.SECONDS_WITHOUT_A_WORD = 600  # what a busy machine prints late is no part of what a test expects

# The same examples on every run: a change is judged by itself. `HYPOTHESIS_PROFILE=explore` looks for new ones.
settings.register_profile("repeatable", derandomize=True)
settings.register_profile("explore", derandomize=False)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))

REPOSITORY = Path(__file__).parent.parent

sys.path.insert(0, str(Path(__file__).parent))

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "dtype": "bfloat16",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 6,
    "max_position_embeddings": 2**17,
    "vocab_size": 256,
    "tie_word_embeddings": False,
}

MIXTURE = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "dtype": "bfloat16",
    "hidden_size": 64,
    "intermediate_size": 128,
    "moe_intermediate_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 4,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "vocab_size": 256,
    "tie_word_embeddings": False,
}

MODELS = {
    "llama": LLAMA,
    "tied": {**LLAMA, "tie_word_embeddings": True},
    "mixture": MIXTURE,
    "learned": {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "dtype": "float32",
        "n_embd": 64,
        "n_head": 4,
        "n_layer": 4,
        "n_positions": 256,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "vocab_size": 320,
    },
    "nameless": {key: value for key, value in LLAMA.items() if key not in ("architectures", "dtype")},
    "misnamed": {**LLAMA, "architectures": {"LlamaForCausalLM": 1}},
    "unknown": {"architectures": ["NoSuchModel"], "model_type": "no-such-model"},
    "unmeasurable": {
        "architectures": ["ViTModel"],
        "model_type": "vit",
        "dtype": "float32",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
        "image_size": 32,
    },
    "images": {**LLAVA, "dtype": "bfloat16"},
    "quantized": {**LLAMA, "quantization_config": {"quant_method": "gptq", "bits": 4}},
}
"""Configs by the folder that cases name as `model.source`."""


def devmap(*arguments):
    """Run a command in this process and return its exit code."""
    with pytest.MonkeyPatch.context() as context:
        context.setattr(sys, "argv", ["devmap", *arguments])
        with pytest.raises(SystemExit) as caught:
            main()
    return caught.value.code


def write_models(folder: Path) -> None:
    """Write the config of every small model into a directory of its own."""
    for name, config in MODELS.items():
        (folder / name).mkdir(exist_ok=True)
        (folder / name / "config.json").write_text(json.dumps(config))


def pytest_addoption(parser):
    parser.addoption("--engines", metavar="PYTHON", help="run what is marked `engine`, with the engines of this Python")
    parser.addoption("--without-namespaces", action="store_true", help="leave out what needs two network namespaces")
    parser.addoption("--share", default="1/1", metavar="K/N", help="of the tests marked `zoo`, the Kth of every N")


def pytest_collection_modifyitems(config, items):
    """Leave out of the tests marked `zoo` what is not of the share that is asked for; the order decides."""
    wanted, of = map(int, config.getoption("--share").split("/"))
    zoo = [item for item in items if item.get_closest_marker("zoo")]
    left_out = {id(item) for item in items if item.get_closest_marker("engine") and not config.getoption("--engines")}
    if config.getoption("--without-namespaces"):
        left_out |= {id(item) for item in items if "spaces" in getattr(item, "fixturenames", ())}
    left_out |= {id(item) for place, item in enumerate(zoo) if place % of != wanted - 1}
    config.hook.pytest_deselected(items=[item for item in items if id(item) in left_out])
    items[:] = [item for item in items if id(item) not in left_out]


@pytest.fixture(scope="session", autouse=True)
def tried_versions():
    """Make the installed versions count as tried; separate tests check what is printed for untried versions."""
    with pytest.MonkeyPatch.context() as context:
        found = {library: (*tried, versions.installed(library)) for library, tried in versions.TRIED.items()}
        context.setattr(versions, "TRIED", {library: tuple(dict.fromkeys(each)) for library, each in found.items()})
        yield


@pytest.fixture(scope="session", autouse=True)
def graph_cache(tmp_path_factory):
    """Graphs are kept for the session, away from the user's."""
    directory = tmp_path_factory.getbasetemp().parent / "cache"
    os.environ["XDG_CACHE_HOME"] = str(directory)
    return directory


@pytest.fixture
def workspace(tmp_path, monkeypatch):
    """A directory with the small models, which is the working directory."""
    write_models(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path
