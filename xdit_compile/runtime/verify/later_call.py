"""Says when another call than the first is compared with the module, to find what it reads from outside."""

from __future__ import annotations

import weakref
from typing import Any


class LaterCall:
    """One call of every program: after a quarter of the first generation, or the second where its steps are not known.

    Pipelines that begin with a picture leave out up to half of the steps, as a rule.
    """

    def __init__(self) -> None:
        self._calls: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
        self._compared: weakref.WeakSet[Any] = weakref.WeakSet()

    def due(self, program: Any, steps: int) -> bool:
        """Count a call, in a generation of so many steps (0: unknown); whether this is the one to compare."""
        if program in self._compared:
            return False
        self._calls[program] = calls = self._calls.get(program, 0) + 1
        if calls < max(2, steps // 4 + 1):
            return False
        self._compared.add(program)
        return True
