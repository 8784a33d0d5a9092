"""The private parts of torch, transformers and accelerate that the package uses exist, and are listed on a page.

Run with the oldest, the pinned and the newest versions: a failure here names what a new version changed.
"""

from __future__ import annotations

import ast
import re

import accelerate
import pytest
import torch
import transformers
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from conftest import LLAMA, REPOSITORY
from libraries_page import ADAPTERS, LIBRARIES, PAGE, SOURCES, privates, users_of, with_tables
from packaging.version import Version
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts
from transformers.models.qwen4_exp.modeling_qwen4_exp import Qwen4ExpPreTrainedModel

from devmap_config.graph.introspection import build_meta_model
from devmap_config.graph.recording import storage_key
from devmap_config.libraries.accelerate import hooks_of
from devmap_config.libraries.private import LibraryChangedError, Private
from devmap_config.libraries.transformers import CACHE_NAMES, chooses_experts_implementation
from devmap_config.libraries.versions import TRIED, release


def small_model():
    values = {name: value for name, value in LLAMA.items() if name not in ("architectures", "dtype", "model_type")}
    return build_meta_model(transformers.LlamaForCausalLM, transformers.LlamaConfig(**values), torch.float32)


def hooked_module():
    module = torch.nn.Linear(1, 1)
    add_hook_to_module(module, AlignDevicesHook())
    return module


INSTANCES = {
    "torch.nn.Module._hf_hook": hooked_module,
    "accelerate.hooks.AlignDevicesHook.weights_map": AlignDevicesHook,
    "torch._ops.OpOverload._schema": lambda: torch.ops.aten.add.Tensor,
    "torch._ops.OpOverload._overloadpacket": lambda: torch.ops.aten.add.Tensor,
    "torch._ops.OpOverload.is_view": lambda: torch.ops.aten.add.Tensor,
    "torch.UntypedStorage._cdata": lambda: torch.ones(1).untyped_storage(),
    "torch.nn.Module._parameters": lambda: torch.nn.Linear(1, 1),
    "torch.nn.Module._buffers": lambda: torch.nn.Linear(1, 1),
    "torch.nn.Module._non_persistent_buffers_set": lambda: torch.nn.Linear(1, 1),
    "transformers.PreTrainedModel.all_tied_weights_keys": small_model,
    "transformers.PreTrainedConfig._attn_implementation": transformers.LlamaConfig,
    "transformers.PreTrainedConfig._experts_implementation": transformers.Qwen3MoeConfig,
    "transformers.models.mixtral.modeling_mixtral.MixtralExperts._is_expert_parallel": lambda: MixtralExperts(
        transformers.MixtralConfig(hidden_size=8, intermediate_size=8, num_local_experts=2)
    ),
    # of the few models that have it; it says nothing where a model has none
    "transformers.PreTrainedModel._no_placement_params": lambda: Qwen4ExpPreTrainedModel,
}
"""What an instance has, and its class does not: an instance."""

EVERY = [private for named in privates().values() for private in named.values()]


@pytest.mark.parametrize("private", EVERY, ids=[private.name for private in EVERY])
def test_a_private_part_exists(private):
    if private.name in INSTANCES:
        private.of(INSTANCES[private.name]())
    else:
        private.find()


def test_examples_are_of_private_parts_that_are_used():
    assert set(INSTANCES) <= {private.name for private in EVERY}


def test_a_missing_private_part_is_reported():
    with pytest.raises(LibraryChangedError, match=r"^`torch\.nn\.NoSuchModule` is not there$"):
        Private("torch.nn.NoSuchModule", "nothing").find()
    with pytest.raises(LibraryChangedError, match=r"^`accelerate\.no_such_module\.thing` is not there$"):
        Private("accelerate.no_such_module.thing", "nothing").find()
    with pytest.raises(LibraryChangedError, match=r"^`torch\.Tensor\._nothing` is not there$"):
        Private("torch.Tensor._nothing", "nothing").of(torch.ones(1))
    with pytest.raises(LibraryChangedError, match=r"^`accelerate\.dispatch_model` takes no `nothing`$"):
        Private("accelerate.dispatch_model", "nothing", takes=("device_map", "nothing")).find()
    assert Private("accelerate.dispatch_model", "nothing", takes=("device_map",)).find() is accelerate.dispatch_model


# -- shapes ------------------------------------------------------------------------------------------------------------


def test_a_model_takes_and_returns_its_cache_by_a_known_name():
    import inspect

    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**LLAMA, "dtype": "float32"}))
    accepted = inspect.signature(model.forward).parameters
    name = next(name for name in CACHE_NAMES if name in accepted)
    output = model(input_ids=torch.ones((1, 2), dtype=torch.long), use_cache=True)
    assert isinstance(output[name], transformers.Cache)


def test_the_experts_whose_product_can_be_chosen_are_marked():
    config = transformers.Qwen3MoeConfig(hidden_size=8, moe_intermediate_size=8, num_experts=2)
    assert chooses_experts_implementation(Qwen3MoeExperts(config))
    assert not chooses_experts_implementation(torch.nn.Linear(1, 1))


def test_one_hook_and_several_hooks_are_found():
    module = hooked_module()
    [hook] = hooks_of(module)
    assert isinstance(hook, AlignDevicesHook)
    add_hook_to_module(module, AlignDevicesHook(), append=True)
    assert len(hooks_of(module)) == 2
    assert hooks_of(torch.nn.Linear(1, 1)) == ()


# -- nothing private elsewhere -----------------------------------------------------------------------------------------

PUBLIC_MODULES = {
    "torch.overrides",
    "transformers.modeling_outputs",
    "transformers.utils",
    "accelerate.hooks",
}
"""Modules of the libraries, besides their own, that their documentation speaks of."""

