"""Fake tensors that remember their values where these follow from inputs alone, and which inputs they follow from."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils.weak import WeakIdKeyDictionary

from xdit_compile.errors import CaptureError

Sources = frozenset[int]


class UnknownValue(CaptureError):
    """The module reads a value that it computed, or makes a tensor whose size depends on one."""


@dataclasses.dataclass
class Sized:
    """A known tensor whose size depends on data, or that was made of such ones (``parents``)."""

    fake: torch.Tensor
    value: torch.Tensor
    sources: Sources
    parents: list[torch.Tensor]


LARGEST = 1 << 23
"""Values of more elements are forgotten: nobody asks a big tensor for a number."""

READS = {torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.__array__}
NUMBERS = {torch.narrow, torch.Tensor.narrow, torch.tensor_split, torch.Tensor.tensor_split}
"""Take places and sizes as tensors, and read them past all modes."""
REPEATS = {torch.repeat_interleave, torch.Tensor.repeat_interleave}
aten = torch.ops.aten


CPU = torch.device("cpu")


def really(func: Any, args: Any, kwargs: Any) -> Any:
    """Call an operator on real tensors, past all modes."""
    with _disable_current_modes():
        return func(*args, **kwargs)


def on_host(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor's values where they can be read without waiting for a device; itself where it lies there."""
    return really(torch.Tensor.to, (tensor.detach(), CPU), {}) if tensor.device != CPU else tensor


def _computed(func: Any, args: Any, kwargs: Any) -> Any:
    """The result of an operator on values, which all lie on the CPU, whatever device it was asked for."""
    return really(func, *pytree.tree_map_only(torch.device, lambda device: CPU, (args, kwargs)))


