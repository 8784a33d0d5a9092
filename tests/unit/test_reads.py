"""What a module's code reads off modules within it without calling them, by its source."""

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


def test_what_is_read_is_found_and_neither_what_is_called_nor_what_only_describes():
    whole = nn.Sequential(Parent())
    assert sorted(read_without_a_call(whole)) == [
        ("0", "0.helped.norm.running_mean"),
        ("0", "0.moved_to.bias"),
        ("0", "0.positions.weight"),
    ]
