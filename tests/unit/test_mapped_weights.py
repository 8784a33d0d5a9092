"""Weights read ahead from disk are there when a module begins, fit in two slots, and are released after use."""

from __future__ import annotations

import gc
import mmap
import threading
import time
import weakref
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from devmap_config.dispatch.mapped_weights import ReadAhead, Slots
from devmap_config.dispatch.weights_on_disk import Piece, TensorInFile

PAGE = mmap.PAGESIZE
SIZES = (12 * PAGE, 4 * PAGE, 8 * PAGE, 2 * PAGE)


class Disk:
    """A simulated file: every byte of a tensor is the tensor's number, and reads wait until they are allowed."""

    def __init__(self):
        self.may_read = threading.Event()
        self.may_read.set()
        self.fails = False
        self.reads = []

    def read(self, place, memory):
        self.reads.append(int(place.name))
        self.may_read.wait(10)
        if self.fails:
            raise OSError("the disk is gone")
        memory[:] = int(place.name)


def pieces_on(disk, sizes=SIZES, sparse=()):
    starts = [sum(sizes[:place]) for place in range(len(sizes))]
    return tuple(
        Piece({TensorInFile(Path("f"), str(number), start, start + size): disk}, is_sparse=number in sparse)
        for number, (start, size) in enumerate(zip(starts, sizes, strict=True))
    )


def place_of(piece):
    return next(iter(piece.files))


def holds(data, piece):
    return bool((data[place_of(piece)] == int(place_of(piece).name)).all())


@pytest.fixture
def disk():
    return Disk()


@pytest.fixture
def reading(disk):
    pieces = pieces_on(disk)
    reader = ReadAhead(pieces)
    yield reader, pieces
    disk.may_read.set()
    reader.close()


def settle(reader):
    """Wait until the thread is idle, and return the pieces that are in memory."""
    deadline = time.monotonic() + 10
    while True:
        with reader._changed:
            if reader._is_idle and reader._next_work() is None:
                return set(reader._present)
        assert time.monotonic() < deadline
        time.sleep(0.001)


def is_in_slots(reader, data):
    memory = reader.slots._memory
    return all(0 <= each.data_ptr() - memory.ctypes.data < memory.nbytes for each in data.values())


def test_a_module_begins_once_its_weights_are_in_memory(disk, reading):
    reader, pieces = reading
    disk.may_read.clear()
    data = []
    beginner = threading.Thread(target=lambda: data.append(reader.begin(pieces[0])), daemon=True)
    beginner.start()
    beginner.join(0.05)
    assert not data
    disk.may_read.set()
    beginner.join(10)
    assert holds(data[0], pieces[0])


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(0, len(SIZES) - 1), min_size=1, max_size=40))
def test_weights_are_in_planned_memory_while_a_module_runs_in_any_order(order):
    pieces = pieces_on(Disk())
    reader = ReadAhead(pieces)
    try:
        for number in order:
            data = reader.begin(pieces[number])
            assert is_in_slots(reader, data)
            settle(reader)
            assert holds(data, pieces[number])
            del data
            reader.end(pieces[number])
        settle(reader)
    finally:
        reader.close()
    assert reader.slots._memory.nbytes == 2 * max(SIZES)


def test_the_next_module_is_read_while_one_runs(reading):
    reader, pieces = reading
    for number in range(len(pieces)):
        reader.begin(pieces[number])
        assert pieces[(number + 1) % len(pieces)] in settle(reader)
        reader.end(pieces[number])


def test_both_slots_are_filled_while_nothing_runs(disk):
    pieces = pieces_on(disk, sizes=[PAGE] * 4)
    reader = ReadAhead(pieces)
    reader.begin(pieces[0])
    assert settle(reader) == {*pieces[:2]}
    reader.end(pieces[0])
    deadline = time.monotonic() + 10
    while disk.reads != [0, 1, 2] and time.monotonic() < deadline:
        time.sleep(0.001)
    reader.close()
    assert disk.reads == [0, 1, 2]


