"""Runs requests of a pipeline and keeps all that comes out, in floats too where pictures are rounded."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import torch
from conformance.alone import Alone, Coder
from conformance.case import REQUESTS, Case, OneImage
from conformance.compare import Difference, Plain, compare, finite, plain
from conformance.work import Work, components, counted
from torch import nn
from torch.utils import _pytree as pytree

from xdit_compile.runtime.diffusers_pipeline import autoencoders, is_denoiser

ILL = 1e-4
"""A case that magnifies rounding to more than this, of the greatest value, is no measure."""
Subject = Case | Alone | Coder
"""A pipeline, or a module by itself."""
_POSTPROCESS = ("postprocess", "postprocess_video")


class BrokenCase(Exception):
    """The case is no measure: unsplit it fails, gives other results the second time, or none at all."""


@dataclasses.dataclass(frozen=True)
class Reference:
    """What one process makes of a case: results by request, its arithmetic, and whether it has what a plan splits.

    ``unrounded`` is the first result in floats, where none were seen on the way to the default one. ``rounding`` is how
    far all of these move with the last bit of the weights, as a part of the greatest value.
    """

    results: tuple[Plain, ...]
    unrounded: Any
    rounding: float
    work: Work
    guided: bool
    codes: bool


def observe(case: Subject, pipe: Any, request: int, images: int) -> Plain:
    """The result of a request, together with the floats that its processors rounded."""
    with _recorded(pipe) as rounded:
        result = case.call(pipe, request, images)
    return Plain("observed", {"result": plain(result), "floats": Plain("list", dict(rounded))})


def reference(case: Subject, images: int, device: str = "cpu") -> Reference:
    """One process, unsplit.

    Raises:
        OneImage: it cannot make as many.
        BrokenCase: it is no measure.
    """
    try:
        pipe = case.build(device)
        seen = _Seen()
        with seen.watching(pipe):
            results = tuple(observe(case, pipe, request, images) for request in REQUESTS)
        with counted(pipe) as work:
            again = observe(case, pipe, REQUESTS[0], images)
        unseen = case.rounds(pipe) and not results[0].parts["floats"].parts
        unrounded = plain(case.unrounded(pipe, REQUESTS[0], images)) if unseen else None
    except OneImage:
        raise
    except Exception as error:
        if images > 1:
            raise OneImage(f"{type(error).__name__}: {error}") from error
        raise BrokenCase(f"{type(error).__name__}: {error}") from error
    _check(results, again)
    rounding = _rounding(case, results, unrounded, images, device)
    return Reference(results, unrounded, rounding, work, seen.guided, bool(list(autoencoders(pipe))))


def _rounding(case: Subject, results: tuple[Plain, ...], unrounded: Any, images: int, device: str) -> float:
    """How far results move when the last bit of every weight does.

    Raises:
        BrokenCase: so far that nothing could be told from it.
    """
    pipe, difference = case.build(device), Difference()
    generator = torch.Generator().manual_seed(1)
    for module in components(pipe).values():
        for weight in module.parameters() if isinstance(module, nn.Module) else ():
            sign = 2 * torch.randint(2, weight.shape, generator=generator) - 1
            weight.data.mul_((1 + sign * torch.finfo(weight.dtype).eps).to(weight.device))
    for request in REQUESTS:
        compare(observe(case, pipe, request, images), results[request], difference)
    if unrounded is not None:
        compare(plain(case.unrounded(pipe, REQUESTS[0], images)), unrounded, difference)
    if difference.greatest > ILL:
        raise BrokenCase(f"the last bit of the weights moves its result by {difference.greatest:.1e}")
    return difference.greatest


def _check(results: tuple[Plain, ...], again: Plain) -> None:
    if not all(map(finite, results)):
        raise BrokenCase("its values are not finite")
    difference = Difference()
    compare(again, results[0], difference)
    if not difference.exact or difference.greatest or difference.levels:
        raise BrokenCase(f"the same request gives another result: {difference}")
    compare(results[1], results[0], difference)
    if difference.exact:
        raise BrokenCase("both requests give the same")


class _Seen:
    """Counts steps, calls of denoisers and samples in them."""

    def __init__(self) -> None:
        self.steps = self.calls = self.samples = 0

    @property
    def guided(self) -> bool:
        """Whether a step computes several branches, in one call or in several."""
        return self.samples > 1 or self.calls > max(self.steps, 1)

    @contextlib.contextmanager
    def watching(self, pipe: Any) -> Iterator[None]:
        handles = []
        with contextlib.ExitStack() as stack:
            if isinstance(pipe, nn.Module):
                handles.append(pipe.register_forward_pre_hook(self._alone, with_kwargs=True))
            for name, module in components(pipe).items():
                if isinstance(module, nn.Module) and is_denoiser(name) and not name.startswith("controlnet"):
                    handles.append(module.register_forward_pre_hook(self._called, with_kwargs=True))
                elif callable(getattr(module, "step", None)):
                    kind = type(module)
                    own = vars(kind).get("step")
                    stack.callback(setattr if own else delattr, kind, "step", *([own] if own else []))
                    kind.step = self._counting(kind.step)
            yield
        for handle in handles:
            handle.remove()

    def _alone(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """A module by itself: every call is a step."""
        self.steps += 1
        self._called(module, args, kwargs)

    def _called(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self.calls += 1
        first = next(iter([*args, *kwargs.values()]))
        self.samples = max(self.samples, len(first) if isinstance(first, torch.Tensor | list) else 1)

    def _counting(self, own: Any) -> Any:
        """A scheduler's step that is counted; pipelines ask for its signature."""

        @functools.wraps(own)
        def step(*args: Any, **kwargs: Any) -> Any:
            self.steps += 1
            return own(*args, **kwargs)

        return step


@contextlib.contextmanager
def _recorded(pipe: Any) -> Iterator[dict[str, Any]]:
    """The float tensors first given to the pipeline's processors; not what these give each other, rounded already."""
    found: dict[str, Any] = {}
    inside = False

    def keep(own: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal inside
        given = (
            [] if inside or found else [leaf for leaf in pytree.tree_leaves((args, kwargs)) if torch.is_tensor(leaf)]
        )
        found.update((str(len(found) + at), plain(leaf)) for at, leaf in enumerate(given))
        before, inside = inside, True
        try:
            return own(*args, **kwargs)
        finally:
            inside = before

    with contextlib.ExitStack() as stack:
        for name in ("image_processor", "video_processor"):
            processor = getattr(pipe, name, None)
            for method in _POSTPROCESS:
                if callable(getattr(processor, method, None)):
                    own = getattr(processor, method)
                    stack.enter_context(_replaced(processor, method, functools.partial(keep, own)))
        yield found


@contextlib.contextmanager
def _replaced(target: Any, name: str, value: Any) -> Iterator[None]:
    object.__setattr__(target, name, value)
    try:
        yield
    finally:
        object.__delattr__(target, name)
