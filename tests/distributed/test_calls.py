"""What ranks say of their calls while values of inputs are still on their way from a device."""

from __future__ import annotations

from typing import Any

import pytest

from xdit_compile.distributed.calls import REMEMBERED, Calls
from xdit_compile.distributed.sketch import COMING, Coming
from xdit_compile.errors import AgreementError

FORM = f"float32 [1];{COMING}"


class Late(Coming):
    """Arrives when it is told to, or waited for."""

    def __init__(self, text: str):
        self._text, self.here, self.awaited = text, False, False

    def text(self, wait: bool = False) -> str:
        self.awaited = self.awaited or wait
        self.here = self.here or wait
        return self._text if self.here else FORM


def theirs(*calls: list[str]) -> dict[str, Any]:
    return {str(at): list(call) for at, call in enumerate(calls, 1)}


def test_values_are_compared_once_they_are_here() -> None:
    calls, late = Calls(0), Late("float32 [1];1.0")
    calls.add("transformer", [late])
    other = theirs(["transformer", "float32 [1];2.0"])
    calls.compare(1, other)
    calls.compared(other)
    assert calls.said() == {1: ["transformer", FORM]} and not late.awaited
    with pytest.raises(AgreementError, match="another input 0"):
        calls.compare(1, theirs(["transformer", "float32 [2];1.0,1.0"]))
    assert calls.are_made(other) and not calls.are_made(theirs(["transformer", FORM]))
    late.here = True
    with pytest.raises(AgreementError, match="another input 0"):
        calls.compare(1, other)
    calls.compare(1, theirs(["transformer", FORM]))
    with pytest.raises(AgreementError, match="is vae where"):
        calls.compare(1, theirs(["vae", FORM]))


def test_what_all_have_said_is_not_compared_again() -> None:
    calls, late = Calls(0), Late("float32 [1];1.0")
    calls.add("transformer", [late])
    late.here = True
    assert calls.said() == {1: ["transformer", "float32 [1];1.0"]}
    calls.compared(theirs(["transformer", "float32 [1];1.0"]))
    calls.compare(1, theirs(["transformer", "float32 [1];2.0"]))


def test_nobody_runs_further_ahead_than_values_are_remembered() -> None:
    calls, late = Calls(0), [Late(f"float32 [1];{at}.0") for at in range(REMEMBERED)]
    for each in late:
        calls.add("transformer", [each])
    assert [each.awaited for each in late] == [at < REMEMBERED // 2 for at in range(REMEMBERED)]
    assert calls.settle(calls.made) and all(each.awaited for each in late)
    assert not calls.settle(calls.made) and FORM not in sum(calls.said().values(), [])
