"""What the ranks of one plan share: made once by `parallelize`, handed on as one to whatever runs for it."""

from __future__ import annotations

import dataclasses
import datetime
import functools
import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Any

import torch
import torch.distributed as dist
from torch.utils import _pytree as pytree

from xdit_compile.backends.base import Backend
from xdit_compile.cache.store import Store
from xdit_compile.distributed.agreement import Agreement
from xdit_compile.distributed.devices import current
from xdit_compile.distributed.mesh import Mesh, connect, first_sentence
from xdit_compile.distributed.sketch import sketch_of
from xdit_compile.distributed.turns import Turns
from xdit_compile.errors import AgreementError, PartitionError, PeerError, UsageError
from xdit_compile.ir.digest import digest, digest_tensors
from xdit_compile.ir.results import found_in
from xdit_compile.kernels.collectives.communicators import finish_device
from xdit_compile.kernels.collectives.process_groups import Groups
from xdit_compile.passes.fuse.timings import Timings, described, load
from xdit_compile.plan import Plan
from xdit_compile.weights.weights import Weights

from .cfg_branches import GuidanceScheduler
from .generation import Generation
from .lookout import Lookout
from .request_facts import facts_of, share_random_state
from .shared_inputs import SharedInputs
from .stored.keeper import Keeper
from .stored.progress import Progress, Times, times
from .stored.shelf import Shelf

REFUSALS = (UsageError, PartitionError)
"""What goes by plan and graph alone, and so is no consequence of values that never came."""
SLACK_SECONDS = 10.0
"""Transfers end by themselves so long after ranks say for whom they wait in vain."""


@dataclasses.dataclass(frozen=True)
class Target:
    """What graphs are made for.

    Args:
        plan: the degrees and choices.
        mesh: this rank's place.
        backend: what runs graphs.
    """

    plan: Plan
    mesh: Mesh
    backend: Backend


