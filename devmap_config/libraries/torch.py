"""The uses of private parts of torch. Imports torch when they are called.

Nothing is looked up before it is used, so that a change in torch does not break parts of a command that do not use it.
"""

from __future__ import annotations

import logging
import threading
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

from devmap_config.libraries.private import Private

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import torch

# -- tensors without data ----------------------------------------------------------------------------------------------

FAKE_TENSOR_MODE = Private(
    "torch._subclasses.fake_tensor.FakeTensorMode",
    "makes tensors that have shapes and no data, on which models are measured and dry-run",
    takes=("allow_non_fake_inputs",),
)
FAKE_TENSOR_LOGGER = "torch._subclasses.fake_tensor"
"""The logger to which torch logs every failed operation with its traceback, even if the failure is handled."""
FAKE_TENSOR = Private("torch._subclasses.fake_tensor.FakeTensor", "the class of tensors without data")
FAKE_TENSOR_DEVICE = Private(
    "torch._subclasses.fake_tensor.FakeTensor.device",
    "the device of a tensor without data; the dry run patches it to return a simulated device",
)


@contextmanager
def tensors_without_data() -> Iterator[None]:
    """Let tensors have shapes but no data while the context lasts, including those that a model already holds.

    A deep copy of such a tensor, as looped models make of their cache's layers, is a new tensor: torch itself would
    copy the missing data, and crash the process.
    """
    with (
        _logging_no_failures(),
        FAKE_TENSOR_MODE.find()(allow_non_fake_inputs=True),
        patch.object(FAKE_TENSOR.find(), "__deepcopy__", _deep_copy),
    ):
        yield


class _Stream:
    """Replaces a stream of a card; its work is done at once."""

    def __init__(self, *_: object, **__: object) -> None:
        """Accept any arguments."""

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *_: object) -> None:
        """Do nothing, as the work is done."""

    def wait_stream(self, _: _Stream) -> None:
        """Do nothing, as there is no card."""


def held_bytes(tensor: torch.Tensor) -> int:
    """Return the bytes that a tensor holds; for one that consists of others, like quantised tensors, the sum of theirs.

    Example:
        >>> import torch
        >>> held_bytes(torch.zeros(2, 3))
        24
    """
    if not hasattr(tensor, "__tensor_flatten__"):
        return int(tensor.nbytes)
    return sum(held_bytes(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])


@contextmanager
def streams_without_a_card() -> Iterator[None]:
    """Let code create streams of cards and wait for them without a card, while the context lasts."""
    import torch

    # A class replaces a class, because modules that are imported meanwhile may use it in annotations.
    with patch.object(torch, "Stream", _Stream), patch.object(torch.cuda, "default_stream", _Stream):
        yield


@contextmanager
def _logging_no_failures() -> Iterator[None]:
    """Keep torch from logging operations that fail without data, because their errors are handled."""
    logger = logging.getLogger(FAKE_TENSOR_LOGGER)
    before = logger.disabled
    logger.disabled = not logging.getLogger("devmap_config").isEnabledFor(logging.DEBUG)
    try:
        yield
    finally:
        logger.disabled = before


def _deep_copy(tensor: torch.Tensor, memo: dict[int, Any]) -> torch.Tensor:
    copied: torch.Tensor = memo.get(id(tensor), tensor)
    if copied is tensor:
        copied = memo[id(tensor)] = tensor.detach().clone()
    return copied


@contextmanager
def answering_for_devices(answer: Callable[[Any, Callable[[], torch.device]], torch.device]) -> Iterator[None]:
    """Let `answer` determine the device of a tensor without data; it is called with the tensor and torch's own
    answer.
    """
    class_ = FAKE_TENSOR.find()
    own = FAKE_TENSOR_DEVICE.of(class_)
    if not isinstance(own, property) or own.fget is None:
        raise FAKE_TENSOR_DEVICE.changed("is not a property")
    of_torch: Any = own.fget

    def device(tensor: Any) -> torch.device:
        return answer(tensor, lambda: of_torch(tensor))

    with patch.object(class_, "device", property(device)):
        yield


# -- seeing what runs --------------------------------------------------------------------------------------------------

