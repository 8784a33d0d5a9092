"""Templates in profiles: jinja2, sandboxed, strict, and bounded in steps and in size."""

from __future__ import annotations

import re
from functools import wraps
from typing import TYPE_CHECKING, Any

from jinja2 import StrictUndefined, TemplateError, TemplateSyntaxError, UndefinedError, nodes
from jinja2.compiler import CodeGenerator
from jinja2.exceptions import SecurityError
from jinja2.runtime import LoopContext, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from devmap_config.diagnostics.codes import ErrorCode

MAX_STEPS = 20_000
"""The most loop rounds, calls and operations of one template."""
MAX_CHARACTERS = 10_000
MAX_NUMBER_BITS = 256
MAX_WIDTH = 100
"""The most spaces that `tojson` may indent by, and digits that `round` may round to."""

CHARACTERS_A_STEP = 100
"""Each round of a loop and each call of a macro writes the template's text again, and counts one step per this many
characters.
"""

FILTERS = frozenset(
    "abs capitalize count d default dictsort first float int items join last length list lower max min replace reverse"
    " round sort string sum title tojson trim unique upper".split()
)
"""jinja2's filters whose result is bounded by their arguments (`join` and `replace` are checked)."""

METHODS = frozenset(["endswith", "get", "items", "keys", "lower", "startswith", "strip", "upper", "values"])

HELP = "templates are jinja2 expressions such as `{{ context * 2 }}`"


class TemplateRefusedError(Exception):
    """A template cannot be rendered. `code` is a diagnostic's."""

    def __init__(self, code: ErrorCode, message: str, help: str = HELP) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.help = help


def render(text: str, variables: Mapping[str, object]) -> str:
    """Render a template.

    Raises:
        TemplateRefusedError: if it cannot be rendered, or its result grows too large.
    """
    environment = _Environment(len(text))
    try:
        environment.check_length(len(text))
        template = environment.from_string(environment.parse(text))
        parts: list[str] = []
        length = 0
        for part in template.generate(**variables):
            parts.append(part)
            length += len(part)
            environment.check_length(length)
        return "".join(parts).encode().decode()  # raises if the text holds half a character
    except UndefinedError as error:
        name = re.match(r"'([^']+)' is undefined", error.message or "")
        known = ", ".join(f"`{name}`" for name in variables) or "none"
        message = f"the variable `{name.group(1)}` is not defined" if name else str(error.message)
        help = f"give it under `variables:` or with `--set` (`variables=` in Python); defined are: {known}"
        if name and name.group(1) in ("env", "os", "environ"):
            help = "the environment is not read; " + help
        raise TemplateRefusedError("undefined-variable", message, help) from None
    except TemplateSyntaxError as error:
        raise TemplateRefusedError("template-error", f"the template cannot be read: {_lower(error.message)}") from None
    except SyntaxError as error:  # jinja2 may generate invalid Python, as for a slice among several indices
        raise TemplateRefusedError("template-error", f"the template cannot be read: {_lower(error.msg)}") from None
    except (RecursionError, MemoryError, OverflowError) as error:
        raise _limit(f"the template does not end ({type(error).__name__})") from None
    except (TemplateError, SecurityError, ValueError, TypeError, ArithmeticError, LookupError, AttributeError) as error:
        raise TemplateRefusedError("template-error", f"the template fails: {_lower(str(error))}") from None


def _limit(message: str) -> TemplateRefusedError:
    return TemplateRefusedError("template-limit", message, "templates fill in values; compute large things elsewhere")


def _lower(text: str | None) -> str:
    text = text or "no reason given"
    return text[:1].lower() + text[1:].rstrip(".")


class _CodeGenerator(CodeGenerator):
    """Sends all expressions that make new values through the environment, like the operators that a sandbox intercepts.

    Lists that hold each other several times are exponentially large to anything that compares them.
    """

    def visit_Concat(self, node: nodes.Concat, frame: Any) -> None:  # noqa: N802 - jinja2's name for it
        self.write("environment.concatenate((")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")

    def _visit_checked(self, visit: Callable[[Any, Any], None], node: nodes.Node, frame: Any) -> None:
        self.write("environment.check_size(")
        visit(node, frame)
        self.write(")")

    def visit_List(self, node: nodes.List, frame: Any) -> None:  # noqa: N802
        self._visit_checked(super().visit_List, node, frame)

    def visit_Tuple(self, node: nodes.Tuple, frame: Any) -> None:  # noqa: N802
        if node.ctx == "store":  # the names of `for key, value in …`
            super().visit_Tuple(node, frame)
        else:
            self._visit_checked(super().visit_Tuple, node, frame)

    def visit_Dict(self, node: nodes.Dict, frame: Any) -> None:  # noqa: N802
        self._visit_checked(super().visit_Dict, node, frame)


