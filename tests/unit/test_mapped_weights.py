"""Weights that are read ahead: there when a module begins, never more than there is room for, gone behind it."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from devmap_config.dispatch.mapped_weights import Piece, ReadAhead, TensorInFile

SIZES = (300, 100, 200, 50)


class Disk:
    """Stands for a file: keeps account of what is in memory, and reads only while it may."""

    def __init__(self):
        self.present, self.most, self.reads = set(), 0, []
        self.may_read = threading.Event()
        self.may_read.set()
        self.fails = False

    def read(self, start, end, _scratch):
        self.may_read.wait(10)
        if self.fails:
            raise OSError("the disk is gone")
        self.present.add((start, end))
        self.reads.append((start, end))
        self.most = max(self.most, sum(last - first for first, last in self.present))

    def let_go(self, start, end):
        self.present.discard((start, end))


def pieces_on(disk, sizes=SIZES, sparse=()):
    starts = [sum(sizes[:place]) for place in range(len(sizes))]
    return tuple(
        Piece({TensorInFile(Path("f"), str(number), start, start + size): disk}, is_sparse=number in sparse)
        for number, (start, size) in enumerate(zip(starts, sizes, strict=True))
    )


def span(piece):
    return next((place.start, place.end) for place in piece.ranges)


@pytest.fixture
def disk():
    return Disk()


@pytest.fixture
def reading(disk):
    pieces = pieces_on(disk)
    reader = ReadAhead(pieces, most_bytes=max(SIZES))
    yield reader, pieces
    disk.may_read.set()
    reader.close()


def settle(reader):
    """Wait until the thread has nothing left to do."""
    deadline = time.monotonic() + 10
    while True:
        with reader._changed:
            if reader._is_idle and {*reader._running, *reader._expected()} == {*reader._present}:
                return
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_a_module_begins_once_its_weights_are_in_memory(disk, reading):
    reader, pieces = reading
    disk.may_read.clear()
    begun = threading.Event()
    threading.Thread(target=lambda: (reader.begin(pieces[0], whole=True), begun.set()), daemon=True).start()
    assert not begun.wait(0.05)
    disk.may_read.set()
    assert begun.wait(10)
    assert span(pieces[0]) in disk.present


@given(st.lists(st.integers(0, len(SIZES) - 1), min_size=1, max_size=40))
def test_whatever_the_order_weights_are_there_while_a_module_runs_and_no_more_than_planned(order):
    disk = Disk()
    pieces = pieces_on(disk)
    reader = ReadAhead(pieces, most_bytes=max(SIZES))
    try:
        for number in order:
            reader.begin(pieces[number], whole=True)
            assert span(pieces[number]) in disk.present
            settle(reader)
            assert span(pieces[number]) in disk.present
            assert sum(end - start for start, end in disk.present) <= SIZES[number] + max(SIZES)
            reader.end(pieces[number])
        settle(reader)
        assert sum(end - start for start, end in disk.present) <= max(SIZES)
    finally:
        reader.close()
    assert disk.most <= 2 * max(SIZES)  # what has run goes before anything else is read


def test_the_next_is_read_while_one_runs_and_the_first_after_the_last(disk, reading):
    reader, pieces = reading
    for number in range(len(pieces)):
        reader.begin(pieces[number], whole=True)
        settle(reader)
        assert span(pieces[(number + 1) % len(pieces)]) in disk.present
        reader.end(pieces[number])


def test_the_order_is_learnt(disk, reading):
    reader, pieces = reading
    for _ in range(2):
        for number in (0, 2, 1):
            reader.begin(pieces[number], whole=True)
            settle(reader)
            ahead = set(disk.present) - {span(pieces[number])}
            reader.end(pieces[number])
            settle(reader)
    assert ahead == {span(pieces[0])}  # after 1 comes 0, and no more fits beside it
    assert span(pieces[3]) not in disk.present


def test_rows_of_an_embedding_or_of_experts_come_as_they_are_touched(disk):
    pieces = pieces_on(disk, sparse=(1,))
    reader = ReadAhead(pieces, most_bytes=1_000)
    reader.begin(pieces[0], whole=True)
    settle(reader)
    assert span(pieces[1]) not in disk.present
    assert span(pieces[2]) in disk.present
    reader.begin(pieces[1], whole=False)
    assert span(pieces[1]) not in disk.present
    reader.close()


def test_a_read_that_fails_is_told_and_nobody_waits_for_ever(disk, reading):
    reader, pieces = reading
    disk.fails = True
    with pytest.raises(OSError, match="the disk is gone"):
        reader.begin(pieces[0], whole=True)
    with pytest.raises(OSError, match="the disk is gone"):
        reader.begin(pieces[1], whole=True)


def test_two_forwards_at_once_both_end(disk, reading):
    reader, pieces = reading

    def forward():
        for piece in pieces * 20:
            reader.begin(piece, whole=True)
            reader.end(piece)

    threads = [threading.Thread(target=forward, daemon=True) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert not any(thread.is_alive() for thread in threads)


def test_the_thread_ends_and_lets_go_of_its_files(disk):
    pieces = pieces_on(disk)
    gone = weakref.ref(pieces[0])
    reader = ReadAhead(pieces, most_bytes=1_000)
    reader.begin(pieces[0], whole=True)
    reader.end(pieces[0])
    reader.close()
    reader.thread.join(10)
    del reader, pieces
    gc.collect()
    assert gone() is None
