"""Mutates valid inputs: as bytes of unknown meaning, and as plain data (of YAML or JSON) value by value."""

from __future__ import annotations

import copy
import re
from collections import defaultdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from random import Random

LARGEST_BYTES = 1_000_000
"""No input is larger: of what is, every reader says so before it reads it."""

NUMBERS = [0, 1, -1, 2, 3, 7, 255, 2**31, 2**32 - 1, 2**53 + 1, 2**63, 2**64, 10**9, -(10**20), 10**400]
FLOATS = [0.5, -0.0, 1e-320, 1e308, float("inf"), float("-inf"), float("nan")]
QUANTITIES = [
    "0GiB", "-1GiB", "1", "1B", "1.5GiB", "1e3GiB", "1e999GB", "99999999999999999999GiB", "64KiB", "1MiB", "300KiB",
    "10%",
    "0%", "110%", "-5%", "1e-9%", "100.0%", "GiB", "20 GiB", "20gib", "0x10", "1_000", "٣GiB", "25GB/s", "0GB/s",
    "1e-300GB/s", "0.001B/s", "1e300TFLOP/s", "12us", "NaN", "inf",
]  # fmt: skip
NAMES = [
    "cuda:0", "cuda:1", "cuda:7", "cuda:99999999999999999999", "cuda:-1", "cuda:[0-3]", "cuda:[0-99999999]", "cuda",
    "xpu:0",
    "npu:0", "mps", "cpu", "cpu:0", "disk", "meta", "0", "1", "rtx-4090", "h100-sxm", "auto", "balanced",
    "balanced_low_0",
    "sequential", "single", "manual", "fastest", "longest-context", "fewest-devices", "decode", "prefill", "request",
    "bfloat16", "float32", "float8_e4m3fn", "sdpa", "eager", "static", "dynamic", "transformers", "llama", "mixture",
    "LlamaForCausalLM", "AutoModel", "gptq", "bitsandbytes",
]  # fmt: skip
PATTERNS = [
    "lm_head", "model", "model.layers.*", "**", "**.self_attn", "model.layers.[0-3]", "model.layers.[4-]",
    "model.layers.[-2:]",
    "model.layers.[::2]", "model.layers.[0-99999999999999999999]", "model.layers.[::0]", "model.{norm,embed_tokens}",
    "class:LlamaMLP", "class:LlamaMLP in model.layers.[0-1]", "class:", "re:.*mlp.*", "re:(a*)*b", "re:(",
    "re:.{1000}{1000}",
    "**.**.**.**.**.x", "*?*?*?*?*?*?*?*?*?*", "{a,b}{a,b}{a,b}{a,b}{a,b}{a,b}{a,b}{a,b}{a,b}{a,b}", "[", "{",
    "model..norm",
]  # fmt: skip
TEXTS = [
    "", " ", "x", "~", "null", "no", "1e3", "2020-01-01", "{{ 1 }}", "{{ nothing }}", "{{", "{% if %}", "{# #}", "%",
    "$x",
    "a/b", "../..", "/etc/passwd", "/dev/zero", "~root", "a\nb", "a\r::error::x", "a\tb", "\x1b[31m", "\x00", "\x7f",
    "\x85",
    "\u202e", "\ufeff", "\ud800", "e\u0301", "🙂", "<b>", "|", "`", "'", '"', "\\", "é" * 300, "x" * 5_000, "0" * 5_000,
]  # fmt: skip
SCALARS: list[Any] = [None, True, False, *NUMBERS, *FLOATS, *QUANTITIES, *NAMES, *PATTERNS, *TEXTS]
NESTED: list[Any] = [
    [],
    {},
    [[]],
    {"": ""},
    [None],
    {"a": {"b": {"c": []}}},
    [[[[[[[[[[[[]]]]]]]]]]]],
    list(range(200)),
]