def test_the_order_of_modules_is_learnt(reading):
    reader, pieces = reading
    for _ in range(2):
        for number in (0, 2, 1):
            reader.begin(pieces[number])
            settle(reader)
            reader.end(pieces[number])
        assert pieces[3] not in settle(reader)  # after 1 comes 0, then 2, and then 1


def test_sparse_pieces_are_not_read_ahead(disk):
    pieces = pieces_on(disk, sparse=(1,))
    reader = ReadAhead(pieces)
    reader.begin(pieces[0])
    assert settle(reader) == {pieces[0], pieces[2], pieces[3]}
    assert holds(reader.begin(pieces[1]), pieces[1])
    reader.close()


def test_a_needed_piece_takes_the_room_of_expected_ones(disk):
    """The free memory of both slots together would hold it, but that of neither slot does."""
    pieces = pieces_on(disk, sizes=[size * PAGE for size in (1, 2, 1, 3)])
    reader = ReadAhead(pieces)
    reader.begin(pieces[0])
    assert settle(reader) == {*pieces[:3]}
    reader._next[pieces[3]], reader._next[pieces[0]] = pieces[1], pieces[3]
    reader.end(pieces[0])
    data = reader.begin(pieces[3])
    assert holds(data, pieces[3])
    assert is_in_slots(reader, data)
    reader.close()


def test_any_number_of_nested_modules_have_memory(disk):
    pieces = pieces_on(disk, sizes=[PAGE] * 5)
    reader = ReadAhead(pieces)
    data = [reader.begin(piece) for piece in pieces]
    assert all(holds(each, piece) for each, piece in zip(data, pieces, strict=True))
    reader.close()


def test_memory_that_a_tensor_refers_to_is_not_overwritten(reading):
    reader, pieces = reading
    kept = [reader.begin(pieces[0])[place_of(pieces[0])][7:]]  # as a module does that gives a part of its weights
    reader.end(pieces[0])
    for piece in pieces[1:] * 3:
        assert holds(reader.begin(piece), piece)
        settle(reader)
        reader.end(piece)
    assert bool((kept[0] == 0).all())


def test_memory_lies_within_one_slot_and_is_reused_when_unreferenced():
    slots = Slots(3 * PAGE)
    first, second = (torch.from_numpy(slots.take(2 * PAGE)) for _ in range(2))
    assert second.data_ptr() - first.data_ptr() == 3 * PAGE
    assert slots.take(2 * PAGE) is None
    assert slots.take(PAGE) is not None
    shown, address = first.view(torch.float32)[3:], first.data_ptr()
    del first
    assert slots.take(2 * PAGE) is None
    del shown
    assert slots.take(2 * PAGE).ctypes.data == address


def test_a_failed_read_raises_an_error_and_nobody_waits(disk, reading):
    reader, pieces = reading
    disk.fails = True
    with pytest.raises(OSError, match="the disk is gone"):
        reader.begin(pieces[0])
    with pytest.raises(OSError, match="the disk is gone"):
        reader.begin(pieces[1])


def test_two_forwards_at_once_both_end(reading):
    reader, pieces = reading
    wrong = []

    def forward():
        for piece in pieces * 20:
            if not holds(reader.begin(piece), piece):
                wrong.append(piece)
            reader.end(piece)

    threads = [threading.Thread(target=forward, daemon=True) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert not any(thread.is_alive() for thread in threads)
    assert not wrong


def test_closing_ends_the_thread_and_closes_its_files(disk):
    pieces = pieces_on(disk)
    gone = weakref.ref(pieces[0])
    reader = ReadAhead(pieces)
    reader.begin(pieces[0])
    reader.end(pieces[0])
    reader.close()
    reader.thread.join(10)
    del reader, pieces
    gc.collect()
    assert gone() is None


def test_a_closing_thread_reads_no_more(disk):
    pieces = pieces_on(disk)
    reader = ReadAhead(pieces)
    disk.may_read.clear()
    beginner = threading.Thread(target=reader.begin, args=(pieces[0],), daemon=True)
    beginner.start()
    while not disk.reads:
        time.sleep(0.001)
    reader.close()
    disk.may_read.set()
    reader.thread.join(10)
    assert not reader.thread.is_alive()
    assert disk.reads == [0]
