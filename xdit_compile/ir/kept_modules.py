"""Modules whose code cannot be recorded, kept in a graph as one operator that runs them as they are.

Experts that tokens are routed to are the example: how many tokens an expert gets depends on values that were computed.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.func import functional_call
from torch.utils import _pytree as pytree

from xdit_compile.errors import CaptureError

from .precision import full_precision
from .results import PLAIN

_LIBRARY = torch.library.Library("xdit_compile", "FRAGMENT")
_LIBRARY.define(
    "kept_module(Tensor[] inputs, Tensor[] weights, str name, int[] apart, int[] sizes, ScalarType dtype) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_LIVE: weakref.WeakValueDictionary[str, KeptModule] = weakref.WeakValueDictionary()
"""What operators call by name: a graph holds nothing but tensors, numbers and strings. Programs keep these alive."""

TOLERANCE = 1e-5


@dataclasses.dataclass(eq=False)
class KeptModule:
    """A module that runs as it is, with the weights of any module that is made alike.

    Args:
        like: the module.
        leaves, spec: the flat arguments of its calls; tensors are given anew in each.
        weights: the names of its parameters and buffers.
        sizes, dtype: of the result.
        apart: pairs of a dim of the input and the dim of the result whose positions depend on it alone, one by one.
    """

    like: nn.Module
    leaves: tuple[Any, ...]
    spec: pytree.TreeSpec
    weights: tuple[str, ...]
    sizes: tuple[int, ...]
    dtype: torch.dtype
    apart: tuple[tuple[int, int], ...] = ()
    name: str = ""

    def run(self, inputs: Sequence[torch.Tensor], weights: Sequence[torch.Tensor]) -> torch.Tensor:
        """The module's result for other inputs and weights."""
        return functional_call(self.like, dict(zip(self.weights, weights, strict=True)), *_given(self, inputs))


def _given(kept: KeptModule, inputs: Sequence[torch.Tensor]) -> tuple[tuple, dict]:
    rest = iter(inputs)
    leaves = [next(rest) if isinstance(leaf, torch.Tensor) else leaf for leaf in kept.leaves]
    return pytree.tree_unflatten(leaves, kept.spec)


@torch.library.impl(_LIBRARY, "kept_module", "CompositeExplicitAutograd")
def _run(
    inputs: list[torch.Tensor], weights: list[torch.Tensor], name: str, apart: list[int], sizes: list[int], dtype: Any
) -> torch.Tensor:  # fmt: skip
    shape = result_shape(inputs, apart, sizes)
    if 0 in shape:
        return inputs[0].new_empty(shape, dtype=dtype)
    with torch.no_grad():
        return _LIVE[name].run(inputs, weights).contiguous().clone()


@torch.library.impl(_LIBRARY, "kept_module", "Meta")
def _meta(
    inputs: list[torch.Tensor], weights: list[torch.Tensor], name: str, apart: list[int], sizes: list[int], dtype: Any
) -> torch.Tensor:  # fmt: skip
    return inputs[0].new_empty(result_shape(inputs, apart, sizes), dtype=dtype)


def result_shape(inputs: Sequence[torch.Tensor], apart: Sequence[int], sizes: Sequence[int]) -> list[int]:
    """The shape of the result for inputs of which ranks may have a part."""
    shape = list(sizes)
    for given, made in zip(apart[::2], apart[1::2], strict=True):
        shape[made] = inputs[0].shape[given]
    return shape


@dataclasses.dataclass
class Example:
    """One call of a module and its result."""

    args: tuple
    kwargs: dict
    result: Any


@contextmanager
def kept(modules: dict[str, tuple[nn.Module, Example | None]]) -> Iterator[list[KeptModule]]:
    """Have modules, by path, be recorded as one operator each; those made alike as the same one.

    One without an example, as it cannot run, is taken for what one made alike was seen to be.

    Raises:
        CaptureError: where one has inputs or results that the operator cannot have, or nothing is known of it.
    """
    made: list[KeptModule] = []
    try:
        for path, (module, example) in modules.items():
            known = made if example else [*made, *_LIVE.values()]
            alike = next((one for one in known if _alike(one, module, example)), None)
            kept_module = alike or _made(path, module, example)
            if kept_module not in made:
                made.append(kept_module)
            vars(module)["forward"] = _stand_in(kept_module, module)
        yield made
    finally:
        for module, _ in modules.values():
            vars(module).pop("forward", None)


def _stand_in(one: KeptModule, module: nn.Module) -> Callable[..., torch.Tensor]:
    apart = [dim for pair in one.apart for dim in pair]

    def forward(*args: Any, **kwargs: Any) -> torch.Tensor:
        leaves, spec = pytree.tree_flatten((args, kwargs))
        if spec != one.spec or not all(_fits(a, b, apart[::2]) for a, b in zip(one.leaves, leaves, strict=True)):
            raise CaptureError(f"{one.name} is called in several ways, and its code cannot be recorded")
        inputs, weights = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)], _weights(module)
        sizes = result_shape(inputs, apart, one.sizes)
        op = torch.ops.xdit_compile.kept_module.default
        return op(inputs, [weights[name] for name in one.weights], one.name, apart, sizes, one.dtype)

    return forward


