"""The code files that a config names are found, whatever the config contains."""

from __future__ import annotations

import pytest

from devmap_config.graph.remote_code import class_reference, code_files, hub_kernel


@pytest.mark.parametrize(
    ("config", "files"),
    [
        ({}, ()),
        ({"auto_map": {"AutoConfig": "a.C", "AutoModel": "a.M", "AutoModelForCausalLM": "b.M"}}, ("a.py", "b.py")),
        ({"auto_map": {"AutoModel": "owner/name--a.M"}}, ("owner/name: a.py",)),
        ({"auto_map": {"AutoTokenizer": ["slow.T", None]}}, ("slow.py",)),
        ({"auto_map": ["slow.T", "fast.T"]}, ("slow.py", "fast.py")),
        ({"text_config": {"auto_map": {"AutoModel": "within.M"}}}, ("within.py",)),
        ({"auto_map": 5}, ()),
        ({"auto_map": {"AutoModel": {"deep": ["x.M", 5]}}}, ("x.py",)),
        ({"auto_map": "nodot"}, ("nodot.py",)),
    ],
)
def test_the_code_files_of_a_config_are_found(config, files):
    assert code_files(config) == files


def test_a_class_is_found_by_an_auto_class_or_its_own_name():
    config = {"auto_map": {"AutoConfig": "a.C", "AutoModel": "a.Base", "AutoModelForCausalLM": "a.ForCausalLM"}}
    assert class_reference(config, "AutoModelForCausalLM") == "a.ForCausalLM"
    assert class_reference(config, "ForCausalLM") == "a.ForCausalLM"
    assert class_reference(config, "Base") == "a.Base"
    assert class_reference(config, "C") is None  # a config is no model
    assert class_reference(config, "AutoModelForMaskedLM") is None
    assert class_reference({"auto_map": ["a.Base"]}, "Base") is None


def test_attention_from_the_hub_counts_as_code():
    assert hub_kernel({"attn_implementation": "owner/kernel"}) == "owner/kernel"
    assert hub_kernel({"text_config": {"_attn_implementation": "owner/kernel@main:f"}}) == "owner/kernel@main:f"
    assert hub_kernel({"attn_implementation": "flash_attention_2", "text_config": {"attn_implementation": 5}}) is None
