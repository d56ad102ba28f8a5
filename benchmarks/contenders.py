"""Ways to run one denoising step that are measured beside each other; each is made inside the process that runs it."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import distributed_c10d

from xdit_compile import Plan, generation, parallelize
from xdit_compile.api import runner_of
from xdit_compile.backends.base import Backend
from xdit_compile.kernels.collectives import all_gather
from xdit_compile.runtime.tensors.deferred_tensor import values_of
from xdit_compile.runtime.tensors.patched_tensor import whole_of

Call = Callable[..., Any]

REFERENCE = "one process, the module as it is"


@dataclasses.dataclass(frozen=True)
class Contender:
    """``make`` turns a module of its own into what is called; ``stub`` keeps the transfers from happening.

    The result must be that of ``alike``, by name; without one, and ``exact``, that of the first contender.
    """

    name: str
    processes: int
    make: Callable[[nn.Module], Call]
    same_as: str | None = None
    stub: bool = False
    exact: bool = True
    base: str | None = None
    alike: str | None = None


def suite(name: str, backend: str) -> list[Contender]:
    """Everything that one comparison measures, by its name."""
    return {"sequence": contenders, "guidance": guidance, "vae": vae, "pipefusion": pipefusion}[name](backend)


def guidance(backend: str) -> list[Contender]:
    """Classifier-free guidance: both branches stacked in one batch, and one call for each."""
    found = [Contender(REFERENCE, 1, _stacked)]
    for kind, step in (("stacked", _stacked), ("two calls", _twice)):
        alone = f"one process, {kind}, {backend}"
        for count, name in ((1, alone), (2, f"cfg 2, {kind}, {backend}")):
            plan = Plan(cfg=count, backend=backend)
            found.append(
                Contender(name, count, lambda module, step=step, plan=plan: step(parallelize(module, plan)), base=alone)
            )
    return found


STEPS = 8
"""Steps that one measured run of a pipeline takes."""


class Steps:
    """A run of steps in the middle of a generation, its warm-up over; ``timed`` notes when each patch was computed."""

    def __init__(self, module: nn.Module, timed: Timed | None = None):
        self.module, self.timed, self._warm = module, timed, False
        self._generation: Any = None

    def __call__(self, **inputs: Any) -> torch.Tensor:
        if not self._warm:
            if runner_of(self.module) is not None:
                self._generation = generation(self.module)
                self._generation.__enter__()
            self.module(**inputs)
            self._warm = True
        if self.timed is not None:
            self.timed.spans.clear()
        latents = inputs["hidden_states"]
        for _ in range(STEPS):
            latents = latents - 0.01 * self.module(**{**inputs, "hidden_states": latents})[0]
        return whole_of(latents)


class Timed(Backend):
    """A backend that notes when its programs run, as seconds from and to."""

    def __init__(self, own: Backend):
        self.own, self.name, self.spans = own, own.name, []

    def compile(self, root: Any) -> Call:
        run = self.own.compile(root)

        def timed(*tensors: Any) -> Any:
            begin = time.time()
            found = run(*tensors)
            self.spans.append((begin, time.time()))
            return found

        return timed


def pipefusion(backend: str) -> list[Contender]:
    """Steps of a pipeline of two stages, the same staleness on one process beside it."""

    def make(plan: Plan) -> Callable[[nn.Module], Call]:
        def timed(module: nn.Module) -> Call:
            runner = runner_of(parallelize(module, plan))
            runner.backend = Timed(runner.backend)
            return Steps(module, runner.backend)

        return timed

    alone = f"one process, {backend}"
    found = [
        Contender(REFERENCE, 1, Steps),
        Contender(alone, 1, lambda module: Steps(parallelize(module, Plan(backend=backend)))),
    ]
    for patches in (2, 4):
        same = f"one process, {patches} patches, {backend}"
        plan = Plan(patches=patches, backend=backend)
        found.append(Contender(same, 1, make(plan), exact=False))
        plan = dataclasses.replace(plan, pipefusion=2)
        name = f"pipefusion 2, {patches} patches, {backend}"
        found.append(Contender(name, 2, make(plan), alike=same))
        found.append(Contender(f"{name}, transfers stubbed", 2, make(plan), same_as=name, stub=True, exact=False))
    return found


def vae(backend: str) -> list[Contender]:
    """Ways to decode with an autoencoder, diffusers' own first."""
    found = [
        Contender("diffusers", 1, lambda module: module.decode),
        Contender("diffusers, tiled", 1, _tiled, exact=False),
    ]
    for count in (1, 2, 4, 8):
        plan = Plan(ring=count, vae="patch", backend=backend)
        found.append(Contender(f"patch {count}, {backend}", count, _decoding(plan)))
        strips = dataclasses.replace(plan, vae_memory="1MiB")
        found.append(Contender(f"patch {count} in strips, {backend}", count, _decoding(strips)))
        if 1 < count < 8:
            theirs = Plan(ring=count, vae="distvae", backend=backend)
            found.append(Contender(f"distvae {count}", count, _decoding(theirs)))
    return found


def _decoding(plan: Plan) -> Callable[[nn.Module], Call]:
    return lambda module: parallelize(module, plan).decode


