"""Computations that draw random numbers: every rank draws the whole of what one process draws, and keeps its part."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from xdit_compile.capture.known_values import really
from xdit_compile.distributed.devices import default_generators
from xdit_compile.errors import CaptureError
from xdit_compile.kernels.draws import DEFAULT, SOURCES, Draws, drawing
from xdit_compile.runtime.runner import Runner

NAMES = {function: name for name, function in SOURCES.items()}
LIKE = {torch.randn_like: "randn", torch.rand_like: "rand"}
OTHERS = {
    *NAMES, *LIKE, torch.randint, torch.randint_like, torch.randperm, torch.normal, torch.bernoulli, torch.multinomial,
    torch.poisson, torch.Tensor.bernoulli, torch.Tensor.bernoulli_, torch.Tensor.multinomial, torch.Tensor.normal_,
    torch.Tensor.uniform_, torch.Tensor.random_, torch.Tensor.exponential_, torch.Tensor.log_normal_,
    torch.Tensor.cauchy_, torch.Tensor.geometric_,
}  # fmt: skip
"""Functions that draw in ways that no op of the graph stands for, and the others where they are called unlike them."""
UNDERSTOOD = {"size", "generator", "dtype", "device", "layout", "memory_format", "requires_grad", "pin_memory"}


class Drawn(TorchFunctionMode):
    """Turns what is drawn meanwhile into ops of the graph, counted from the first.

    Args:
        generators: what stands for those that the call was given, in order.
    """

    def __init__(self, generators: Sequence[torch.Generator]):
        super().__init__()
        self._generators = generators
        self._count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        like = func in LIKE and args[0].is_contiguous()
        if not (func in NAMES or like) or not kwargs.keys() <= UNDERSTOOD:
            if func in OTHERS or kwargs.get("generator") is not None:
                raise CaptureError(f"it draws random numbers by {func.__name__}, which ranks cannot share")
            return func(*args, **kwargs)
        source = LIKE[func] if like else NAMES[func]
        asked = really(func, _on_meta(args), {**_on_meta(kwargs), "generator": None, "device": "meta"})
        device = kwargs.get("device") or (args[0].device if like else torch.get_default_device())
        position, self._count = self._count, self._count + 1
        which = self._which(kwargs.get("generator"))
        given = {"dtype": asked.dtype, "device": torch.device(device)}
        return torch.ops.xdit_compile.draw(source, asked.shape, position, which, **given)

    def _which(self, generator: torch.Generator | None) -> int:
        return next((at for at, each in enumerate(self._generators) if each is generator), DEFAULT)


def _on_meta(tree: Any) -> Any:
    return pytree.tree_map_only(torch.Tensor, lambda x: torch.empty(x.shape, dtype=x.dtype, device="meta"), tree)


class DrawingRunner(Runner):
    """A runner whose computation may draw random numbers, from generators among its arguments or the default ones."""

    def __init__(self, *args: Any, computation: Callable[..., Any], **options: Any):
        super().__init__(*args, computation=self._drawn, **options)
        self._drawing = computation
        self._standing: dict[tuple[int, torch.device], torch.Generator] = {}

    def _run(self, args: tuple, kwargs: dict) -> Any:
        leaves, spec = pytree.tree_flatten((args, kwargs))
        generators = list({id(leaf): leaf for leaf in leaves if isinstance(leaf, torch.Generator)}.values())
        names = {id(leaf): self._stand_in(position, leaf.device) for position, leaf in enumerate(generators)}
        args, kwargs = pytree.tree_unflatten([names.get(id(leaf), leaf) for leaf in leaves], spec)
        with drawing(Draws(generators, self._common_state)):
            return super()._run(args, kwargs)

    def _stand_in(self, position: int, device: torch.device) -> torch.Generator:
        """What stands in a call for the generators that it is given: the same for all, as only their states differ."""
        return self._standing.setdefault((position, device), torch.Generator(device))

    def _drawn(self, *args: Any, **kwargs: Any) -> Any:
        generators = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Generator)]
        with Drawn(list(dict.fromkeys(generators))):
            return self._drawing(*args, **kwargs)

    def _common_state(self, state: torch.Tensor) -> torch.Tensor:
        """The first rank's state; in a request all ranks have it."""
        agreement = self.session.agreement
        if agreement.alone or self.session.in_request:
            return state
        said = bytearray(agreement.share(state.numpy().tobytes()))
        return torch.frombuffer(said, dtype=torch.uint8)


@contextmanager
def unmoved(inputs: Any) -> Iterator[None]:
    """Give the generators among some inputs, and the default ones, back as they were."""
    generators = [leaf for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, torch.Generator)]
    generators += default_generators()
    states = [generator.get_state() for generator in generators]
    try:
        yield
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)