TOKENS = [
    *(text.encode("utf-8", "surrogatepass") for text in (*QUANTITIES, *NAMES, *PATTERNS, *TEXTS)),
    *b"[]{}():,;.*&!|>'\"%@`#?-=+/\\~^$ \t\r\n\0".decode().encode().split(b"\xff"),
    b"\n", b": ", b"- ", b"\n- ", b"\n  ", b"{}", b"[]", b"<<: *", b"&a ", b"*a", b"!!python/object:os.system ",
    b"!!binary ",
    b"---\n", b"...\n", b"%YAML 1.2\n", b"? ", b"\xff", b"\xc3", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\x00", b"1",
    b"-", b".",
]  # fmt: skip


def mutated_bytes(random: Random, data: bytes, others: Sequence[bytes]) -> bytes:
    """Return bytes with some spans removed, inserted, moved or repeated."""
    for _ in range(random.choice((1, 1, 1, 1, 2, 4))):
        data = random.choice(BYTE_CHANGES)(random, data, others)[:LARGEST_BYTES]
    return data


def _span(random: Random, data: bytes) -> tuple[int, int]:
    start = random.randint(0, len(data))
    return start, min(len(data), start + random.choice((0, 1, 1, 2, 4, 16, 64)))


def _delete(random: Random, data: bytes, _: Sequence[bytes]) -> bytes:
    start, end = _span(random, data)
    return data[:start] + data[end:]


def _insert(random: Random, data: bytes, _: Sequence[bytes]) -> bytes:
    start, end = _span(random, data)
    return data[:start] + random.choice(TOKENS) + data[random.choice((start, end)) :]


def _flip(random: Random, data: bytes, _: Sequence[bytes]) -> bytes:
    start, _ = _span(random, data)
    byte = random.choice((random.randrange(32, 127), random.randrange(256)))
    return data[:start] + bytes([byte]) + data[start + 1 :]


def _cut_off(random: Random, data: bytes, _: Sequence[bytes]) -> bytes:
    return data[: random.randint(0, len(data))]


def _repeat(random: Random, data: bytes, _: Sequence[bytes]) -> bytes:
    start, end = _span(random, data)
    many = random.choice((2, 2, 2, 3, 10, 10, 1_000, 100_000))
    return data[:start] + data[start:end] * many + data[end:]


def _splice(random: Random, data: bytes, others: Sequence[bytes]) -> bytes:
    start, _ = _span(random, data)
    other = random.choice(others)
    return data[:start] + other[random.randint(0, len(other)) :]


def _replace_word(random: Random, data: bytes, others: Sequence[bytes]) -> bytes:
    """Replace a word by another, usually one that occurs in valid inputs."""
    words = list(WORD.finditer(data))
    if not words:
        return data
    place = random.choice(words)
    word = random.choice((WORD.findall(random.choice(others)) if random.random() < 0.7 else None) or TOKENS)
    return data[: place.start()] + word + data[place.end() :]


WORD = re.compile(rb"[^\s{}\[\],:]+")


def _change_lines(random: Random, data: bytes, others: Sequence[bytes]) -> bytes:
    """Delete, repeat, move or indent a line, or insert one from another input."""
    lines = data.split(b"\n")
    place, target = random.randrange(len(lines)), random.randrange(len(lines) + 1)
    what = random.randrange(5)
    if what == 0:
        del lines[place]
    elif what == 1:
        lines.insert(target, lines[place])
    elif what == 2:
        lines.insert(target, lines.pop(place))
    elif what == 3:
        lines[place] = b" " * random.choice((1, 2, 4)) + lines[place].lstrip()
    else:
        lines.insert(target, random.choice(random.choice(others).split(b"\n")))
    return b"\n".join(lines)


BYTE_CHANGES: list[Callable[[Random, bytes, Sequence[bytes]], bytes]] = [
    _delete, _insert, _flip, _cut_off, _repeat, _splice, *[_replace_word] * 4, *[_change_lines] * 7,
]  # fmt: skip