def _tiled(module: nn.Module) -> Call:
    module.enable_tiling()
    return module.decode


SCALE = 4.0


def _stacked(module: Call) -> Call:
    """Guidance over one call with both branches, the unconditional one first."""

    def call(**inputs: Any) -> torch.Tensor:
        unconditional, conditional = module(**inputs)[0].chunk(2)
        return unconditional + SCALE * (conditional - unconditional)

    return call


def _twice(module: Call) -> Call:
    """Guidance over one call for each branch."""

    def call(**inputs: Any) -> torch.Tensor:
        count = len(inputs["timestep"])
        branches = [
            {
                name: value[branch : branch + 1] if isinstance(value, torch.Tensor) and len(value) == count else value
                for name, value in inputs.items()
            }
            for branch in range(count)
        ]
        unconditional, conditional = (module(**branch)[0] for branch in branches)
        return values_of(unconditional + SCALE * (conditional - unconditional))

    return call


def contenders(backend: str) -> list[Contender]:
    """Everything that is measured, the reference first and the base of all ratios second."""
    one = [
        Contender(REFERENCE, 1, lambda module: module),
        Contender(base(backend), 1, lambda module: parallelize(module, Plan(backend=backend))),
    ]
    if backend == "inductor":
        one.append(Contender("one process, torch.compile of the module", 1, _compiled))
    two = []
    for method in ("ulysses", "ring"):
        plan = Plan(**{method: 2}, backend=backend)
        name = f"{method} 2, {backend}"
        two.append(Contender(name, 2, lambda module, plan=plan: parallelize(module, plan)))
        two.append(Contender(f"{name}, collectives stubbed", 2, two[-1].make, same_as=name, stub=True, exact=False))
    for method in ("ulysses", "ring"):
        two.append(Contender(f"diffusers {method} 2, eager", 2, lambda module, method=method: native(module, method)))
        if backend == "inductor":
            two.append(
                Contender(
                    f"diffusers {method} 2, torch.compile",
                    2,
                    lambda module, method=method: _compiled(native(module, method)),
                )
            )
    return one + two


def base(backend: str) -> str:
    """The contender that all ratios refer to."""
    return f"one process, {backend}"


def _compiled(module: nn.Module) -> Call:
    return torch.compile(module, dynamic=False)


def native(module: nn.Module, method: str) -> nn.Module:
    """diffusers' own context parallelism. It counts accelerators, of which a machine with CPUs only has none."""
    from diffusers import ContextParallelConfig

    count = torch.accelerator.device_count
    torch.accelerator.device_count = lambda: max(count(), 1)
    try:
        module.enable_parallelism(config=ContextParallelConfig(**{f"{method}_degree": dist.get_world_size()}))
    finally:
        torch.accelerator.device_count = count
    return module


class Sent:
    """A transfer that is over."""

    def wait(self) -> None: ...

    def is_completed(self) -> bool:
        return True


class Stubs:
    """Transfers that hand a rank its own data back: what a step would take if peers answered at once.

    ``calls`` counts them, so that a run can be checked to have met every collective of its graph.
    """

    def __init__(self) -> None:
        self.calls = 0

    @contextlib.contextmanager
    def installed(self) -> Iterator[Stubs]:
        """In the place of torch.distributed's functions, for as long as the block runs.

        A ``P2POp`` accepts no send or receive but those of the module that defines it, so they are replaced there, too.
        """
        replaced = [
            (dist, "all_to_all_single", self._all_to_all),
            (dist, "all_reduce", self._all_reduce),
            (dist, "batch_isend_irecv", self._pass_on),
            (all_gather, "_gather_even", self._gather),
            *((owner, name, self._sent) for owner in (dist, distributed_c10d) for name in ("isend", "irecv")),
            (dist, "broadcast", self._all_reduce),
        ]
        before = [(owner, name, getattr(owner, name)) for owner, name, _ in replaced]
        for owner, name, stub in replaced:
            setattr(owner, name, stub)
        try:
            yield self
        finally:
            for owner, name, function in before:
                setattr(owner, name, function)

    def _all_to_all(self, out: torch.Tensor, given: torch.Tensor, *_: Any, **__: Any) -> None:
        self.calls += 1
        count = min(out.numel(), given.numel())
        out[:count].copy_(given[:count])
        out[count:].zero_()

    def _gather(self, out: torch.Tensor, given: torch.Tensor, **_: Any) -> None:
        self.calls += 1
        out.view(-1, given.numel()).copy_(given.expand(out.numel() // given.numel(), -1))

    def _sent(self, tensor: torch.Tensor, **_: Any) -> Sent:
        self.calls += 1
        return Sent()

    def _all_reduce(self, *_: Any, **__: Any) -> None:
        self.calls += 1

    def _pass_on(self, operations: list[dist.P2POp]) -> list[Any]:
        self.calls += 1
        tensors = [operation.tensor for operation in operations]
        if len(tensors) == 2:
            count = min(tensor.numel() for tensor in tensors)
            tensors[1].zero_()[:count].copy_(tensors[0][:count])
        return []