def _fits(known: Any, argument: Any, apart: Sequence[int]) -> bool:
    """Whether an argument is the known one but for the sizes of dims whose positions are computed one by one."""
    if not isinstance(known, torch.Tensor) or not isinstance(argument, torch.Tensor):
        return _same(known, argument)
    sizes = zip(known.shape, argument.shape, strict=False)
    return known.dim() == argument.dim() and all(a == b or dim in apart for dim, (a, b) in enumerate(sizes))


def _made(path: str, module: nn.Module, example: Example | None) -> KeptModule:
    if example is None:
        raise CaptureError(
            f"{path} reads values that it computes, and cannot be run to see how, as its weights are not all there: "
            "load the whole pipeline, or use a plan without tensor"
        )
    if not isinstance(example.result, torch.Tensor):
        raise CaptureError(f"{path} returns more than one tensor, and its code cannot be recorded")
    if "forward" in vars(module):
        raise CaptureError(f"the forward of {path} was replaced, and its code cannot be recorded")
    leaves, spec = pytree.tree_flatten((example.args, example.kwargs))
    result = example.result
    one = KeptModule(module, tuple(leaves), spec, tuple(_weights(module)), tuple(result.shape), result.dtype)
    with full_precision():
        one.apart = tuple(_apart(one, [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)], result))
    one.leaves = tuple(leaf.to("meta") if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves)
    one.name = next(name for name in (path, *(f"{path}#{n}" for n in range(len(_LIVE) + 1))) if name not in _LIVE)
    _LIVE[one.name] = one
    return one


def _weights(module: nn.Module) -> dict[str, torch.Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def _alike(one: KeptModule, module: nn.Module, example: Example | None) -> bool:
    """Whether two modules differ in the values of their weights alone, and are called in the same way."""
    if example is not None:
        leaves, spec = pytree.tree_flatten((example.args, example.kwargs))
        if spec != one.spec or not all(map(_same, one.leaves, leaves)):
            return False
    pairs = dict(one.like.named_modules()), dict(module.named_modules())
    return pairs[0].keys() == pairs[1].keys() and all(_same_module(pairs[0][path], pairs[1][path]) for path in pairs[0])


def _same_module(one: nn.Module, other: nn.Module) -> bool:
    torch_s = {"_parameters", "_buffers", "_modules"}
    state = [{name: value for name, value in vars(each).items() if name not in torch_s} for each in (one, other)]
    for each in state:
        each.pop("forward", None)
    tensors = [[*each._parameters.items(), *each._buffers.items()] for each in (one, other)]
    return (
        type(one) is type(other)
        and state[0].keys() == state[1].keys()
        and all(_same(state[0][name], state[1][name]) for name in state[0])
        and [name for name, _ in tensors[0]] == [name for name, _ in tensors[1]]
        and all(_same(a, b) for (_, a), (_, b) in zip(*tensors, strict=True))
    )


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one.shape == other.shape and one.dtype == other.dtype
    empty = isinstance(one, dict | list | set) and not one and not other
    return one is other or type(one) is type(other) and (empty or isinstance(one, (*PLAIN, tuple)) and one == other)


def _apart(one: KeptModule, inputs: list[torch.Tensor], result: torch.Tensor) -> Iterator[tuple[int, int]]:
    """The pairs of dims that are seen to be computed position by position: any part of the input makes that part of
    the result, for these inputs, for equal ones at every position, and for the same at other places."""
    if len(inputs) != 1:
        return
    (operand,) = inputs
    for dim, size in enumerate(operand.shape):
        for made in range(result.dim()):
            if size > 1 and result.shape[made] == size and _by_parts(one, operand, dim, made):
                yield dim, made
                break


def _by_parts(one: KeptModule, operand: torch.Tensor, dim: int, made: int) -> bool:
    weights = [each.detach() for each in _weights(one.like).values()]
    compute = lambda part: one.run([part.contiguous()], weights)  # noqa: E731
    size = operand.shape[dim]
    cuts = {1, size // 3, size // 2, size - 1} - {0}
    inputs = (
        operand,
        operand.narrow(dim, 0, 1).expand_as(operand),
        operand.narrow(dim, size - 1, 1).expand_as(operand),
    )
    try:
        for each in (*inputs, operand.flip(dim) * 1.5):
            whole = compute(each)
            for cut in cuts:
                parts = [compute(part) for part in each.split([cut, size - cut], dim)]
                if not _close(torch.cat(parts, made), whole):
                    return False
    except Exception:  # a module that takes no part of its input
        return False
    return True


def _close(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one.shape != other.shape:
        return False
    limit = {torch.float32: TOLERANCE, torch.float64: 1e-10}.get(other.dtype, 1e-2)
    return bool((one - other).abs().max() <= limit * other.abs().max())
