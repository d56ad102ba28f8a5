"""Every error a user can meet, each with the exit code the command line gives it.

A message names a setting of a plan as Python does, ``backend='eager'``: the name and the value's repr. The command line
puts its flag there.
"""

from __future__ import annotations

from collections.abc import Mapping


class XditCompileError(Exception):
    """Base of all errors raised on purpose; the message says what to change."""

    exit_code = 1


class UsageError(XditCompileError):
    """A request that can be seen to be wrong before anything heavy happens."""

    exit_code = 2


class PlanError(UsageError):
    """A plan that does not fit itself, the world or the model; lists every problem at once."""


class CaptureError(XditCompileError):
    """No capture of the module agreed with running it eagerly."""


class NoRoomError(CaptureError):
    """The module itself has not the memory to run, with which a capture would be compared."""


class UnsupportedError(CaptureError, UsageError):
    """A module whose weights a library keeps in a way that cannot be split yet."""

    exit_code = 2


class StateError(CaptureError):
    """A module that keeps something from call to call, which a graph cannot follow.

    Args:
        changed: modules by path, with the attributes that change, and a word on where.
    """

    def __init__(self, changed: Mapping[tuple[str, str], str], when: str):
        self.changed = dict(changed)
        first, *others = self.changed.values()
        more = f" and {len(others)} more" if others else ""
        super().__init__(
            f"{first}{more} changes {when}, and a split graph cannot follow that: switch off what keeps it "
            f"({_switch(next(iter(self.changed))[1])}), or run the module whole with Plan(fallback='unsplit')"
        )


def _switch(attribute: str) -> str:
    if attribute == "_diffusers_hook":
        return "disable_cache() ends diffusers' caches"
    if attribute == "processor":
        return "set_default_attn_processor() ends attention processors of your own"
    return "a step cache, a counter, a hook of your own"


class PartitionError(XditCompileError):
    """A graph that the partitioner cannot split and may not gather."""


class BrokenProgramError(XditCompileError):
    """A pass left a program that is not well formed: a fault of this package."""


class VerificationError(XditCompileError):
    """The partitioned program gave other numbers than the module itself."""


class AgreementError(XditCompileError):
    """Ranks that disagree on plan, inputs or graph, or one that did not answer in time."""


class PeerError(AgreementError):
    """A transfer that broke off, since another rank stopped or did not answer in time."""


class WrongTypeError(UsageError, TypeError):
    """An argument of a type that says nothing to the function; the message says what to give."""


class ProviderUnavailable(UsageError):
    """A backend or an attention provider that cannot be used here, with the reason."""


def reason_of(error: BaseException) -> str:
    """Why a file could not be read or written, for a line that names the file itself."""
    if isinstance(error, UnicodeError):
        return "it is no text in UTF-8"
    return (error.strerror if isinstance(error, OSError) else None) or one_line(error)


def one_line(error: BaseException, limit: int = 600) -> str:
    """What an error says, on one line; its type where it says nothing. Of a long one whole words are left, and ...

    Args:
        limit: characters at most.
    """
    try:
        text = " ".join(str(error).split())
    except Exception:
        text = ""
    if len(text) > limit:
        whole = text[: limit - 3].rpartition(" ")[0] or text[: limit - 4]
        text = f"{whole} ..."
    return text or type(error).__name__