def mutated_value(random: Random, value: Any, pool: Pool, changes: int | None = None) -> Any:
    """Return plain data with a few of its values, keys and items changed.

    Args:
        random: decides which.
        value: the data, which stays as it is.
        pool: the keys and values that good data of this kind holds.
        changes: how many; some few where it is `None`.
    """
    root = [copy.deepcopy(value)]
    for _ in range(changes or random.choice((1, 1, 1, 1, 2, 4))):
        holder, key = random.choice(list(_places(root)))
        random.choice(VALUE_CHANGES)(random, holder, key, pool)
        if not root:
            root = [None]
    return root[0]


class Pool:
    """The keys, scalars and other parts that some plain data holds, as what others may be given."""

    def __init__(self, values: Sequence[Any]) -> None:
        self.keys: list[Any] = [""]
        self.parts: list[Any] = [""]
        self.by_key: dict[Any, list[Any]] = defaultdict(list)
        for holder, key in _places(list(values)):
            self.parts.append(holder[key])
            self.by_key[key].append(holder[key])
            if isinstance(holder, dict):
                self.keys.append(key)

    def value(self, random: Random) -> Any:
        """Return something that may stand for a value: from the good data, or from the lists above."""
        chosen = random.choice((self.parts, self.parts, SCALARS, SCALARS, NESTED))
        return copy.deepcopy(random.choice(chosen))


def _places(value: Any) -> Any:
    """Yield every holder with each of its keys, at any depth."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, part in items:
        yield value, key
        if isinstance(part, (dict, list)):
            yield from _places(part)


def _replace_value(random: Random, holder: Any, key: Any, pool: Pool) -> None:
    holder[key] = pool.value(random)


def _replace_fitting(random: Random, holder: Any, key: Any, pool: Pool) -> None:
    """Replace a value by one that has the same key in another place."""
    holder[key] = copy.deepcopy(random.choice(pool.by_key.get(key) or [holder[key]]))


def _replace_alike(random: Random, holder: Any, key: Any, pool: Pool) -> None:
    """Replace a value by one of the same type, which is more likely to be accepted."""
    alike = [part for part in random.choices(pool.parts, k=20) if type(part) is type(holder[key])]
    holder[key] = copy.deepcopy(random.choice(alike or [holder[key]]))


def _tweak(random: Random, holder: Any, key: Any, _: Pool) -> None:
    """Change a scalar a little."""
    value = holder[key]
    if isinstance(value, bool):
        holder[key] = not value
    elif isinstance(value, int):
        holder[key] = random.choice(
            (value + 1, value - 1, -value, value * 1_000, value // 2, str(value), float(value % 2**53))
        )
    elif isinstance(value, str):
        holder[key] = mutated_bytes(random, value.encode("utf-8", "replace"), [b""]).decode("utf-8", "replace")[:20_000]


def _delete_key(_: Random, holder: Any, key: Any, __: Pool) -> None:
    del holder[key]


def _wrap(random: Random, holder: Any, key: Any, pool: Pool) -> None:
    holder[key] = random.choice(([holder[key]], {random.choice(pool.keys): holder[key]}, [holder[key]] * 2))


def _rename_key(random: Random, holder: Any, key: Any, pool: Pool) -> None:
    if isinstance(holder, dict):
        holder[random.choice((*random.choices(pool.keys, k=3), random.choice(SCALARS)))] = holder.pop(key)


def _add(random: Random, holder: Any, key: Any, pool: Pool) -> None:
    """Give a mapping another key, or a list another item."""
    into = holder[key] if isinstance(holder[key], (dict, list)) else holder
    if isinstance(into, dict):
        into[random.choice(pool.keys)] = pool.value(random)
    else:
        into.insert(random.randint(0, len(into)), pool.value(random))


def _swap(random: Random, holder: Any, key: Any, _: Pool) -> None:
    other = random.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))
    holder[key], holder[other] = holder[other], holder[key]


VALUE_CHANGES: list[Callable[[Random, Any, Any, Pool], None]] = [
    _replace_value, _replace_value, _replace_alike, *[_replace_fitting] * 3, *[_tweak] * 3, _delete_key, _wrap,
    _rename_key,
    _add, _swap,
]  # fmt: skip
