"""Tells tensors of equal values from others, however often a pipeline makes them anew."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from xdit_compile.ir.digest import digest_tensors
from xdit_compile.ir.versions import version_of

MOST = 8
"""Values of one form that later tensors are compared with; of more, the one not met for the longest time goes."""


class Recognized:
    """Names for values of tensors, the same for the same values.

    A tensor that was met and not written to since is known by itself. Any other is compared where it lies with the
    values that were met of its form. The host reads values that were never met, and no others.
    """

    def __init__(self) -> None:
        self._names: Any = WeakTensorKeyDictionary()
        self._met: dict[Any, OrderedDict[str, tuple[torch.Tensor, int | None]]] = {}

    def name(self, tensor: torch.Tensor) -> str:
        """A digest of the values."""
        version = version_of(tensor)
        named_at, known = self._names.get(tensor, (None, ""))
        if version is not None and named_at == version:
            return known
        digest = digest_tensors([tensor]) if tensor.is_meta else self._compared(tensor, version)
        if version is not None:
            self._names[tensor] = version, digest
        return digest

    def _compared(self, tensor: torch.Tensor, version: int | None) -> str:
        met = self._met.setdefault((tensor.dtype, tensor.shape, tensor.device), OrderedDict())
        for name, (value, then) in list(met.items()):
            if version_of(value) != then:
                del met[name]
            elif _same(tensor, value):
                met.move_to_end(name)
                return name
        name = digest_tensors([tensor])
        met[name] = tensor.detach() if version is not None else tensor.clone(), version
        if len(met) > MOST:
            met.popitem(last=False)
        return name


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors are equal bit by bit."""
    return torch.equal(*(x.detach().reshape(-1).view(torch.uint8) for x in (one, other)))
