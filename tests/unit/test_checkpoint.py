"""Headers of checkpoints are read, and files that are no valid checkpoint are named with the reason."""

from __future__ import annotations

import json
import os

import pytest

from devmap_config.graph.checkpoint import CheckpointError, read_checkpoint


def safetensors(tensors, *, missing=0, more=b""):
    """Write a file of zeros with this header."""
    text = json.dumps({"__metadata__": {"format": "pt"}, **tensors}).encode()
    end = max((entry["data_offsets"][1] for entry in tensors.values()), default=0)
    return len(text).to_bytes(8, "little") + text + bytes(end - missing) + more


def entry(start, end, dtype="F16", shape=None):
    return {"dtype": dtype, "shape": [(end - start) // 2] if shape is None else shape, "data_offsets": [start, end]}


TWO = {"a": entry(0, 8), "b": entry(8, 20, shape=[2, 3])}


def test_one_file_gives_names_shapes_and_sizes(tmp_path):
    content = safetensors(TWO)
    (tmp_path / "model.safetensors").write_bytes(content)
    found = read_checkpoint(tmp_path, {})
    assert {name: (tensor.dtype, tensor.shape) for name, tensor in found.tensors.items()} == {
        "a": ("F16", (4,)),
        "b": ("F16", (2, 3)),
    }
    assert found.summary == {"file_count": 1, "tensor_count": 2, "size_bytes": len(content)}


def test_several_files_are_read_by_their_index(tmp_path):
    for name, tensors in {"x": {"a": entry(0, 8)}, "y": {"b": entry(0, 8)}}.items():
        (tmp_path / f"{name}.safetensors").write_bytes(safetensors(tensors))
    index = {"weight_map": {"a": "x.safetensors", "b": "y.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert list(read_checkpoint(tmp_path, {}).tensors) == ["a", "b"]


def test_the_single_file_comes_before_the_index_as_in_transformers(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(safetensors(TWO))
    (tmp_path / "model.safetensors.index.json").write_text("not even read")
    assert list(read_checkpoint(tmp_path, {}).tensors) == ["a", "b"]


@pytest.mark.parametrize("files", [[], ["adapter_model.safetensors"], ["training_args.bin", "tokenizer.json"]])
def test_a_folder_without_weights_has_no_checkpoint(tmp_path, files):
    for name in files:
        (tmp_path / name).write_bytes(b"")
    assert read_checkpoint(tmp_path, {}) is None


@pytest.mark.parametrize(
    "changed",
    [
        {"a": entry(0, 8), "c": entry(8, 20, shape=[2, 3])},
        {"a": entry(0, 8), "b": entry(8, 20, shape=[3, 2])},
        {"a": entry(0, 8, dtype="BF16"), "b": entry(8, 20, shape=[2, 3])},
        {"a": entry(0, 8)},
    ],
)
def test_the_digest_is_of_names_shapes_dtypes_and_sizes(tmp_path, changed):
    def digest(tensors):
        (tmp_path / "model.safetensors").write_bytes(safetensors(tensors))
        return read_checkpoint(tmp_path, {}).digest

    assert digest(TWO) == digest(TWO)
    assert digest(TWO) != digest(changed)


UNREADABLE = {
    "is empty": b"",
    "is cut off in its first bytes": b"abc",
    "does not begin with a header": b"\xff" * 4096,
    "is a pointer of git-lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n",
    "cut off in its header": (500).to_bytes(8, "little") + b"{}",
    "header is not JSON": (4).to_bytes(8, "little") + b"{{{{",
    "not a JSON object": (2).to_bytes(8, "little") + b"[]",
    "20 of": safetensors(TWO, missing=20),
    "5 bytes follow": safetensors(TWO, more=b"12345"),
    "gives `a` of F16 [4] 10 bytes": safetensors({"a": entry(0, 10, shape=[4])}),
    "`b` does not begin where": safetensors({"a": entry(0, 8), "b": entry(6, 20, shape=[7])}),
    "says of `a` neither": safetensors({"a": {"dtype": 3, "shape": [-1], "data_offsets": [0, 8]}}),
}


@pytest.mark.parametrize("said", UNREADABLE)
def test_an_invalid_safetensors_file_is_named(tmp_path, said):
    (tmp_path / "model.safetensors").write_bytes(UNREADABLE[said])
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(tmp_path, {})
    assert caught.value.code == "unreadable-checkpoint"
    assert "`model.safetensors`" in str(caught.value)
    assert said in str(caught.value)


def test_links_folders_and_pipes_in_place_of_weights_are_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    path.symlink_to(tmp_path / "gone")
    with pytest.raises(CheckpointError, match="link to a file that is not there"):
        read_checkpoint(tmp_path, {})
    path.unlink()
    path.mkdir()
    with pytest.raises(CheckpointError, match="is a folder"):
        read_checkpoint(tmp_path, {})
    path.rmdir()
    os.mkfifo(path)
    with pytest.raises(CheckpointError, match="not a regular file"):
        read_checkpoint(tmp_path, {})


@pytest.mark.parametrize(
    ("index", "said"),
    [
        ("{", "not JSON"),
        ("[]", "no `weight_map`"),
        ('{"weight_map": {}}', "no `weight_map`"),
        ('{"weight_map": {"a": 3}}', "no `weight_map`"),
        ('{"weight_map": {"a": "../x.safetensors"}}', "not a safetensors file beside it"),
        ('{"weight_map": {"a": "x.bin"}}', "not a safetensors file beside it"),
        ('{"weight_map": {"a": "x.safetensors"}}', "`x.safetensors` is named by the index, and missing"),
        ("[" * 100_000, "is nested deeper than 32"),
    ],
)
def test_an_invalid_index_is_an_error(tmp_path, index, said):
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(tmp_path, {})
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("pytorch_model.bin", "is a pickle"),
        ("model.pth", "is a pickle"),
        ("tiny.Q4_K_M.gguf", "is a GGUF"),
        ("weights.safetensors", "a name that transformers does not look for"),
    ],
)
def test_weights_of_other_formats_are_refused(tmp_path, name, said):
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(CheckpointError, match=said):
        read_checkpoint(tmp_path, {})


def test_a_weights_file_named_by_the_config_is_read(tmp_path):
    (tmp_path / "weights.safetensors").write_bytes(safetensors(TWO))
    assert list(read_checkpoint(tmp_path, {"transformers_weights": "weights.safetensors"}).tensors) == ["a", "b"]
    with pytest.raises(CheckpointError, match="is not there"):
        read_checkpoint(tmp_path, {"transformers_weights": "other.safetensors"})
