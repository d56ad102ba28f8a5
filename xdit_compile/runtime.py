"""Stands in for a module's forward: finds or makes the program for a call, and runs it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from .agreement import Agreement
from .backends.base import Backend
from .build import Analysis, analyse, place
from .digest import digest, digest_program, digest_shapes, digest_tensors
from .dump import dump
from .interpret import assemble, bind
from .mesh import Mesh
from .passes.program_partition import Partitioned
from .plan import Plan
from .program import Program
from .signature import Signature, signature
from .verification import verify


@dataclasses.dataclass(frozen=True)
class Prepared:
    """What one signature runs on this rank."""

    analysis: Analysis
    partitioned: Partitioned
    run: Callable[..., tuple[Any, ...]]

    @property
    def program(self) -> Program:
        return self.partitioned.program

    def fits(self, leaves: list[Any]) -> bool:
        """Whether the values that the capture baked in are those of this call."""
        return all(torch.equal(leaves[guard.position], guard.value) for guard in self.program.guards)


class Runner:
    """Called in place of ``module.forward``.

    A call whose signature is known runs at once; another is captured, partitioned, compiled and, with ``plan.verify``,
    compared with the module itself. Values of guards that changed make a new program too.
    """

    def __init__(self, module: nn.Module, plan: Plan, mesh: Mesh, backend: Backend, agreement: Agreement):
        self.module = module
        self.plan = plan
        self.mesh = mesh
        self.backend = backend
        self.forward = module.forward
        self.prepared: dict[Signature, list[Prepared]] = {}
        self._agreement = agreement

    @torch.no_grad()
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        leaves = pytree.tree_leaves((args, kwargs))
        known = self.prepared.setdefault(signature(self.module, args, kwargs), [])
        prepared = next((one for one in known if one.fits(leaves)), None)
        self._agreement.announce_call("new" if prepared is None else f"known {known.index(prepared)} {len(leaves)}")
        if prepared is None:
            prepared = self._prepare(args, kwargs, leaves)
            known.append(prepared)
        tensors = bind(prepared.program, self.module, leaves)
        return assemble(prepared.program, prepared.run(*tensors))

    def _prepare(self, args: tuple, kwargs: dict, leaves: list[Any]) -> Prepared:
        self._agreement.agree(
            "inputs",
            {"plan": digest([self.plan]), "input shape": digest_shapes(leaves), "input": digest_tensors(leaves)},
        )
        try:
            analysis = analyse(self.module, self.plan, args, kwargs, forward=self.forward, check=self.plan.verify)
            partitioned = place(analysis, self.plan, self.mesh)
            partitioned.program.root.to(_device(leaves))
            dump(analysis, partitioned, self.mesh.rank)
            graph = digest([digest_program(analysis.program), analysis.tokens])
            prepared = Prepared(analysis, partitioned, self.backend.compile(partitioned.program.root))
        except Exception as error:
            self._agreement.fail("graph", error)
            raise
        self._agreement.agree("graph", {"graph": graph})
        if self.plan.verify and self.mesh.world_size > 1:
            self._verify(prepared, args, kwargs, leaves)
        return prepared

    def _verify(self, prepared: Prepared, args: tuple, kwargs: dict, leaves: list[Any]) -> None:
        try:
            found = prepared.run(*bind(prepared.program, self.module, leaves))
            verify(assemble(prepared.program, found), self.forward(*args, **kwargs))
        except Exception as error:
            self._agreement.fail("verdict", error)
            raise
        self._agreement.agree("verdict", {})


def _device(leaves: list[Any]) -> torch.device:
    """Where the largest input lies; index lists that the passes made must lie there too."""
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    return max(tensors, key=torch.Tensor.numel).device if tensors else torch.device("cpu")
