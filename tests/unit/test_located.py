"""Values of a profile know where they are written: their place, their key's, and the section's for defaults."""

from __future__ import annotations

from pathlib import Path

import pytest

from devmap_config.diagnostics.diagnostic import Sink
from devmap_config.profile.loading import load_profile

BASE = """\
version: 1
variables: {length: 512}
workload:
  context_length: "{{ length }}"
hardware:
  devices:
    "cuda:[0-1]": {memory: 1GiB}
"""

PROFILE = """\
extends: shared/base.yaml
model:
  source: llama
  allow_new: score
placement:
  max_memory: {0: 500MiB}
  device_map:
    "model.layers.[0-3]": 0
  pins:
    - {match: lm_head, not_on: [cuda:1]}
"""


@pytest.fixture
def profile(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("shared").mkdir()
    Path("shared/base.yaml").write_text(BASE)
    Path("profile.yaml").write_text(PROFILE)
    loaded = load_profile(Path("profile.yaml"), Sink(), overrides={"length": "1024"})
    return loaded.profile


def place(span):
    return span.file, span.line, span.column


def test_a_value_has_its_place_and_that_of_its_key(profile):
    assert profile.model.source.value == "llama"
    assert place(profile.model.source.span) == ("profile.yaml", 3, 11)
    assert place(profile.model.source.key_span) == ("profile.yaml", 3, 3)


def test_items_keys_and_values_without_a_list_have_places(profile):
    (name,) = profile.model.allow_new
    assert place(name.span) == ("profile.yaml", 4, 14)
    ((pattern, device),) = profile.placement.device_map.value.items()
    assert place(pattern.span) == ("profile.yaml", 8, 5)
    assert place(pattern.span_within(13, 18)) == ("profile.yaml", 8, 19)
    assert place(device.span) == ("profile.yaml", 8, 27)
    (pin,) = profile.placement.pins
    assert place(pin.not_on[0].span) == ("profile.yaml", 10, 33)
    (cap,) = profile.placement.max_memory.values()
    assert place(cap.key_span) == ("profile.yaml", 6, 16)


def test_values_of_base_files_and_templates_have_their_own_places(profile):
    length = profile.workload.context_length
    assert length.value == 1024
    assert place(length.span) == ("shared/base.yaml", 4, 19)
    assert {place(section.key_span) for section in profile.hardware.devices.value.values()} == {
        ("shared/base.yaml", 7, 5)
    }


def test_a_default_has_the_place_of_its_section(profile):
    assert profile.placement.strategy.value == "auto"
    assert not profile.placement.strategy.is_written
    assert place(profile.placement.strategy.span) == place(profile.placement.span) == ("profile.yaml", 6, 3)
    assert place(profile.placement.offload.folder.span) == ("profile.yaml", 6, 3)


def test_missing_sections_have_the_place_of_the_profiles_start(tmp_path):
    path = tmp_path / "profile.yaml"
    path.write_text("version: 1\nmodel: {source: llama}\nhardware: {devices: {cpu: {memory: 1GiB}}}\n")
    profile = load_profile(path, Sink()).profile
    assert place(profile.workload.context_length.span) == (str(path), 1, 1)


def test_a_path_is_relative_to_the_file_that_writes_it(profile):
    assert profile.model.source.path == Path("llama")
    assert profile.workload.context_length.path.parent == Path("shared")


def test_a_changed_value_keeps_its_place_which_comparison_ignores(profile):
    changed = profile.workload.changed(context_length=2048)
    assert changed.context_length.value == 2048
    assert changed.context_length.span == profile.workload.context_length.span
    assert changed.context_length != profile.workload.context_length
    assert changed.changed(context_length=1024) == profile.workload
