"""Tensors that a module's code reads from inner modules without calling them are found in its source."""

from __future__ import annotations

import torch
from torch import nn

from devmap_config.simulate.reads import read_without_a_call


class Parent(nn.Module):
    def __init__(self):
        super().__init__()
        self.called = nn.Linear(2, 2)
        self.cast_to = nn.Linear(2, 2)
        self.positions = nn.Embedding(2, 2)
        self.moved_to = nn.Linear(2, 2)
        self.helped = nn.ModuleDict({"norm": nn.BatchNorm1d(2)})
        self.unused = nn.Linear(2, 2)
        self.own = nn.Parameter(torch.ones(2))

    def forward(self, given):
        given = given.to(self.cast_to.weight.dtype).to(self.moved_to.bias.device)
        return self.called(given) + self.positions.weight.float() + self.own + self.help()

    def help(self):
        return self.helped.norm.running_mean

    def never(self):
        return self.unused.weight


def test_tensors_read_without_a_call_are_found():
    whole = nn.Sequential(Parent())
    assert sorted(read_without_a_call(whole)) == [
        ("0", "0.helped.norm.running_mean"),
        ("0", "0.moved_to.bias"),
        ("0", "0.positions.weight"),
    ]


class Codebook(nn.Module):
    """A module that is never called, but whose methods are."""

    def __init__(self):
        super().__init__()
        self.register_buffer("codes", torch.ones(2, 2))
        self.register_buffer("counts", torch.ones(2))
        self.project = nn.Linear(2, 2)

    def encode(self, given):
        return self.nearest(self.project(given))

    def nearest(self, given):
        return given @ self.codes.t()

    def forward(self, given):
        return given + self.counts


class Quantizer(nn.Module):
    def __init__(self):
        super().__init__()
        self.codebook = Codebook()
        self.other = Codebook()

    def encode(self, given):
        return self.codebook.encode(given) + self.other(given)

    def forward(self, given):
        return self.encode(given)


class Whole(nn.Module):
    def __init__(self):
        super().__init__()
        self.quantizer = Quantizer()

    def forward(self, given):
        return self.quantizer.encode(given)


def test_tensors_read_by_methods_of_uncalled_modules_are_found():
    assert list(read_without_a_call(Quantizer())) == [("", "codebook.codes")]
    assert sorted(read_without_a_call(Whole())) == [
        ("", "quantizer.codebook.codes"),
        ("quantizer", "quantizer.codebook.codes"),
    ]


class Averaged(nn.Module):
    """A module that computes its codes in a property."""

    def __init__(self):
        super().__init__()
        self.register_buffer("total", torch.ones(2, 2))
        self.register_buffer("unread", torch.ones(2))

    @property
    def codes(self):
        return self.total / 2

    def encode(self, given):
        return given @ self.codes

    def decode(self, given):
        return given + self.unread


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([Averaged(), Averaged()])
        self.others = nn.ModuleList([Averaged()])

    def forward(self, given):
        for layer in self.layers[:1]:
            given = layer.encode(given)
        for index, _ in enumerate(given):
            other = self.others[index]
            given = other.decode(given)
        return given


def test_tensors_read_by_items_of_module_lists_are_found():
    assert sorted(name for _, name in read_without_a_call(Residual())) == [
        "layers.0.total",
        "layers.1.total",
        "others.0.unread",
    ]
