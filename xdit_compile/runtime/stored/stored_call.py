"""What one rank runs for one call, as bytes: its programs, names of their code, and what runners must know."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from xdit_compile.backends.forms import Forms, TensorForm, form_from_plain, form_to_plain
from xdit_compile.backends.sites import Job
from xdit_compile.cache.programs import packed, program_from_plain, program_to_plain, unpacked
from xdit_compile.cache.values import from_plain, to_plain
from xdit_compile.capture.state.guards import Guards
from xdit_compile.ir.program import Program

SAID = ("making", "verified", "compared", "over", "unshared", "facts")
"""Fields that plain data can say as they are."""
HOST = "cpu"


@dataclasses.dataclass(frozen=True)
class StoredCode:
    """The compiled code of one program.

    Args:
        inputs: forms of the inputs of its root.
        jobs: what was compiled, and the names that it is kept under.
    """

    inputs: Forms
    jobs: tuple[tuple[Job, str | None], ...]


@dataclasses.dataclass(frozen=True)
class StoredCall:
    """What one rank runs for one call.

    Args:
        making: what the entries of all ranks that were made at once have in common.
        verified: whether the first call was compared with the module, and ``compared`` whether a later one was.
        over: which ranks share the batch, as `Batch.over` says, and ``unshared`` why others do not.
        facts: what else the runner must know, in values that plain data can say.
        results: forms of the results of the whole call.
        sources: digests of the Python files that ran when the call was captured.
        programs: by name.
        code: of the programs that are compiled, by the same names.
    """

    making: str
    verified: bool
    compared: bool
    over: str
    unshared: tuple[Any, ...] | None
    facts: Mapping[str, Any]
    results: tuple[TensorForm, ...]
    sources: Mapping[str, str]
    programs: Mapping[str, Program] = dataclasses.field(repr=False)
    code: Mapping[str, StoredCode] = dataclasses.field(default_factory=dict, repr=False)

    def fits(self, leaves: Sequence[Any]) -> bool:
        """Whether the values that the capture baked in are those of a call's flat inputs."""
        return all(Guards(program.guards).fit(leaves) for program in self.programs.values())

    def packed(self, kind: str | None = None) -> bytes:
        """All of it as bytes.

        Args:
            kind: of the device that what lies on the host is for; None where it stays there.

        Raises:
            Unportable: something of it cannot be said.
        """
        plain: dict[str, Any] = {name: to_plain(getattr(self, name)) for name in SAID}
        plain["sources"] = dict(self.sources)
        plain["results"] = list(map(form_to_plain, self.results))
        plain["code"] = {name: _code_to_plain(code) for name, code in self.code.items()}
        plain["programs"] = {}
        tensors: dict[str, torch.Tensor] = {}
        for name, program in self.programs.items():
            plain["programs"][name], own = program_to_plain(program)
            tensors |= {f"{name}/{key}": value for key, value in own.items()}
        return packed(plain if kind is None else _moved(plain, kind), tensors)

    @classmethod
    def unpacked(cls, data: bytes, device: torch.device) -> StoredCall:
        """The call of `packed`, for a device of its kind.

        Raises:
            Unportable: other bytes, or what they speak of is not here.
        """
        plain, tensors = unpacked(data)
        programs = {}
        for name, program in plain["programs"].items():
            own = {key.removeprefix(f"{name}/"): value for key, value in tensors.items() if key.startswith(f"{name}/")}
            programs[name] = program_from_plain(program, own, device)
        return cls(
            **{name: from_plain(plain[name]) for name in SAID},
            results=tuple(form_from_plain(form, device) for form in plain["results"]),
            sources=plain["sources"],
            programs=programs,
            code={name: _code_from_plain(code, device) for name, code in plain["code"].items()},
        )


def stays_on_host(shape: Sequence[int], dtype: torch.dtype) -> bool:
    """Whether a constant of a program stays on the host where the program is for a card: a position is read there."""
    return not len(shape) and not dtype.is_floating_point


def _moved(plain: Any, kind: str) -> Any:
    """Plain data with devices of a kind in the place of the host."""
    if isinstance(plain, list):
        return [_moved(each, kind) for each in plain]
    if not isinstance(plain, dict):
        return plain
    moved = {name: (_moved_constants if name == "constants" else _moved)(each, kind) for name, each in plain.items()}
    return {**moved, "device": kind} if plain.get("device") == HOST else moved


def _moved_constants(forms: Mapping[str, Any], kind: str) -> dict[str, Any]:
    stay = {name for name, form in forms.items() if stays_on_host(form["shape"], from_plain(form["dtype"]))}
    return {name: form if name in stay else _moved(form, kind) for name, form in forms.items()}


def _code_to_plain(code: StoredCode) -> Any:
    jobs = [[job.target, list(map(form_to_plain, job.forms)), list(job.sites), name] for job, name in code.jobs]
    return {"inputs": list(map(form_to_plain, code.inputs)), "jobs": jobs}


def _code_from_plain(plain: Any, device: torch.device) -> StoredCode:
    jobs = [
        (Job(target, tuple(form_from_plain(form, device) for form in forms), tuple(sites)), name)
        for target, forms, sites, name in plain["jobs"]
    ]
    return StoredCode(tuple(form_from_plain(form, device) for form in plain["inputs"]), tuple(jobs))