class Session:
    """One plan at work on the modules of one or several pipelines.

    A *request* is what one outer call of a pipeline does; a call of a module outside of one is a request of its own,
    whose inputs are confirmed before its result is used. Requests of several threads follow one another. A rank that
    fails in one says so and closes its connections, which frees its peers; all ranks then raise, and the next request
    opens new connections in another epoch.

    Args:
        plan: the degrees and choices.
        mesh: this rank's place.
        backend: what runs graphs.
        device: where this rank computes, which is current during requests and calls.
        store: where compiled calls outlive the process; None where they do not.
        ahead: where nothing is run, as there are no other ranks, and what this one would run is made and kept: what
            that has in common with what is made for the others.

    Attributes:
        ahead_for: the device that this is made for then, which need not be there.
    """

    def __init__(
        self, plan: Plan, mesh: Mesh, backend: Backend, device: torch.device | None = None, store: Store | None = None,
        ahead: str | None = None,
    ):  # fmt: skip
        self.plan, self.mesh, self.device = plan, mesh, device
        self.ahead_for = None if ahead is None else device
        self.place = Target(plan, mesh, backend)
        self.rows = Target(plan.rows, mesh.shared_rows(plan), backend)
        alone = Agreement("ahead", mesh.rank, [mesh.rank], plan.timeout_s)
        self.agreement = alone if ahead is not None else Agreement.over(mesh, plan.timeout_s)
        limit = datetime.timedelta(seconds=plan.timeout_s + SLACK_SECONDS)
        self.groups = Groups(functools.partial(connect, mesh, limit, plan.rows.ring), self.agreement.pulse)
        if ahead is None:
            self.agreement.exchange("new connections", None)
            self.groups.open()
        self._lookout = Lookout(self.agreement, self.groups)
        self._shelf = Shelf(store, self.agreement, backend.codes, ahead)
        self._timings: dict[torch.device, Timings] = {}
        self.branches = GuidanceScheduler(mesh, self.call)
        self.generation = Generation(plan.warmup_steps if plan.is_stale else 0)
        self.inputs = SharedInputs(self.agreement, mesh.group(mesh.names))
        self._turns = Turns(self.agreement)
        self._catching_up = threading.Lock()
        self._thread = 0
        self._in_request = self._in_call = self._closed = False
        self._broken: BaseException | None = None
        self._made: list[Any] = []
        self._requests = 0
        self.steps = 0
        self.times = Times()
        self._values: dict[str, Callable[[], list[torch.Tensor]]] = {}
        self._before: list[Callable[[], None]] = []
        self._after: list[Callable[[], None]] = []
        self._after_failure: list[Callable[[], None]] = []
        self._reconciled = True

    def before_request(self, do: Callable[[], None]) -> None:
        """Have something done when a request begins."""
        self._before.append(do)

    def after_request(self, do: Callable[[], None]) -> None:
        """Have something done when a request is over, however it ended."""
        self._after.append(do)

    def compare_weights(self, name: str, values: Callable[[], list[torch.Tensor]]) -> None:
        """Have ranks compare some values of a module's weights when a request begins."""
        self._values[name] = values

    def after_failure(self, do: Callable[[], None]) -> None:
        """Have something done when connections were closed."""
        self._after_failure.append(do)

    @property
    def closed(self) -> bool:
        """Whether the session has ended."""
        return self._closed

    @property
    def in_request(self) -> bool:
        """Whether an outer call is under way."""
        return self._in_request

    def keeper(self, weights: Weights, name: str, backend: Backend) -> Keeper:
        """What keeps the calls of one module, and finds those that were kept."""
        speaks = self.mesh.rank == 0
        progress = functools.partial(Progress, name, speaks, self.agreement.do, self.times)
        return Keeper(self._shelf, backend.codes, weights, name, progress, speaks)

    def timings(self, device: torch.device) -> Timings:
        """What was measured on a device, read once: keys of programs and the programs go by the same table."""
        if device not in self._timings:
            about = described(device, self.place.backend.name, self.plan.compiled_how)
            self._timings[device] = load(self._shelf.folder, about)
        return self._timings[device]

    def close(self) -> None:
        """End what the session holds: connections and signs of life."""
        self._closed = True
        self.agreement.close()
        self.groups.close(broken=False)

    @contextmanager
    def request(self, arguments: Mapping[str, Any], steps: int | None = None) -> Iterator[dict[str, Any]]:
        """One outer call: ranks agree on its arguments before it, and after it on the calls that it made.

        Args:
            arguments: by name.
            steps: how many it has, where that is known.

        Returns:
            The arguments, with the first rank's in the place of tensors that differ by rounding.

        Raises:
            AgreementError: ranks were given other arguments, made other calls, or one failed.
        """
        if self._in_request and self._thread == threading.get_ident():
            with self.entered(), self.generation.running(steps):
                yield dict(arguments)
            return
        self._catch_up()
        facts = facts_of(arguments)
        with self._taken(self._turns.of(digest([facts]))), self.entered():
            self._in_request, self._thread, self._made = True, threading.get_ident(), []
            self.steps = steps or 0
            self.agreement.start()
            self.times.begin()
            try:
                with self.generation.running(steps):
                    yield self._begin(arguments, facts)
                self._refuse_broken()
                self.branches.end()
                self._arrive()
                self.agreement.finish(self._made)
                level = logging.INFO if self.mesh.rank == 0 else logging.DEBUG
                times.log(level, "%s", self.times.said(steps))
            finally:
                self._in_request, self.steps = False, 0
                self.inputs.forget()
                self._do(self._after)

    @contextmanager
    def call(self) -> Iterator[None]:
        """One call of a module; outside of a request it is all of one."""
        with self.entered():
            inside = self._in_call
            if not (self._in_request or inside):
                self._connect()
                self._do(self._before)
            self._in_call = True
            try:
                yield
                if not (self._in_request or inside):
                    self._arrive()
                    self.agreement.confirm_call()
            finally:
                self._in_call = inside

    def announce(self, what: str, leaves: Sequence[Any]) -> None:
        """Tell peers which call this rank enters, and see whether earlier ones were the same."""
        if not self.agreement.alone:
            self.agreement.announce_call(what, [self.inputs.sketch(leaf) for leaf in leaves])

    def made(self, result: Any) -> Any:
        """What a request returns; that its tensors are the same on all ranks is seen at its end."""
        tensors = found_in(result, torch.Tensor)
        self._made = [sketch_of(tensor) for tensor in tensors if tensor.is_floating_point()]
        return result

    def _begin(self, arguments: Mapping[str, Any], facts: Mapping[str, str]) -> dict[str, Any]:
        self._requests += 1
        own = {"request": str(self._requests), "plan": digest([self.plan]), **self._weights()}
        leaves, spec = pytree.tree_flatten(pytree.tree_map_only(torch.Tensor, _countable, dict(arguments)))
        self._meet({**own, **facts})
        agreed_arguments = pytree.tree_unflatten(self.inputs.agreed(leaves), spec)
        share_random_state(self.agreement)
        self.branches.begin()
        self._do(self._before)
        return agreed_arguments

    def _weights(self) -> dict[str, str]:
        """What weights are compared by; stages of a pipeline hold others each."""
        if self.agreement.alone or self.plan.pipefusion > 1:
            return {}
        return {f"set of weights of {name}": digest_tensors(values()) for name, values in self._values.items()}

    def _connect(self) -> None:
        """After a failure open new connections; all ranks come here with their next call."""
        if not self._reconciled:
            self._meet({})

    def _meet(self, facts: Mapping[str, str]) -> None:
        """Agree on the facts of a request, and have connections: all ranks keep theirs or all make new ones."""
        said = self.agreement.exchange("the start", {"open": self.groups.is_open, "facts": facts})
        self.agreement.require_equal({rank: other["facts"] for rank, other in said.items()}, facts)
        if not (self.groups.is_open and all(other["open"] for other in said.values())):
            self.groups.close()
            self.agreement.exchange("new connections", None)
            self.groups.open()
        self.agreement.start()
        self._reconciled = True

    def _do(self, what: Sequence[Callable[[], None]]) -> None:
        for each in what:
            each()

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Part of a request or a call, in which a failure reaches the other ranks; the outermost one ends it."""
        on_device = current(self.device)
        with self._turns.one(), self.groups.running(), on_device, torch.inference_mode(False), torch.no_grad():
            outermost = not (self._in_request or self._in_call)
            if outermost:
                self._lookout.begin()
            try:
                with self._guarded():
                    yield
            finally:
                if outermost:
                    self._lookout.end()
                    if self._broken is not None:
                        self._renew()

    def _renew(self) -> None:
        self.agreement.renew()
        self._turns.reset()
        self._broken, self._requests, self._reconciled = None, 0, False

    def _catch_up(self) -> None:
        """Follow a peer that failed in a request which went well here: it was the last to learn that this rank came."""
        with self._catching_up, suppress(dist.DistError):
            if not (self._in_request or self._in_call) and self.agreement.failure(ended=True) is not None:
                self.groups.close()
                self._do(self._after_failure)
                self._renew()

    @contextmanager
    def _taken(self, turn: AbstractContextManager[None]) -> Iterator[None]:
        """A turn of this thread; that it does not come is a failure as any other."""
        try:
            turn.__enter__()
        except Exception:
            with self.entered():
                raise
        try:
            yield
        finally:
            turn.__exit__(None, None, None)

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        """Stop together: what is raised inside reaches the other ranks, and what stopped them is raised here."""
        try:
            self._refuse_broken()
            yield
        except BaseException as error:
            if self.agreement.alone or self._broken is not None:
                raise
            try:
                self._broken = self._stop(error)
            except dist.DistError as lost:
                self.groups.close()
                self._broken = AgreementError(
                    f"the store of the process group does not answer ({first_sentence(lost)}): rank 0, which keeps it, "
                    "has ended, or the launcher has; start all processes again"
                )
            if self._broken is error:
                raise
            raise self._broken from error

    def _arrive(self) -> None:
        """Wait for the device once, where waits for transfers did not, and refuse what never came."""
        if self.groups.come_at_once:
            finish_device()
            self._lookout.end()
            self.groups.refuse()

    def _refuse_broken(self) -> None:
        """A request in which something failed goes no further, whoever caught what was raised."""
        if self._broken is not None:
            raise self._broken

    def _stop(self, error: BaseException) -> BaseException:
        """Say that this rank goes no further, and close its connections, if any rank may wait in one."""
        given_up = self.groups.given_up
        if given_up is not None and isinstance(error, Exception) and not isinstance(error, REFUSALS):
            error = given_up
        cause = self.agreement.blame() if isinstance(error, PeerError) else None
        self.agreement.fail(error, cause)
        if given_up is not None or self.agreement.calls or not self.agreement.all_failed_unused():
            self.groups.close()
            self._do(self._after_failure)
        return error if cause is None else AgreementError(cause)


def _countable(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor that counts writes to it, unlike those made in inference mode; requests run outside of that mode."""
    return tensor.clone() if tensor.is_inference() else tensor
