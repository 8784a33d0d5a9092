"""Generates texts from grammars: templates, patterns, machines, command lines."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from devmap_config.cli import devmap
from fuzz.mutation import NAMES, PATTERNS, QUANTITIES, TEXTS

if TYPE_CHECKING:
    from random import Random

ATOMS = [
    "x", "'x'", "'é\\n'", "9", "0", "-1", "1.5", "1e308", "999999999999", "true", "none", "[]", "[1, 2]", "{}",
    "{'a': x}", "()",
    "range(9)", "range(10**9)", "last", "size", "count", "text", "nothing", "self", "loop.index", "cycler('a')",
    "namespace()",
    "dict(a=1)", "lipsum(9)", "joiner()", "''.__class__", "x.__init__.__globals__", "'%s'", "'{0.__class__}'",
    "'a' * 99",
]  # fmt: skip
OPERATORS = [
    "+",
    "-",
    "*",
    "/",
    "//",
    "%",
    "**",
    "~",
    "in",
    "not in",
    "is",
    "and",
    "or",
    "==",
    "<",
    ">=",
    "|",
    ".",
    ", ",
    " if ",
]
FILTERS = [
    "abs", "attr('a')", "batch(3)", "batch(99999999)", "capitalize", "center(9)", "center(999999999)", "default(x)",
    "dictsort",
    "escape", "filesizeformat", "first", "float", "forceescape", "format(x)", "groupby('a')", "indent(9)",
    "indent(99999999)",
    "int", "items", "join('x')", "last", "length", "list", "lower", "map('upper')", "map(attribute='a')", "max",
    "min", "pprint",
    "random", "reject", "rejectattr('a')", "replace('x', 'xx')", "reverse", "round(9)", "round(9999999)", "safe",
    "select('odd')",
    "selectattr('a')", "slice(3)", "slice(99999999)", "sort", "string", "striptags", "sum", "title", "tojson",
    "tojson(99999999)",
    "trim", "truncate(9)", "unique", "upper", "urlencode", "urlize", "wordcount", "wordwrap(1)", "xmlattr", "nothing",
]  # fmt: skip
MILD = ["last + 1", "last * 3", "count", "(count - 1) // 2", "[1, 2, last]|sum", "range(9)|length", "text|length",
"last|int",
        "'%d'|format(last)", "text|upper|truncate(5)|length", "[last, count]|max", "last if count else 1",
        "'12'|int ** 2",
        "text[1:3]|length", "size|replace('GiB', '')|int", "range(3)|join|int", "(last ~ count)|int",
        "last|default(3)"]  # fmt: skip
"""Expressions that come to a small number."""
ATTRIBUTES = ["a", "x", "upper()", "format(x)", "join([x])", "items()", "append(1)", "__class__"]
STATEMENTS = ["include", "import", "extends", "block", "raw", "do", "break", "autoescape"]
TESTS = [
    "defined",
    "odd",
    "divisibleby(0)",
    "divisibleby(3)",
    "in(x)",
    "mapping",
    "sameas(x)",
    "string",
    "nothing",
    "iterable",
]


def expression(random: Random, depth: int = 4) -> str:
    """Return an expression of jinja2, usually one that can be parsed."""
    if depth == 0 or random.random() < 0.25:
        return random.choice(ATOMS)
    inner, other = expression(random, depth - 1), expression(random, depth - 1)
    return random.choice((
        f"{inner} {random.choice(OPERATORS)} {other}",
        f"({inner})|{random.choice(FILTERS)}",
        f"{inner}|{random.choice(FILTERS)}|{random.choice(FILTERS)}",
        f"({inner})[{other}]",
        f"({inner})[{other}:]",
        f"({inner}).{random.choice(ATTRIBUTES)}",
        f"[{inner}, {other}]",
        f"{{'a': {inner}}}",
        f"({inner} if {other} else x)",
        f"({inner}) is {random.choice(TESTS)}",
        f"range({inner})",
    ))  # fmt: skip


def template(random: Random) -> str:
    """Return a template for a scalar; half of them give a small number."""
    if random.random() < 0.5:
        return f"{{{{ {random.choice(MILD)} }}}}"
    value = f"{{{{ {expression(random)} }}}}"
    return random.choice((
        value,
        value,
        value + value,
        f"{{% for a in {expression(random)} %}}{value}{{% endfor %}}",
        f"{{% for a in range(99) %}}{{% for b in range(99) %}}{value}{{% endfor %}}{{% endfor %}}",
        f"{{% set x = {expression(random)} %}}{value}",
        f"{{% set x %}}{value * 9}{{% endset %}}{{{{ x * 99 }}}}",
        f"{{% if {expression(random)} %}}{value}{{% endif %}}",
        f"{{% macro m(a) %}}{value}{{{{ m(a) }}}}{{% endmacro %}}{{{{ m(1) }}}}",
        f"{{% filter {random.choice(FILTERS)} %}}{value}{{% endfilter %}}",
        f"{{% with x = {expression(random)} %}}{value}{{% endwith %}}",
        f"{{% {random.choice(STATEMENTS)} 'x' %}}{value}",
        value[: random.randint(0, len(value))],
    ))  # fmt: skip


SEGMENTS = [
    "model", "layers", "lm_head", "norm", "embed_tokens", "mlp", "self_attn", "q_proj", "weight", "*", "**", "?",
    "q_*", "*_proj",
    "1?", "[0-3]", "[0,2,4-5]", "[4-]", "[0-5/2]", "[-2:]", "[0:3]", "[::2]", "[::-1]", "[0-99]", "[]", "[a]",
    "[3-1]", "[0-1/0]",
    "block_[0-3]", "{q_proj,k_proj}", "{mlp,self_attn.q_proj}", "{a,{b,c}}", "{}", "", " ", "é",
]  # fmt: skip


def pattern(random: Random) -> str:
    """Return a pattern of modules, or something that looks like one."""
    if random.random() < 0.1:
        return random.choice((*PATTERNS, *TEXTS))
    text = ".".join(random.choice(SEGMENTS) for _ in range(random.choice((1, 2, 3, 3, 4, 8))))
    if random.random() < 0.05:
        text = random.choice(("**.", "*.", "{a,b}.", "[0-9].", "?")) * random.choice((10, 100, 2_000)) + text
    kind = random.random()
    if kind < 0.1:
        return f"class:{random.choice(('LlamaMLP', 'Llama*', '', '*', 'é'))} in {text}"
    return f"re:{text}" if kind < 0.2 else text


DEVICES = ["rtx-4090", "h100-sxm", "24GiB", "1MiB", "16KiB", "cpu:64GiB", "disk:1TiB"]
PARTS = [
    *DEVICES, "rtx-4091", "m3-ultra", "24", "0GiB", "24GB/s", "cpu", "cpu:", "cpu:1e9GiB", "disk:", "cpu:90%", "gpu",
    "", "-1x24GiB",
    "mi300x", "apple-m2", "x", "2x", *QUANTITIES, *NAMES, *TEXTS,
]  # fmt: skip
COUNTS = ["", "", "1x", "2x", "8x"]
ODD_COUNTS = ["99x", "0x", "1000x", "-1x", "2X"]


def machine(random: Random) -> str:
    """Return a name of one or several machines, valid or not."""
    parts = []
    for _ in range(random.choice((1, 1, 2, 3, 6))):
        device = random.choice(DEVICES if random.random() < 0.8 else PARTS)
        count = random.choice(COUNTS if random.random() < 0.9 else ODD_COUNTS)
        parts.append(device if ":" in device else count + device)
    text = parts[0]
    for part in parts[1:]:
        text += random.choice("+" if random.random() < 0.8 else (",", " + ", "++", ";")) + part
    return text


FILES = [
    "good.yaml", "locked.yaml", "locked.lock.json", "vendored.yaml", "map.json", "llama", "llama/config.json",
    "learned", "weights",
    "machine.yaml", "missing.yaml", ".", "..", "", "-", "*.yaml", "good.y?ml", "endless", "pipe", "a/b.yaml",
    "good.yaml/x",
    "model.safetensors", "org/name", "é.yaml", "x\ny.yaml", "new.yaml", "~/x", "C:\\x",
]  # fmt: skip
LEFT_OUT = {"measure", "host"}
"""Options that are left out: measuring a machine takes its time, and so does looking for a host that there is not."""


def arguments(random: Random) -> list[str]:
    """Return a command line: a command with some of its arguments and options, or an invalid one."""
    name, command = random.choice(sorted(devmap.commands.items()))
    words = [name]
    for parameter in command.params:
        is_due = isinstance(parameter, click.Argument) or parameter.required
        if parameter.name in LEFT_OUT or random.random() > (0.95 if is_due else 0.2):
            continue
        option = random.choice(parameter.opts) if isinstance(parameter, click.Option) else None
        takes_value = not (isinstance(parameter, click.Option) and parameter.is_flag)
        for _ in range(random.choice((1, 1, 1, 1, 2, 3)) if parameter.multiple or parameter.nargs == -1 else 1):
            words += [*([option] if option else []), *([_argument(random, parameter)] if takes_value else [])]
    if random.random() < 0.1:
        words.insert(
            random.randint(0, len(words)), random.choice((*TEXTS, *FILES, "--", "--help", "--format", "--no-such"))
        )
    return [word for word in words if not word.startswith("/")]  # what is written stays in the workspace


def _argument(random: Random, parameter: click.Parameter) -> str:
    kind = random.random()
    if kind < 0.05:
        return random.choice(TEXTS)
    if isinstance(parameter.type, click.Choice):
        return random.choice((*parameter.type.choices, "x"))
    if parameter.name in ("machine", "machines"):
        return machine(random) if kind < 0.9 else "machine.yaml"
    if parameter.name in ("pattern", "match"):
        return pattern(random)
    if parameter.name == "variables":
        return (
            f"{random.choice(('last', 'size', 'x', '', 'a b'))}={random.choice((*QUANTITIES, *TEXTS, '3', '{{ x }}'))}"
        )
    if parameter.name == "source":
        return random.choice(("llama", "learned", "weights", "llama/config.json", *FILES))
    if isinstance(parameter.type, click.Path) or isinstance(parameter, click.Argument):
        return random.choice(FILES[:4] if kind < 0.5 else FILES)
    return random.choice((*NAMES, *QUANTITIES, "1", "16", "128", "100000"))