class _Environment(ImmutableSandboxedEnvironment):
    """jinja2 with a budget: every loop round, call and operation counts, and the size of every result is bounded."""

    code_generator_class = _CodeGenerator
    intercepted_binops = frozenset(["+", "-", "*", "/", "//", "%", "**"])

    def __init__(self, length: int) -> None:
        super().__init__(
            undefined=StrictUndefined, keep_trailing_newline=True, autoescape=False, finalize=self.check_size
        )
        self.steps = 0
        self._steps_of_text = 1 + length // CHARACTERS_A_STEP
        self.filters = {name: self._counted(self.filters[name]) for name in self.filters if name in FILTERS}
        self.filters["_rounds"] = self._rounds
        self.globals = {"range": self.globals["range"]}

    def parse(self, source: str, name: str | None = None, filename: str | None = None) -> nodes.Template:
        """Return the template's tree, with every loop changed to draw its rounds from the budget."""
        tree = super().parse(source, name, filename)
        for loop in tree.find_all(nodes.For):
            if loop.recursive:
                raise TemplateRefusedError("template-error", "recursive loops are not allowed")
            loop.iter = nodes.Filter(loop.iter, "_rounds", [], [], None, None, lineno=loop.lineno)
        return tree

    def _rounds(self, values: Iterable[object]) -> list[object]:
        rounds: list[object] = []
        for value in values:
            self.count(self._steps_of_text)
            rounds.append(value)
        return rounds

    def _counted(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def counted(*arguments: Any, **options: Any) -> Any:
            self.count()
            for argument in (*arguments, *options.values()):
                self.check_size(argument)
            name = getattr(function, "__name__", "")
            if name in ("do_replace", "sync_do_join", "do_join"):
                self._check_product(arguments, options)
            if name in ("do_tojson", "do_round"):
                self._check_width((*arguments[1:], *options.values()))
            return self.check_size(function(*arguments, **options))

        return counted

    def _check_product(self, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        """Refuse `join` and `replace` if their result may be too large."""
        sizes = [
            len(str(part)) for part in (*arguments, *options.values()) if isinstance(part, (str, list, tuple, dict))
        ]
        product = 1
        for size in sizes:
            product *= max(size, 1)
        if product > 100 * MAX_CHARACTERS:
            raise _limit("the template's text grows too large")

    def _check_width(self, arguments: tuple[Any, ...]) -> None:
        if any(isinstance(argument, int) and abs(argument) > MAX_WIDTH for argument in arguments):
            raise _limit(f"`tojson` and `round` take numbers up to {MAX_WIDTH}")

    def call(self, context: Any, function: Any, *arguments: Any, **options: Any) -> Any:
        """Call macros, `range`, `loop` and the harmless methods of text and mappings, and nothing else."""
        self.count(self._steps_of_text)
        owner = getattr(function, "__self__", None)
        allowed = (
            isinstance(function, Macro)
            or function is self.globals["range"]
            or isinstance(owner, LoopContext)
            or (isinstance(owner, (str, dict)) and getattr(function, "__name__", "") in METHODS)
        )
        if not allowed:
            name = getattr(function, "__name__", type(function).__name__)
            raise SecurityError(f"`{name}` must not be called in a template")
        return self.check_size(super().call(context, function, *arguments, **options))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Apply an operator to numbers or text, if its result cannot be huge."""
        self.count()
        if operator == "*" and not (_is_number(left) and _is_number(right)):
            raise SecurityError("`*` multiplies numbers only")
        if operator == "%" and not _is_number(left):
            raise SecurityError("`%` is the remainder of numbers only")
        if operator == "**":
            if not (_is_number(left) and _is_number(right)):
                raise SecurityError("`**` takes numbers only")
            if isinstance(left, int) and isinstance(right, int) and left.bit_length() * right > MAX_NUMBER_BITS:
                raise _limit("a number of the template grows too large")
        self.check_size(left)
        self.check_size(right)
        return self.check_size(super().call_binop(context, operator, left, right))

    def concatenate(self, parts: tuple[object, ...]) -> str:
        """Concatenate texts, as `~` does."""
        self.count()
        texts = [str(self.check_size(part)) for part in parts]
        self.check_length(sum(map(len, texts)))
        return "".join(texts)

    def count(self, steps: int = 1) -> None:
        """Take steps from the budget."""
        self.steps += steps
        if self.steps > MAX_STEPS:
            raise _limit(f"the template takes more than {MAX_STEPS:,} steps")

    def check_length(self, length: int) -> None:
        """Raise if a text or a list of this length is too large."""
        if length > MAX_CHARACTERS:
            raise _limit(f"the template's text grows beyond {MAX_CHARACTERS:,} characters")

    def check_size(self, value: Any) -> Any:
        """Return a value, or raise if it is too large."""
        self._weigh(value, 0)
        return value

    def _weigh(self, value: Any, weight: int) -> int:
        """Return the number of characters and entries within a value, which may hold the same list many times."""
        if isinstance(value, str):
            weight += len(value)
        elif isinstance(value, (list, tuple)):
            for item in value:
                weight = self._weigh(item, weight + 1)
        elif isinstance(value, dict):
            for key, item in value.items():
                weight = self._weigh(item, self._weigh(key, weight + 1))
        elif isinstance(value, int) and value.bit_length() > MAX_NUMBER_BITS:
            raise _limit("a number of the template grows too large")
        self.check_length(weight)
        return weight


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float))