DISPATCH_MODE = Private(
    "torch.utils._python_dispatch.TorchDispatchMode",
    "intercepts every operation, to count what it allocates and computes",
)
DISABLE_MODES = Private(
    "torch.utils._python_dispatch._disable_current_modes",
    "computes numbers that depend on no data for real, beside tensors without data",
)
OPERATION_TAGS = Private(
    "torch._ops.OpOverload.tags", "marks operations whose result differs from call to call, such as random ones"
)
DISABLE_FUNCTIONS = Private(
    "torch._C.DisableTorchFunction",
    "keeps functions that torch calls within another function from being intercepted a second time",
)
OPERATION_SCHEMA = Private(
    "torch._ops.OpOverload._schema", "the name of an operation, by which the devices of its arguments are checked"
)
OPERATION_PACKET = Private("torch._ops.OpOverload._overloadpacket", "the key of an operation in `flop_registry`")
OPERATION_NAMESPACE = Private(
    "torch._ops.OpOverload.namespace", "tells operations that only read a property (`prim`) from those that compute"
)
OPERATION_IS_VIEW = Private("torch._ops.OpOverload.is_view", "marks operations that return a view and allocate nothing")
FLOP_REGISTRY = Private(
    "torch.utils.flop_counter.flop_registry", "the formulas for floating-point operations, by operation"
)
GROUPED_PRODUCT = Private(
    "torch.ops.aten._grouped_mm", "the matrix product with many experts; torch infers its shape for bfloat16 only"
)

FUSED_ATTENTION = Private(
    "torch.nn.functional.scaled_dot_product_attention",
    "patched while a model is measured, so that it is counted as a fused kernel; models look it up at every call",
)


def dispatch_mode() -> Any:
    """Return the class of modes that see every operation."""
    return DISPATCH_MODE.find()


def dispatched_by(action: Callable[[], object]) -> int:
    """Return the number of operations that an action dispatches."""
    count = 0

    class Counting(dispatch_mode()):  # type: ignore[misc]  # torch is not read by the type checker
        def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
            nonlocal count
            count += not is_question(function)
            return function(*arguments, **(options or {}))

    with Counting():
        action()
    return count


def torch_attention() -> Callable[..., Any]:
    """Return torch's attention function, or its present replacement."""
    attention: Callable[..., Any] = FUSED_ATTENTION.find()
    return attention


def flop_registry() -> dict[Any, Callable[..., int]]:
    """Return the functions that count floating-point operations, by operation."""
    registry: dict[Any, Callable[..., int]] = FLOP_REGISTRY.find()
    return registry


@contextmanager
def attending_with(attend: Callable[..., torch.Tensor]) -> Iterator[None]:
    """Replace torch's attention function by `attend` while the context lasts."""
    from torch.nn import functional

    with patch.object(functional, FUSED_ATTENTION.attribute, attend):
        yield


def without_functions() -> Any:
    """Return a context in which modes around torch's functions are inactive."""
    return DISABLE_FUNCTIONS.find()()


def without_modes() -> Any:
    """Return a context in which modes around operations are inactive, so that tensors have data."""
    return DISABLE_MODES.find()()


WITH_DATA = Private(
    "torch._subclasses.fake_tensor.unset_fake_temporarily",
    "computes known values for real, among tensors without data",
)


def with_data() -> Any:
    """Return a context in which tensors have data again."""
    return WITH_DATA.find()()


@contextmanager
def telling_values(value_of: Callable[[torch.Tensor], torch.Tensor | None]) -> Iterator[None]:
    """Let tensors without data be converted to lists and numbers if `value_of` knows their values."""
    import torch

    class_, make = FAKE_TENSOR.find(), torch.tensor
    of_torch = class_.tolist

    def listed(tensor: torch.Tensor) -> Any:
        value = value_of(tensor)
        if value is None:
            return of_torch(tensor)
        with with_data():
            return value.tolist()

    def number(value: Any) -> Any:
        is_known = isinstance(value, class_) and value.numel() == 1 and value_of(value) is not None
        return listed(value) if is_known else value

    def made(data: Any, *arguments: Any, **options: Any) -> torch.Tensor:
        return make(tree_map(number, data) if isinstance(data, (list, tuple)) else data, *arguments, **options)

    with patch.object(class_, "tolist", listed), patch.object(torch, "tensor", made):
        yield


def is_nondeterministic(operation: Any) -> bool:
    """Return whether an operation draws numbers at random."""
    import torch

    try:
        return torch.Tag.nondeterministic_seeded in operation.tags
    except AttributeError as error:
        raise OPERATION_TAGS.changed() from error


