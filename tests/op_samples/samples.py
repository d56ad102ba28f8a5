"""The sample inputs of torch's operators as small modules, and the forms in which each operator is called."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.opinfo.core import BinaryUfuncInfo, OpInfo, ReductionOpInfo, SampleInput, UnaryUfuncInfo
from torch.utils import _pytree as pytree

MOST_SAMPLES = 6
"""Samples of different shapes taken of one operator."""
THOROUGH = (0, 1)
"""Samples that are tried in every form."""
MOST_ELEMENTS = 200_000
DTYPES = (torch.float32, torch.int64, torch.bool, torch.complex64, torch.bfloat16)
ODD_SHAPES = ((0, 3), (3, 0, 4), (1, 4, 1), (7, 1, 3))


@dataclasses.dataclass(frozen=True)
class Case:
    """One call of an operator: a module whose inputs are the sample's tensors."""

    operator: str
    form: str
    at: int
    module: nn.Module
    inputs: tuple[torch.Tensor, ...]

    def __str__(self) -> str:
        return f"{self.operator} {self.form} {self.at}"


class Call(nn.Module):
    """An operator behind something costly for each of its tensors: what costs nothing and is wanted whole stays whole.

    Args:
        leaves, spec: the flat sample; its tensors are the module's inputs.
        led: how many tensors, from the first, are computed (and so lie split); the others are inputs as they are.
        laid: lays each computed tensor out in memory.
    """

    def __init__(
        self, function: Callable[..., Any], leaves: list[Any], spec: pytree.TreeSpec, led: int,
        laid: Callable[[torch.Tensor], torch.Tensor],
    ):  # fmt: skip
        super().__init__()
        self.function, self.spec, self.led, self.laid = function, spec, led, laid
        self.leaves = [None if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        self.places = [at for at, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        leaves = list(self.leaves)
        for number, (at, tensor) in enumerate(zip(self.places, tensors, strict=True)):
            leaves[at] = self.laid(computed(tensor)) if number < self.led else tensor
        args, kwargs = pytree.tree_unflatten(leaves, self.spec)
        result = self.function(*args, **kwargs)
        return tuple(leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, torch.Tensor))


def computed(tensor: torch.Tensor) -> torch.Tensor:
    """The same values from an operator that costs something."""
    if tensor.dtype == torch.bool:
        return computed(tensor.float()) > 0.5
    return torch.einsum("...,->...", tensor, torch.ones((), dtype=tensor.dtype))


def as_made(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def strided(tensor: torch.Tensor) -> torch.Tensor:
    """The same values with the first and the last dim swapped in memory; channels last where there are four or five."""
    if tensor.dim() in (4, 5):
        last = torch.channels_last if tensor.dim() == 4 else torch.channels_last_3d
        return tensor.contiguous(memory_format=last)
    return tensor.transpose(0, -1).contiguous().transpose(0, -1) if tensor.dim() > 1 else tensor


def operators(only: Iterable[str] = ()) -> list[OpInfo]:
    """Operators that have samples; of these, where names are given, the ones labelled so."""
    names = set(only)
    return [info for info in op_db if not names or label(info) in names]


def label(info: OpInfo) -> str:
    return f"{info.name}.{info.variant_test_name}" if info.variant_test_name else info.name


def dtype_of(info: OpInfo) -> torch.dtype | None:
    """The dtype in which an operator is tried: float32 where it can be."""
    return next((dtype for dtype in DTYPES if dtype in info.supported_dtypes("cpu")), None)


def cases(info: OpInfo, most: int = MOST_SAMPLES) -> Iterator[Case]:
    """The samples of one operator in every form that it has; each shape once in the plain form."""
    dtype = dtype_of(info)
    if dtype is None:
        return
    for at, sample in enumerate(_samples(info, dtype, most)):
        yield from _forms(info, sample, at, thorough=at in THOROUGH)


def _samples(info: OpInfo, dtype: torch.dtype, most: int) -> Iterator[SampleInput]:
    torch.manual_seed(0)
    seen: set[str] = set()
    for sample in (*info.sample_inputs("cpu", dtype), *_odd(info, dtype)):
        leaves = pytree.tree_leaves((sample.input, sample.args, sample.kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        key = repr([(tuple(leaf.shape), leaf.dtype) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves])
        small = sum(tensor.numel() for tensor in tensors) <= MOST_ELEMENTS
        if key not in seen and small and tensors:
            seen.add(key)
            yield sample
        if len(seen) == most:
            return


def _odd(info: OpInfo, dtype: torch.dtype) -> Iterator[SampleInput]:
    """Dims of no and of one position, for operators that take any shape."""
    low, high = getattr(info, "domain", None) or (None, None)
    for shape in ODD_SHAPES:
        make = lambda: torch.testing.make_tensor(shape, dtype=dtype, device="cpu", low=low, high=high)  # noqa: B023, E731
        if isinstance(info, UnaryUfuncInfo):
            yield SampleInput(make(), **info.sample_kwargs("cpu", dtype, make())[0])
        elif isinstance(info, BinaryUfuncInfo):
            yield SampleInput(make(), args=(make(),))
        elif isinstance(info, ReductionOpInfo) and 0 not in shape:
            yield SampleInput(make())


def _forms(info: OpInfo, sample: SampleInput, at: int, thorough: bool) -> Iterator[Case]:
    leaves, spec = pytree.tree_flatten(((sample.input, *sample.args), sample.kwargs))
    tensors = tuple(leaf.detach() for leaf in leaves if isinstance(leaf, torch.Tensor))
    function, count = info.op, len(tensors)

    def case(form: str, function: Callable[..., Any], led: int = count, laid: Any = as_made) -> Case:
        return Case(label(info), form, at, Call(function, leaves, spec, led, laid), tensors)

    yield case("plain", function)
    if not thorough:
        return
    if count > 1:
        yield case("one", function, led=1)
    if any(tensor.dim() > 1 for tensor in tensors):
        yield case("strided", function, laid=strided)
    if info.inplace_variant is not None and not sample.broadcasts_input:
        yield case("inplace", info.inplace_variant)
    if info.supports_out:
        yield case("out", _into(function))


def _into(function: Callable[..., Any]) -> Callable[..., Any]:
    """The operator called with ``out=``, tensors of the shapes of its results."""

    def call(*args: Any, **kwargs: Any) -> Any:
        like = function(*args, **kwargs)
        made = pytree.tree_map_only(torch.Tensor, torch.empty_like, like)
        return function(*args, **kwargs, out=made if isinstance(made, torch.Tensor) else tuple(made))

    return call