class KnownValues(TorchDispatchMode):
    """Computes real values beside fake ones, and answers from them what a fake cannot: numbers and sizes.

    Values lie on the CPU, wherever the fakes are: they are small, and no device has to be there for them.

    Stands above a ``FakeTensorMode``. Each time a value is read, the inputs it follows from are added to ``read``: the
    recorded graph holds for these values only. ``sized`` lists the tensors whose sizes came from data, and ``masks``
    those used as an index, with the positions they select. Values of ``weights`` are not known, even where the module
    reaches one past its parameters, since they may change.
    """

    def __init__(self, fake_mode: FakeTensorMode, weights: Iterable[torch.Tensor] = ()) -> None:
        super().__init__()
        self._weights = {weight.untyped_storage()._cdata for weight in weights}
        self.fake_mode = fake_mode
        self.values = WeakIdKeyDictionary()
        self.sources: dict[int, Sources] = {}
        self.kept: list[torch.UntypedStorage] = []
        self.read: set[int] = set()
        self.sized: list[Sized] = []
        self.masks: list[tuple[torch.Tensor, tuple[torch.Tensor, ...]]] = []

    def learn(self, fake: torch.Tensor, value: torch.Tensor, sources: Sources) -> None:
        """Remember the value of a fake."""
        self.values[fake] = value
        storage = value.untyped_storage()
        if storage._cdata not in self.sources:
            self.kept.append(storage)
        self.sources[storage._cdata] = self.sources.get(storage._cdata, frozenset()) | sources

    def value(self, tensor: torch.Tensor) -> torch.Tensor | None:
        """The value of a tensor, or None where it is not known."""
        if isinstance(tensor, FakeTensor):
            return self.values.get(tensor)
        return None if tensor.untyped_storage()._cdata in self._weights else on_host(tensor)

    def origin(self, value: torch.Tensor) -> Sources:
        """The inputs that a known value follows from."""
        return self.sources.get(value.untyped_storage()._cdata, frozenset())

    def reveal(self, tensor: torch.Tensor) -> torch.Tensor:
        """The value of a tensor that the module asks for.

        Raises:
            CaptureError: where it depends on weights or on an input without values.
        """
        value = self._known(tensor)
        self.read |= self.origin(value)
        return value

    def _known(self, tensor: torch.Tensor) -> torch.Tensor:
        value = self.value(tensor)
        if value is None:
            raise UnknownValue(f"the module reads values of a {tensor.dtype}{tuple(tensor.shape)} tensor it computed")
        return value

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        if func in (aten._local_scalar_dense.default, aten.equal.default, aten.is_nonzero.default):
            return really(func, [self.reveal(tensor) for tensor in tensors], {})
        values = [self.value(tensor) for tensor in tensors]
        complete = all(value is not None for value in values) and torch.Tag.nondeterministic_seeded not in func.tags
        if torch.Tag.dynamic_output_shape in func.tags:
            args, kwargs, shaped = self._sized(func, args, kwargs, complete)
            if shaped is not None:
                return shaped
        out = func(*args, **kwargs)
        if complete:
            self._follow(func, args, kwargs, out, tensors)
        else:
            self._forget_written(func, args, kwargs)
        return out

    def _fake(self, value: torch.Tensor, device: torch.device) -> FakeTensor:
        return FakeTensor(self.fake_mode, really(torch.Tensor.to, (value, "meta"), {}), device)

    def _real(self, tree: Any) -> Any:
        return pytree.tree_map_only(torch.Tensor, self.value, tree)

    def _sized(self, func: Any, args: Any, kwargs: Any, complete: bool) -> tuple[Any, Any, Any]:
        """Answer an operator whose result's size depends on data, or give it arguments for which it does not."""
        if func is aten.index.Tensor:
            return (args[0], [part for index in args[1] for part in self._positions(index)]), kwargs, None
        if not complete:
            raise UnknownValue(f"the size of a result of {func} depends on values that the module computed")
        real = _computed(func, self._real(args), self._real(kwargs))
        device = next(leaf.device for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor))
        out = pytree.tree_map_only(torch.Tensor, lambda each: self._fake(each, device), real)
        origin: Sources = frozenset()
        for tensor in pytree.tree_leaves((args, kwargs)):
            if isinstance(tensor, torch.Tensor):
                origin |= self.origin(self._known(tensor))
        for fake, value in zip(pytree.tree_leaves(out), pytree.tree_leaves(real), strict=True):
            self.learn(fake, value, origin)
            self.sized.append(Sized(fake, really(torch.clone, (value,), {}), origin, []))
        return args, kwargs, out

    def _positions(self, index: Any) -> Iterator[Any]:
        if not isinstance(index, torch.Tensor) or index.dtype not in (torch.bool, torch.uint8):
            yield index
            return
        mask = self.reveal(index)
        places = really(torch.Tensor.nonzero, (mask,), {"as_tuple": True})
        self.masks.append((index, places))
        for place in places:
            fake = self._fake(place, index.device)
            self.learn(fake, place, self.origin(mask))
            yield fake

    def _follow(self, func: Any, args: Any, kwargs: Any, out: Any, tensors: list[torch.Tensor]) -> None:
        outs = [leaf for leaf in pytree.tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        if any(fake.numel() > LARGEST or fake.is_meta for fake in outs):
            self._forget_written(func, args, kwargs)
            return
        values = [self.value(tensor) for tensor in tensors]
        origin = frozenset().union(*(self.origin(value) for value in values if value is not None))
        real = _computed(func, self._real(args), self._real(kwargs))
        parents = [one.fake for one in self.sized if any(one.fake is tensor for tensor in tensors)]
        for fake, value in zip(outs, [r for r in pytree.tree_leaves(real) if isinstance(r, torch.Tensor)], strict=True):
            if isinstance(fake, FakeTensor):
                self.learn(fake, value, origin)
                if parents:
                    self.sized.append(Sized(fake, really(torch.clone, (value,), {}), origin, parents))

    def _forget_written(self, func: Any, args: Any, kwargs: Any) -> None:
        for position, argument in enumerate(func._schema.arguments):
            if argument.alias_info is None or not argument.alias_info.is_write:
                continue
            written = kwargs.get(argument.name, args[position] if position < len(args) else None)
            for tensor in pytree.tree_leaves(written):
                value = self.values.get(tensor) if isinstance(tensor, FakeTensor) else None
                if value is not None:
                    place = value.untyped_storage()._cdata
                    for fake in [f for f, v in self.values.items() if v.untyped_storage()._cdata == place]:
                        del self.values[fake]


class ReadValues(TorchFunctionMode):
    """Answers the reads of whole tensors that go past the dispatcher, and states repeats as what they are, an index."""

    def __init__(self, known: KnownValues) -> None:
        super().__init__()
        self.known = known

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in READS:
            return really(func, (self.known.reveal(args[0]), *args[1:]), kwargs or {})
        if func in NUMBERS and args:
            rest = (args[1:], kwargs or {})
            rest = pytree.tree_map_only(torch.Tensor, lambda given: self.known.reveal(given).tolist(), rest)
            return func(args[0], *rest[0], **rest[1])
        if func in REPEATS:
            return _repeat(func, *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _repeat(func: Any, input: Any, repeats: Any = None, dim: int | None = None, **rest: Any) -> Any:
    if not isinstance(repeats, torch.Tensor):
        return func(input, repeats, dim=dim, **rest) if repeats is not None else func(input, **rest)
    whole = input.flatten() if dim is None else input
    dim = dim or 0
    return whole.index_select(dim, torch.repeat_interleave(repeats.expand(whole.shape[dim])))
