"""Makes what all ranks of a plan run for a call, in one process that computes nothing, and keeps it for them."""

from __future__ import annotations

import dataclasses
import uuid
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from xdit_compile.backends.registry import backend_of
from xdit_compile.backends.target.cards import Card
from xdit_compile.backends.target.pretend_card import DEVICE, kept_on_host
from xdit_compile.cache.store import Store
from xdit_compile.capture.state.in_place import put_back, put_in_place
from xdit_compile.distributed.mesh import Mesh
from xdit_compile.plan import Plan
from xdit_compile.runtime.proving import device_of
from xdit_compile.runtime.runner import Runner
from xdit_compile.runtime.session import Session
from xdit_compile.weights.weights import Weights

from .distrifusion import StaleRunner
from .pipefusion import PipelineRunner

Tell = Callable[[int], None]


def runner_class(plan: Plan) -> type[Runner]:
    """What stands in the place of a denoiser's forward under a plan."""
    if plan.patch_count > 1:
        return PipelineRunner
    return StaleRunner if plan.distrifusion > 1 else Runner


def build_ahead(
    module: nn.Module, name: str, args: tuple, kwargs: dict[str, Any], plan: Plan, store: Store, tell: Tell,
    card: Card | None = None,
) -> int:  # fmt: skip
    """Keep what every rank of a plan runs for one call of a denoiser.

    The module is traced, never run, so that its weights may hold anything. What is kept was not compared with the
    module: the first run with weights does that.

    Args:
        module: the denoiser, with parameters where they will be.
        name: of the component in its pipeline.
        args, kwargs: of the call; tensors that its code reads must have the values of the calls to come.
        plan: for any number of ranks.
        store: where it is kept.
        tell: called after each rank, with its number.
        card: what it is for, where that is not there; module and inputs are on the CPU then, and stand for such on it.

    Returns:
        For how many ranks it was there already.

    Raises:
        CaptureError, PartitionError: the plan cannot be done with this call.
        UsageError: the plan's backend compiles nothing for a card that is not there.
    """
    backend = backend_of(plan)
    backend = backend if card is None else backend.for_card(card)
    plan = dataclasses.replace(plan, verify=False, compile="now")
    device = device_of(pytree.tree_leaves((args, kwargs))) if card is None else DEVICE
    there, making = 0, uuid.uuid4().hex
    with nullcontext() if card is None else kept_on_host(), torch.inference_mode(False), torch.no_grad():
        for rank in range(plan.world_size):
            session = Session(plan, Mesh.named(plan, rank), backend, device, store, making)
            runner = runner_class(plan)(Weights(module), session, name, trace_only=True)
            put_in_place(module, {"forward": runner})
            try:
                there += runner.prepare_ahead(args, kwargs)
            finally:
                put_back(module)
                session.close()
            tell(rank)
    return there