def operation_name(operation: Any) -> str:
    """Return the name of an operation without its overload: `aten::index_put_`."""
    try:
        name: str = operation._schema.name
    except AttributeError as error:
        raise OPERATION_SCHEMA.changed() from error
    return name


def has_data_dependent_shape(operation: Any) -> bool:
    """Return whether the result of an operation, or its shape, depends on data."""
    import torch

    try:
        tags = operation.tags
    except AttributeError as error:
        raise OPERATION_TAGS.changed() from error
    dependent = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)
    return any(tag in tags for tag in dependent) or operation_name(operation) == "aten::equal"


def writes_to(operation: Any, arguments: Any) -> list[torch.Tensor]:
    """Return the tensors among an operation's arguments that it writes to."""
    import torch

    try:
        described = operation._schema.arguments
        written = [argument.alias_info is not None and argument.alias_info.is_write for argument in described]
    except AttributeError as error:
        raise OPERATION_SCHEMA.changed() from error
    leaves = (
        leaf
        for argument, is_written in zip(arguments, written, strict=False)
        if is_written
        for leaf in tree_leaves(argument)
    )
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]


def operation_packet(operation: Any) -> Any:
    """Return the packet of an operation, which its overloads share: the key of `flop_registry`."""
    try:
        return operation._overloadpacket
    except AttributeError as error:
        raise OPERATION_PACKET.changed() from error


def is_grouped_product(operation: Any) -> bool:
    """Return whether an operation is the product of rows with the weights of their experts."""
    return operation_packet(operation) is GROUPED_PRODUCT.find()


def is_question(operation: Any) -> bool:
    """Return whether an operation only asks for a property of a tensor."""
    try:
        return bool(operation.namespace == "prim")
    except AttributeError as error:
        raise OPERATION_NAMESPACE.changed() from error


def is_view(operation: Any) -> bool:
    """Return whether an operation returns a view of an existing storage."""
    try:
        return bool(operation.is_view)
    except AttributeError as error:
        raise OPERATION_IS_VIEW.changed() from error


# -- values within values ----------------------------------------------------------------------------------------------

TREE_LEAVES = Private("torch.utils._pytree.tree_leaves", "lists the tensors within the inputs and outputs of a module")
TREE_MAP = Private("torch.utils._pytree.tree_map", "replaces each of these tensors by another")
TREE_FLATTEN = Private(
    "torch.utils._pytree.tree_flatten", "lists these tensors together with the structure around them"
)
TREE_UNFLATTEN = Private(
    "torch.utils._pytree.tree_unflatten", "rebuilds the output of a block that is not run again from that structure"
)


def tree_leaves(value: Any) -> list[Any]:
    """Return the leaves of a nested value, in order."""
    leaves: list[Any] = TREE_LEAVES.find()(value)
    return leaves


def tree_map(change: Callable[[Any], Any], value: Any) -> Any:
    """Return a nested value with `change` applied to each leaf."""
    return TREE_MAP.find()(change, value)


def tree_flatten(value: Any) -> tuple[list[Any], Any]:
    """Return the leaves of a nested value, in order, and its structure."""
    flat: tuple[list[Any], Any] = TREE_FLATTEN.find()(value)
    return flat


def tree_unflatten(leaves: Any, structure: Any) -> Any:
    """Return the nested value with these leaves and this structure."""
    return TREE_UNFLATTEN.find()(leaves, structure)


# -- what a module holds -----------------------------------------------------------------------------------------------

MODULE_REGISTERED = Private(
    "torch.nn.modules.module.register_module_module_registration_hook",
    "counts the modules of a model while it is built",
)
PARAMETER_REGISTERED = Private(
    "torch.nn.modules.module.register_module_parameter_registration_hook",
    "counts the parameters of a model while it is built",
)


@contextmanager
def telling_of_parts(tell: Callable[[], None]) -> Iterator[None]:
    """Call `tell` whenever a module or a parameter becomes part of a module that this thread builds."""
    builder = threading.get_ident()

    def registered(*_: Any) -> None:
        if threading.get_ident() == builder:
            tell()

    with ExitStack() as stack:
        for registration in (MODULE_REGISTERED, PARAMETER_REGISTERED):
            stack.callback(registration.find()(registered).remove)
        yield


