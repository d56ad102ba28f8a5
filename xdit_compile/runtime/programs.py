"""The programs that a module has, each for the calls that it was made for; those least used are dropped first."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, Generic, Protocol, TypeVar

from xdit_compile.capture.state.signature import Fingerprint, Signature


class Fitting(Protocol):
    """A program that may have baked in values of its inputs."""

    def fits(self, leaves: list[Any]) -> bool:
        """Whether these are the values."""
        ...


P = TypeVar("P", bound=Fitting)


class Programs(Generic[P]):
    """Programs by signature, in the order of their last use. One program may have several signatures: that of the call
    it was made for, and that of the same call of the module as it was then left.

    Args:
        most: how many are kept.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._by_key: dict[Signature, list[P]] = {}
        self._by_use: dict[P, None] = {}

    def __iter__(self) -> Iterator[P]:
        return iter(self._by_use)

    def __len__(self) -> int:
        return len(self._by_use)

    @property
    def latest(self) -> P | None:
        """What was used last."""
        return next(reversed(self._by_use), None)

    def find(self, key: Signature, leaves: list[Any]) -> tuple[int, P] | None:
        """The program for a call and its number among those of its signature, if there is one."""
        for number, program in enumerate(self._by_key.get(key, ())):
            if program.fits(leaves):
                self._by_use[program] = self._by_use.pop(program)
                return number, program
        return None

    def described(self, modules: Fingerprint) -> Fingerprint:
        """The fingerprint itself, or an equal one that is known, so that the two need not be compared any more."""
        return next((key.modules for key in self._by_key if key.modules == modules), modules)

    def add(self, program: P, *keys: Signature) -> None:
        """Keep a program for some signatures, and drop those that are too many."""
        self._by_use[program] = None
        for key in keys:
            known = self._by_key.setdefault(key, [])
            if program not in known:
                known.append(program)
        while len(self._by_use) > self._most:
            self._drop(next(iter(self._by_use)))

    def _drop(self, program: P) -> None:
        del self._by_use[program]
        for key, known in list(self._by_key.items()):
            if program in known:
                known.remove(program)
            if not known:
                del self._by_key[key]

    def follow(self, before: Fingerprint, after: Fingerprint) -> None:
        """The module was changed by us: what was known for it as it was holds for it as it is."""
        for key in [key for key in self._by_key if key.modules == before]:
            self._by_key[dataclasses.replace(key, modules=after)] = self._by_key.pop(key)

    def clear(self) -> None:
        """Forget all."""
        self._by_key.clear()
        self._by_use.clear()
