"""Counts the arithmetic that one process really does, apart for denoising and for the autoencoder."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from xdit_compile.runtime.diffusers_pipeline import autoencoders, is_denoiser

_PLAIN = (torch.Tensor, nn.Parameter)


class Work(TorchDispatchMode):
    """Adds up multiplications and additions by section, of values that are there: not of fake or meta tensors."""

    supports_higher_order_operators = True

    @classmethod
    def is_infra_mode(cls) -> bool:
        """What compiles itself, as flex attention does, refuses to under other modes."""
        return True

    def __init__(self) -> None:
        super().__init__()
        self.done = {"denoising": 0.0, "coding": 0.0, "other": 0.0}
        self._section = "denoising"

    @contextlib.contextmanager
    def within(self, section: str) -> Iterator[None]:
        """Count what runs here elsewhere."""
        before, self._section = self._section, section
        try:
            yield
        finally:
            self._section = before

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(kind.__module__.startswith("xdit_compile") for kind in types):
            return NotImplemented
        kwargs = kwargs or {}
        if any(kind not in _PLAIN for kind in types):
            return func(*args, **kwargs)
        packet = getattr(func, "_overloadpacket", func)
        if packet not in flop_registry and func.namespace == "aten":
            with self:
                found = func.decompose(*args, **kwargs)
            if found is not NotImplemented:
                return found
        out = func(*args, **kwargs)
        if not any(tensor.is_meta for tensor in pytree.tree_leaves(args) if isinstance(tensor, torch.Tensor)):
            self.done[self._section] += _count(packet, args, kwargs, out)
        return out


def _count(packet: Any, args: Any, kwargs: Any, out: Any) -> float:
    name = packet.__name__
    if name in ("attention", "attention_lse", "_scaled_dot_product_flash_attention_for_cpu"):
        return _attention(args[0], args[1], args[2], args[1].shape[-2])
    if name == "ring_attention":
        return _attention(args[0], args[1], args[2], sum(args[4]))
    count = flop_registry.get(packet)
    return float(count(*args, **kwargs, out_val=out)) if count else 0.0


def _attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, keys: int) -> float:
    return 2.0 * math.prod(q.shape[:-1]) * keys * (q.shape[-1] + v.shape[-1])


def components(pipe: Any) -> dict[str, Any]:
    """The parts of a pipeline by name; a module by itself is its only one."""
    return {"module": pipe} if isinstance(pipe, nn.Module) else pipe.components


@contextlib.contextmanager
def counted(pipe: Any) -> Iterator[Work]:
    """Count what a pipeline's calls do; encoders of text and pictures are neither denoising nor coding."""
    work = Work()
    coders = dict(autoencoders(pipe))
    alone = isinstance(pipe, nn.Module)
    aside = {} if alone else {name: each for name, each in components(pipe).items() if isinstance(each, nn.Module)}
    aside = {name: module for name, module in aside.items() if not is_denoiser(name)}
    for name, module in aside.items():
        object.__setattr__(pipe, name, _Aside(module, work, "coding" if name in coders else "other"))
    try:
        with work, work.within("coding" if alone and coders else "denoising"):
            yield work
    finally:
        for name, module in aside.items():
            object.__setattr__(pipe, name, module)


class _Aside:
    """Stands for a component in a pipeline; what its methods do is counted in a section of its own.

    The component itself is left as it is: a wrapper on it would be a change of the module to those who look.
    """

    def __init__(self, module: nn.Module, work: Work, section: str):
        self._module, self._work, self._section = module, work, section

    @property
    def __class__(self) -> Any:
        """Pipelines ask for the class of their autoencoder."""
        return type(self._module)

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._module, name)
        return functools.partial(self._call, found) if name in ("decode", "encode") else found

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._call(self._module, *args, **kwargs)

    def _call(self, own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """What is given is read first, so that values which come later are counted where they belong."""
        for tensor in pytree.tree_leaves((args, kwargs)):
            if isinstance(tensor, torch.Tensor) and tensor.numel():
                tensor.flatten()[0].item()
        with self._work.within(self._section):
            return own(*args, **kwargs)


def share(found: Work, whole: Work, section: str) -> float | None:
    """The part of one process's work that this rank did; None where there is none."""
    return found.done[section] / whole.done[section] if whole.done[section] else None