NAMED_TUPLES = {"_replace", "_asdict", "_fields", "_make"}
"""What Python's own documentation has with an underscore."""

DYNAMIC = {"getattr", "hasattr", "setattr", "delattr"}


def is_private(name):
    return name.startswith("_") and not name.startswith("__") and name not in NAMED_TUPLES


DOCUMENTED = ("os._exit",)
"""What a library promises, whatever its name."""


def violations(source):
    """Return the private uses in code: attributes, by syntax or by name; modules; and what it patches."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            if not (isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")):
                yield from {ast.unparse(node)} - {*DOCUMENTED}
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in DYNAMIC:
            name = node.args[1] if len(node.args) > 1 else None
            if isinstance(name, ast.Constant) and isinstance(name.value, str) and is_private(name.value):
                yield ast.unparse(node)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            yield from imported_violations(node)


def imported_violations(node):
    for alias in node.names:
        parent = node.module or "" if isinstance(node, ast.ImportFrom) else ""
        module, path = parent or alias.name, f"{parent}.{alias.name}".lstrip(".")
        is_of_library = module.partition(".")[0] in LIBRARIES
        is_public = path in LIBRARIES or module in PUBLIC_MODULES or path in PUBLIC_MODULES
        is_module = module not in LIBRARIES or alias.name.islower()
        is_undocumented = is_of_library and is_module and not is_public
        if is_undocumented or any(map(is_private, path.split("."))) or module.startswith("unittest.mock"):
            yield ast.unparse(node)


@pytest.mark.parametrize("path", [path for path in SOURCES if path not in ADAPTERS], ids=lambda path: path.stem)
def test_private_parts_are_used_only_in_the_adapters(path):
    source = path.read_text()
    assert list(violations(source)) == []
    assert "SLF001" not in source


@pytest.mark.parametrize(
    "source",
    [
        "model._no_split_modules",
        "super()._parse",
        "getattr(module, '_hf_hook', None)",
        "import torch._subclasses",
        "from torch.utils._pytree import tree_leaves",
        "from torch import _C",
        "from transformers.core_model_loading import build_glob_alternation",
        "from transformers import modeling_utils",
        "from unittest.mock import patch",
        "import accelerate.utils.modeling",
    ],
)
def test_the_check_finds_each_way_of_using_a_private_part(source):
    assert list(violations(f"fine = 1\n{source}")) == [source]


def test_the_check_ignores_public_uses():
    source = "self._own; loaded._replace(a=1); from transformers import AutoConfig; from accelerate import hooks"
    assert list(violations(source)) == []


# -- the list ----------------------------------------------------------------------------------------------------------


def test_the_page_lists_each_private_part_with_its_users():
    """`make libraries` rewrites it."""
    text = PAGE.read_text()
    assert with_tables(text) == text


def test_each_private_part_is_used():
    unused = [
        private.name
        for adapter, named in privates().items()
        for name, private in named.items()
        if not users_of(adapter, name)
    ]
    assert unused == []


def test_the_page_lists_the_tried_versions():
    rows = re.findall(r"^\| (torch|transformers|accelerate) \| ([\d.]+) \|", PAGE.read_text(), re.MULTILINE)
    assert {library: tuple(version for name, version in rows if name == library) for library in LIBRARIES} == TRIED


def test_tried_versions_are_in_order():
    for versions in TRIED.values():
        assert list(versions) == sorted(versions, key=release)


def pinned(file):
    """Return the lines of a constraints file by package name, with the Python version that a line is for."""
    lines = [line for line in (REPOSITORY / file).read_text().splitlines() if not line.startswith("#")]
    return {name: [line for line in lines if line.split("==")[0] == name] for name in (x.split("==")[0] for x in lines)}


def version_in(line):
    return line.partition("==")[2].partition(";")[0]


def declared():
    """Return the oldest declared versions of the program's dependencies."""
    toml = (REPOSITORY / "pyproject.toml").read_text()
    listed = re.search(r"^dependencies = \[(.*?)^\]", toml, re.MULTILINE | re.DOTALL)[1]
    return dict(re.findall(r'"([\w-]+)>=([\d.]+)"', listed))


def test_pinned_versions_are_tried():
    for file in ("constraints.txt", "constraints-oldest.txt"):
        for library, tried in TRIED.items():
            versions = set(map(version_in, pinned(file)[library]))
            assert versions
            assert versions <= set(tried)


def test_the_oldest_constraints_are_the_declared_versions():
    oldest = pinned("constraints-oldest.txt")
    floors = {name: Version(version) for name, version in declared().items()}
    assert {name: Version(version_in(line)) for name in floors for line in oldest[name]} == floors
    pins = pinned("constraints.txt")
    assert set(oldest) == set(pins)
    assert {name: lines for name, lines in oldest.items() if name not in floors} == {
        name: lines for name, lines in pins.items() if name not in floors
    }


def test_the_newest_tried_version_is_the_pinned_one():
    for library, tried in TRIED.items():
        assert tried[-1] in set(map(version_in, pinned("constraints.txt")[library]))


def test_the_readme_names_what_runs_in_ci():
    commands = re.findall(r"^make [\w-]+", (REPOSITORY / ".ci/run").read_text(), re.MULTILINE)
    readme = (REPOSITORY / "README.md").read_text()
    assert [command for command in commands if not re.search(rf"{command}\b(?!-)", readme)] == []


def test_the_storage_of_a_batched_tensor_is_found():
    """T5Gemma 2 makes its masks with `torch.vmap`."""
    rows, seen = torch.ones(3, 2), []

    def noted(row):
        seen.append(storage_key(row))
        return row

    torch.vmap(torch.vmap(noted))(rows)
    assert seen == [storage_key(rows)]
