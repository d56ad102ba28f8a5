"""Answers for programs: one JSON document on stdout, and everything else on stderr."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence, Set
from typing import Any

STDOUT, STDERR = 1, 2


@contextlib.contextmanager
def answering(wanted: bool) -> Iterator[dict[str, Any]]:
    """What is put into this dict is written to stdout once the block ends well, if that is wanted.

    Meanwhile whatever is printed, by libraries and by programs that they start as well, goes to stderr.
    """
    answer: dict[str, Any] = {}
    if not wanted:
        yield answer
        return
    with _stdout_to_stderr():
        yield answer
    if answer:
        print(json.dumps(plain(answer), indent=1, allow_nan=False), flush=True)


@contextlib.contextmanager
def _stdout_to_stderr() -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        sys.stdout.flush()
        with contextlib.suppress(OSError):
            kept = os.dup(STDOUT)
            stack.callback(os.close, kept)
            stack.callback(os.dup2, kept, STDOUT)
            os.dup2(STDERR, STDOUT)
        stack.enter_context(contextlib.redirect_stdout(sys.stderr))
        yield


def plain(value: Any) -> Any:
    """A value as what JSON has: dataclasses by their fields, what is no number as null, the rest in words."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, Sequence | Set) and not isinstance(value, str | bytes):
        return [plain(each) for each in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, str | int | bool) else str(value)
