"""Calls that run whole on every rank, as no graph can stand for the module."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Hashable

from xdit_compile.capture.state.signature import Fingerprint, Signature, changes, kept, without
from xdit_compile.errors import CaptureError, StateError


class RunsWhole(Exception):
    """Raised to where a call began: it is to be run by the module itself."""


class Unsplit:
    """What is known of a module that does not run split.

    Args:
        name: what the module is called in messages.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._known: dict[Hashable, tuple[Fingerprint, Collection[tuple[str, str]]]] = {}

    def __bool__(self) -> bool:
        return bool(self._known)

    def covers(self, key: Signature) -> bool:
        """Whether a call is known to run whole: the module is as it was, but for what it keeps from call to call."""
        if not self._known or key.call not in self._known:
            return False
        modules, changing = self._known[key.call]
        return without(key.modules, changing) == modules

    def add(self, key: Signature, error: CaptureError) -> None:
        """Have calls of this kind run whole from now on, and say why once."""
        changing = tuple(error.changed) if isinstance(error, StateError) else ()
        if not self._known:
            warnings.warn(f"{self._name} runs whole on every rank, not split: {error}", stacklevel=2)
        self._known[key.call] = kept(without(key.modules, changing)), changing

    def clear(self) -> None:
        """Forget all."""
        self._known.clear()


class Changing:
    """Finds what is changed between the calls of one request, so that every call would need a program of its own."""

    def __init__(self) -> None:
        self._seen: dict[Hashable, list[Fingerprint]] = {}

    def begin(self) -> None:
        """Another request begins."""
        self._seen.clear()

    def note(self, key: Signature) -> None:
        """A call for which there is no program; its description can be compared whatever becomes of the module.

        Raises:
            StateError: it is the third in this request that differs in the same attribute of the module.
        """
        seen = self._seen.setdefault(key.call, [])
        seen.append(key.modules)
        if len(seen) > 2:
            first, second = changes(seen[-3], seen[-2]), changes(seen[-2], seen[-1])
            if both := {entry: where for entry, where in second.items() if entry in first}:
                raise StateError(both, "from call to call of one request")
