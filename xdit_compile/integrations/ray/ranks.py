"""Ranks for a script of one's own: actors take the place of a launcher's processes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ray
from ray.exceptions import RayError

from xdit_compile.errors import UsageError, XditCompileError
from xdit_compile.plan import Plan

from .actors import Arguments, Outcome, actors_in, end_actors, said_of, settings_here
from .cluster import HERE, cluster
from .placing import Share, give_back, reserved

START_S = 120.0
TOGETHER_S = 10.0
"""Where one rank fails, the others fail likewise within so long, or all are ended."""


class Ranks:
    """So many actors as a plan has ranks, each on a device of its own, until the ``with`` block ends.

    They end with the job that made them, too, however that ends.

    Args:
        plan: which says how many there are.
        resources: what each takes of its machine, by Ray's names, as ``{"GPU": 1, "CPU": 4}``; a processor and, where
            the cluster has any, a GPU by default.
        address: of the cluster, where Ray is not initialized yet; by default that of ``RAY_ADDRESS`` or of this
            machine, which is started where there is none.
        wait_s: seconds to wait for machines to join a cluster that is too small; by default that is refused at once.

    Raises:
        UsageError: the cluster has no room for the plan.
        XditCompileError: the actors did not start.
    """

    def __init__(
        self, plan: Plan, resources: Mapping[str, float] | None = None, address: str = HERE, wait_s: float = 0.0
    ):
        self._plan = plan
        self._cluster = cluster(address, quiet=False)
        self._cluster.__enter__()
        self._groups: list[Any] = []
        self._actors: list[Any] = []
        try:
            share = Share.usual(on_cpu=False) if resources is None else Share.of(resources)
            self._groups = reserved(share, plan.world_size, 1, wait_s)
            self._actors = actors_in(self._groups[0], share, settings_here(), START_S).handles
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def run(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Any]:
        """Call a function on all ranks at once, and return what each gave, in their order.

        There `xdit_compile.parallelize` and ``torch.distributed`` find everything as under torchrun.

        Raises:
            UsageError: the ranks have ended.
            XditCompileError: a rank was lost, or failed where others did not; all have ended then.
            Exception: what the function raised on all ranks; they go on to be there.
        """
        return self._on_all("run", function, args=(args, kwargs))

    def pipeline(self, load: Callable[..., Any], *args: Any, **kwargs: Any) -> RemotePipeline:
        """Load a pipeline on every rank, and parallelize it.

        Args:
            load: returns it, on the rank's device. Called on every rank, where ``xdit_compile.local_device()`` says
                which device that is.

        Raises:
            Exception: as `run`.
        """
        self._on_all("load", load, self._plan, args=(args, kwargs))
        return RemotePipeline(self._on_all)

    def close(self) -> None:
        """End the ranks."""
        self._end()
        self._cluster.__exit__(None, None, None)

    def _on_all(self, method: str, *what: Any, args: Arguments) -> list[Any]:
        """What a method of all actors gives."""
        if not self._actors:
            raise UsageError("these ranks have ended; make others")
        given = ray.put(args)
        running = [getattr(actor, method).remote(*what, given) for actor in self._actors]
        waited_for = list(running)
        while waited_for:
            ended, waited_for = ray.wait(waited_for)
            failed = next((ref for ref in ended if _failure(ref) is not None), None)
            if failed is not None:
                self._fail(running, running.index(failed))
        return [ray.get(ref).value for ref in running]

    def _fail(self, running: Sequence[Any], first: int) -> None:
        """Raise what one rank failed with; the ranks end, unless all failed so."""
        ray.wait(list(running), num_returns=len(running), timeout=TOGETHER_S)
        failures = [_failure(ref) for ref in running]
        raised = {type(failure) for failure in failures}
        error = failures[first]
        assert error is not None
        if len(raised) == 1 and not isinstance(error, RayError):
            raise error
        self._end()
        raise XditCompileError(f"rank {first}: {said_of(error)}; all ranks were ended, make others") from error

    def _end(self) -> None:
        """End the actors, and give their room back."""
        end_actors(self._actors)
        self._actors = []
        give_back(self._groups)
        self._groups = []


class RemotePipeline:
    """A pipeline that is on all ranks. Call it as the pipeline itself; what rank 0 makes is returned."""

    def __init__(self, on_all: Callable[..., list[Any]]):
        self._on_all = on_all

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call it on all ranks; random generators among the arguments are on the CPU.

        Raises:
            Exception: as `Ranks.run`.
        """
        return self._on_all("make", args=(args, kwargs))[0]


def _failure(ref: Any) -> Exception | None:
    """What a call failed with, or lost its actor by; None where it is at work, or has given something."""
    if not ray.wait([ref], timeout=0)[0]:
        return None
    try:
        outcome: Outcome = ray.get(ref)
    except RayError as error:
        return error
    return outcome.error