STORAGE_IDENTITY = Private(
    "torch.UntypedStorage._cdata", "identifies a storage, to see which are allocated, kept alive or shared"
)
IS_BATCHED = Private(
    "torch._C._functorch.is_batchedtensor",
    "recognises the tensors that `torch.vmap` passes to a function, which do not expose their storage",
)
UNBATCHED = Private("torch._C._functorch.get_unwrapped", "returns the whole tensor behind such a tensor")
MODULE_PARAMETERS = Private(
    "torch.nn.Module._parameters", "replaces a parameter by another tensor without copying it, as the public way would"
)
MODULE_BUFFERS = Private(
    "torch.nn.Module._buffers", "replaces a buffer by another tensor without copying it, as the public way would"
)
TENSOR_VERSION = Private(
    "torch.Tensor._version", "counts the writes to a tensor; one that was written to is not read from its file again"
)
NON_PERSISTENT_BUFFERS = Private(
    "torch.nn.Module._non_persistent_buffers_set",
    "names the buffers that no checkpoint holds; torch has no public name for it",
)


def storage_identity(storage: Any) -> int:
    """Return the identity of a storage among those that are alive: its address."""
    try:
        identity: int = storage._cdata
    except AttributeError as error:
        raise STORAGE_IDENTITY.changed() from error
    return identity


def shown_storage(tensor: torch.Tensor) -> Any:
    """Return the storage of a tensor, even within `torch.vmap`."""
    is_batched = IS_BATCHED.find()
    while is_batched(tensor):
        tensor = UNBATCHED.find()(tensor)
    return tensor.untyped_storage()


def version_of(tensor: torch.Tensor) -> int:
    """Return the number of times that a tensor was modified."""
    count: int = TENSOR_VERSION.of(tensor)
    return count


def own_parameters(module: torch.nn.Module) -> dict[str, torch.nn.Parameter | None]:
    """Return a module's own parameters by name, as the mapping in which it looks them up."""
    parameters: dict[str, torch.nn.Parameter | None] = MODULE_PARAMETERS.of(module)
    return parameters


def own_buffers(module: torch.nn.Module) -> dict[str, torch.Tensor | None]:
    """Return a module's own buffers by name, as the mapping in which it looks them up."""
    buffers: dict[str, torch.Tensor | None] = MODULE_BUFFERS.of(module)
    return buffers


def non_persistent_buffers(module: torch.nn.Module) -> set[str]:
    """Return the names of a module's own buffers that no checkpoint holds."""
    names: set[str] = NON_PERSISTENT_BUFFERS.of(module)
    return names


# -- what cannot be told without data ----------------------------------------------------------------------------------

DATA_DEPENDENT = Private(
    "torch._subclasses.fake_tensor.DataDependentOutputException",
    "raised if a model's code reads a number that depends on data",
)
DYNAMIC_SHAPE = Private(
    "torch._subclasses.fake_tensor.DynamicOutputShapeException",
    "raised if a model's code makes a tensor whose shape depends on data",
)
UNSUPPORTED_TENSOR = Private(
    "torch._subclasses.fake_tensor.UnsupportedFakeTensorException", "raised for a tensor that cannot exist without data"
)
UNSUPPORTED_OPERATION = Private(
    "torch._subclasses.fake_tensor.UnsupportedOperatorException",
    "raised for an operation that torch cannot run without data",
)
GUARD_ON_DATA = Private(
    "torch.fx.experimental.symbolic_shapes.GuardOnDataDependentSymNode",
    "raised if a model's code branches on a value that depends on data",
)


def needs_data(error: BaseException) -> bool:
    """Return whether torch raised this error because an operation needs data that a tensor lacks."""
    names = (DATA_DEPENDENT, DYNAMIC_SHAPE, UNSUPPORTED_TENSOR, UNSUPPORTED_OPERATION, GUARD_ON_DATA)
    return isinstance(error, tuple(name.find() for name in names))


# -- compiled code -----------------------------------------------------------------------------------------------------

CPP_COMPILER = Private(
    "torch._inductor.cpp_builder.get_cpp_compiler", "the C++ compiler with which torch compiles for a CPU"
)


def finds_cpp_compiler() -> bool:
    """Return whether torch finds a C++ compiler, which it needs for compiling for a CPU."""
    find_compiler = CPP_COMPILER.find()
    try:
        find_compiler()
    except RuntimeError:  # the class that torch raises is a subclass
        return False
    return True
