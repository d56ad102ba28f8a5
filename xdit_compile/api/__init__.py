"""What users call: parallelize, restore, refresh, explain."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from xdit_compile.backends.registry import backend_of
from xdit_compile.backends.target.cards import Card, card_for
from xdit_compile.backends.target.pretend_card import DEVICE, check_versions, pretend_card
from xdit_compile.cache.folder import resolve
from xdit_compile.cache.store import open_store
from xdit_compile.capture.state.in_place import held, put_back, put_in_place
from xdit_compile.capture.state.unsupported import refuse_unsupported
from xdit_compile.compiler import analyse, place
from xdit_compile.distributed.devices import execution_device, refuse_moved, settle
from xdit_compile.distributed.mesh import Mesh
from xdit_compile.distributed.seats import Seat, compare_seats, join
from xdit_compile.distributed.world import World
from xdit_compile.errors import ProviderUnavailable, UsageError
from xdit_compile.kernels.gather_parameter import gather_whole
from xdit_compile.kernels.providers import AttentionQuery
from xdit_compile.kernels.registry import choose
from xdit_compile.passes.fuse.timings import Timings, described, load
from xdit_compile.plan import Plan
from xdit_compile.plan.log_level import set_log_level
from xdit_compile.plan.methods import TEAM, TENSOR
from xdit_compile.plan.plan import as_plan
from xdit_compile.reports.components_report import ComponentsReport, whole
from xdit_compile.reports.counted_report import counted_report, on_paper
from xdit_compile.reports.pipeline_report import PipelineReport, pipeline_report
from xdit_compile.reports.report import Report, report
from xdit_compile.runtime.diffusers_pipeline import (
    autoencoders,
    denoisers,
    follow_modules,
    restore_call,
    session_of,
    uncompiled,
    wrap_call,
)
from xdit_compile.runtime.methods.ahead import runner_class
from xdit_compile.runtime.methods.autoencoder import RowMethod, Team, restore_rows, row_methods, split_rows
from xdit_compile.runtime.methods.distvae import attach_distvae, check_distvae, is_distvae, restore_distvae
from xdit_compile.runtime.runner import Runner
from xdit_compile.runtime.session import Session
from xdit_compile.runtime.stored.progress import Progress
from xdit_compile.weights.weights import Weights


def parallelize(target: Any, plan: Plan | None = None) -> Any:
    """Make a pipeline's denoisers, or one module, run on all ranks of a plan; changes it in place.

    With ``plan.vae == "patch"`` the autoencoder's ``decode`` and ``encode`` are split by rows, too; a module that has
    these methods is then taken as an autoencoder.

    Under torchrun (or any launcher that sets ``RANK`` and ``WORLD_SIZE``) the default process group is used, and made
    if need be. Every rank must call this with the same plan on the same weights. With a plan of one rank it works in
    one process, too. Nothing is captured before the first call.

    Args:
        target: a diffusers pipeline or an ``nn.Module`` in evaluation mode.
        plan: degrees and choices; one rank by default. With ``tensor`` above 1 each rank releases the parameters of
            which it needs a slice once the first call was verified; ``restore`` gathers them.

    Returns:
        ``target`` itself.

    Raises:
        PlanError: with every problem of the plan.
        ProviderUnavailable: a backend or attention provider that cannot be used here.
        UsageError: a target without a denoiser, or one that is parallelized already.
        WrongTypeError: a target or plan of another type.
    """
    set_log_level()
    return attach(target, as_plan(plan), {})


def attach(target: Any, plan: Plan, weights: Mapping[str, Weights]) -> Any:
    """What `parallelize` does, with the weights of some components given by name."""
    backend, store = backend_of(plan), open_store(plan.cache)
    coders = dict(autoencoders(target)) if plan.vae != "whole" else {}
    if plan.vae != "whole" and not coders:
        raise UsageError(f"vae={plan.vae!r} but there is no autoencoder here; use vae='whole'")
    for module in coders.values() if plan.vae == "distvae" else ():
        check_distvae(module)
    modules = dict(_denoisers(target, coders))
    devices = {**_devices(modules, weights), **_devices(coders, {})}
    for name, module in modules.items():
        _check_provider(plan, module, devices[name])
    for name, module in {**modules, **coders}.items() if plan.fallback != "unsplit" else ():
        refuse_unsupported(module, name)
    session = _common_session(target, {**modules, **coders}, plan)
    if session is None:
        backend.prepare()
        device = _sit_down(plan, list(devices.values()))
        session = Session(plan, Mesh.from_process_group(plan), backend, device, store)
    _stay({name: module for name, module in {**modules, **coders}.items() if not held(module)}, session)
    for name, module in modules.items():
        if not held(module):
            runner = runner_class(plan)(weights.get(name) or Weights(module), session, name)
            put_in_place(module, {"forward": runner})
            session.compare_weights(name, runner.weights.values)
    _split_rows({name: module for name, module in coders.items() if not held(module)}, session)
    if not isinstance(target, nn.Module) and not held(target):
        wrap_call(target, session)
        follow_modules(_pipeline_base(type(target)))
    return target


def _common_session(target: Any, modules: Mapping[str, nn.Module], plan: Plan) -> Session | None:
    """The session of the same plan in which another pipeline has some of these modules, if there is one.

    Raises:
        UsageError: all is parallelized already, or some of it by another plan.
    """
    sessions = {name: session for name, module in modules.items() if (session := session_of(module)) is not None}
    taken = [*sessions, *(name for name, module in modules.items() if is_distvae(module))]
    if not taken:
        return None
    session = next(iter(sessions.values()), None)
    alone = isinstance(target, nn.Module) or session is None
    if alone or any(other is not session or other.plan != plan for other in sessions.values()):
        raise UsageError(f"{taken[0]} is parallelized already; call xdit_compile.restore first")
    return session


def _pipeline_base(kind: type) -> type:
    """The class that gives pipelines ``register_modules``."""
    return next(base for base in reversed(kind.__mro__) if "register_modules" in vars(base))


def restore(target: Any) -> Any:
    """Undo `parallelize`; returns ``target``.

    Weights that were released are gathered, or read where they came from: with ``tensor`` or ``pipefusion`` every rank
    must call this, and has room for the whole module afterwards.

    Raises:
        UsageError: nothing of ``target`` is parallelized.
    """
    coders = [module for _, module in autoencoders(target) if row_methods(module) or is_distvae(module)]
    split_denoisers = [module for _, module in _denoisers(target, coders) if runner_of(module) is not None]
    if not split_denoisers and not coders:
        raise UsageError("nothing to restore: this was not parallelized")
    session = next((session for each in (*split_denoisers, *coders) if (session := session_of(each)) is not None), None)
    for module in split_denoisers:
        _take_off(module)
    for module in coders:
        restore_distvae(module)
        restore_rows(module)
    if session is not None:
        session.close()
    if not isinstance(target, nn.Module):
        restore_call(target)
    return target


def refresh(target: Any) -> Any:
    """Forget what was kept of the weights' values; returns ``target``.

    The next call cuts slices anew from the module or, after `from_pretrained`, reads the files again, and captures the
    module anew. Changes of weights are noticed without this as a rule (docs/plans.md says which are not). Every rank
    must call this.

    Raises:
        UsageError: nothing of ``target`` is parallelized, or the values of its weights are not there to be cut anew.
    """
    coders = [module for _, module in autoencoders(target) if row_methods(module)]
    runners = [runner for _, module in _denoisers(target, coders) if (runner := runner_of(module)) is not None]
    if not runners and not coders:
        raise UsageError("nothing to refresh: this was not parallelized")
    for runner in runners:
        runner.refresh()
    for method in (method for module in coders for method in row_methods(module)):
        method.refresh()
    return target


def generation(module: nn.Module) -> AbstractContextManager[Any]:
    """The calls of a parallelized module that make one picture, for loops that are no pipeline's.

    With ``pipefusion`` or ``distrifusion`` calls inside take keys and values from one another, from the first to the
    last step; outside, every call computes all tokens anew. A pipeline's own call is a generation already.

    Raises:
        UsageError: for a module that is not parallelized.
    """
    runner = runner_of(module)
    if runner is None:
        raise UsageError("generation takes a module that was parallelized; call xdit_compile.parallelize first")
    return runner.session.request({})


def explain(
    explained: Any, /, plan: Plan | None = None, args: tuple = (), kwargs: dict | None = None, *,
    target: str | None = None,
) -> Report | PipelineReport | ComponentsReport:  # fmt: skip
    """How a module is split: axes and roles, boundaries, gathers, collectives with their bytes, imbalance, memory.

    Under PipeFusion: blocks, parameters, states and bytes sent of every stage.

    Args:
        explained: a parallelized pipeline that was called at least once, which reports on the latest program of each of
            its components; a module of which the same holds; or any module together with ``plan`` and example inputs,
            which may be on the meta device.
        plan: the degrees; needs no processes.
        args, kwargs: example inputs.
        target: a card, such as ``sm_90``, that need not be there: its code is generated and compiled, and launches,
            products, bytes, registers and spills of this rank are counted in it. Takes as long as compiling does.

    Raises:
        UsageError: for what was neither called nor given inputs, and a target that cannot be compiled for here.
    """
    set_log_level()
    card = None if target is None else card_for(target)
    if card is not None:
        check_versions()
    if plan is None and not (args or kwargs):
        if isinstance(explained, nn.Module):
            return _explain_called(explained, card)
        return _explain_components(explained, card)
    if not (args or kwargs):
        raise UsageError(
            "explain needs the inputs of one call beside a plan: explain(module, plan, args=(...), kwargs={...}); "
            "of a parallelized pipeline that was called, explain(pipe) says all"
        )
    plan = as_plan(plan)
    ((_, module),) = list(denoisers(explained))[:1]
    analysis = analyse(module, plan, args, kwargs or {})
    return _report(analysis, plan, 0, card=card)


def _explain_components(pipe: Any, card: Card | None) -> ComponentsReport:
    """Every component that holds weights: its report, or why there is none.

    Raises:
        UsageError: the pipeline is not parallelized.
    """
    list(denoisers(pipe))
    modules = {name: uncompiled(each) for name, each in pipe.components.items() if isinstance(each, nn.Module)}
    if not any(map(_is_split, modules.values())):
        raise UsageError("this pipeline is not parallelized: parallelize(pipe, plan) first, and call it once")
    said: list[tuple[str, Report | PipelineReport | str]] = []
    for name, module in modules.items():
        if not _is_split(module):
            said.append((name, whole(module)))
            continue
        try:
            said.append((name, _explain_called(module, card)))
        except UsageError as error:
            said.append((name, str(error)))
    return ComponentsReport(tuple(said))


def _is_split(module: nn.Module) -> bool:
    return runner_of(module) is not None or bool(row_methods(module))


def _explain_called(module: nn.Module, card: Card | None) -> Report | PipelineReport:
    """The report on the latest program of a parallelized module.

    Raises:
        UsageError: it has none.
    """
    if methods := row_methods(module):
        return _report_rows(methods, card)
    runner = runner_of(module)
    if runner is None:
        raise UsageError("explain needs example inputs (args=, kwargs=) for a module that was not parallelized")
    compiled_call = runner.calls.latest
    if compiled_call is None and runner.unsplit:
        raise UsageError("nothing to explain: the module runs whole on every rank, as it was warned of")
    if compiled_call is None:
        raise UsageError("nothing to explain yet: call the pipeline once, or give a plan and example inputs")
    rank = runner.mesh.rank
    return _report(compiled_call.analysis, runner.plan, rank, compiled_call.said, runner.session.device, card)


def runner_of(module: nn.Module) -> Runner | None:
    """What stands in the place of a module's forward, if it is parallelized."""
    found = held(module).get("forward")
    return found if isinstance(found, Runner) else None


def _stay(modules: Mapping[str, nn.Module], session: Session) -> None:
    """See to it, whenever a request begins, that modules did not move away from the device of their ranks."""
    if session.device is None:
        return
    for name, module in modules.items():
        session.before_request(functools.partial(refuse_moved, name, module, session.device))


def _split_rows(coders: Mapping[str, nn.Module], session: Session) -> None:
    for name, module in coders.items():
        if session.plan.vae == "patch":
            team = Team(Weights(module), session, session.rows)
            split_rows(team)
            session.compare_weights(name, team.weights.values)
        elif session.rows.mesh.world_size > 1:
            with session.groups.running():
                attach_distvae(module, session.rows.mesh)


def _denoisers(target: Any, coders: Any) -> Iterator[tuple[str, nn.Module]]:
    """The denoisers of a target; none where it is an autoencoder itself."""
    return iter(()) if isinstance(target, nn.Module) and coders else denoisers(target)


def _report_rows(methods: list[RowMethod], card: Card | None) -> Report | PipelineReport:
    compiled_call = next((found for method in methods if (found := method.latest()) is not None), None)
    if compiled_call is None:
        raise UsageError("nothing to explain yet: call decode or encode once")
    place = methods[0].team.place
    device = methods[0].team.session.device
    return _report(compiled_call.analysis, place.plan, place.mesh.rank, compiled_call.said, device, card)


def _report(
    analysis: Any, plan: Plan, here: int, ready: str = "", device: torch.device | None = None, card: Card | None = None
) -> Report | PipelineReport:  # fmt: skip
    if card is not None:
        return _counted(analysis, plan, here, ready, card)
    if plan.patch_count > 1:
        return pipeline_report(analysis, plan, ready)
    meshes = (Mesh.simulated(plan, rank) for rank in range(plan.world_size))
    ranks = [place(analysis, plan, mesh, stale=plan.distrifusion > 1) for mesh in meshes]
    device = device or torch.device("cpu")
    return report(analysis, ranks, here, ready, plan.without, device, _timings(plan, device))


def _timings(plan: Plan, device: torch.device) -> Timings:
    """What was measured on a device; nothing where the plan's backend is not here."""
    try:
        backend = backend_of(plan)
    except ProviderUnavailable:
        return Timings()
    return load(resolve(plan.cache), described(device, backend.name, plan.compiled_how))


def _counted(analysis: Any, plan: Plan, here: int, ready: str, card: Card) -> Report | PipelineReport:
    """The report for a card that is not there, with what it would run on rank ``here``."""
    summary = _report(analysis, dataclasses.replace(plan, cache=None), here, ready, DEVICE)
    state = on_paper(analysis, plan, Mesh.simulated(plan, here))
    progress = Progress(card.target, speaks=here == 0)
    progress.begin(sum(len(program.structures()) for program in state.programs.values()))
    try:
        with pretend_card(card) as binaries:
            return dataclasses.replace(summary, counted=counted_report(state, card, binaries, progress.step))
    finally:
        progress.end()


def _devices(modules: Mapping[str, nn.Module], weights: Mapping[str, Weights]) -> dict[str, torch.device]:
    """Where each module computes; weights that are not read yet say where they will be put."""
    return {
        name: execution_device(module, weights[name].device if name in weights else "cpu")
        for name, module in modules.items()
    }


def _check_provider(plan: Plan, module: nn.Module, device: torch.device) -> None:
    """Refuse an attention provider that cannot be used with the module's device and dtype, whatever the shapes."""
    weight = next(module.parameters(), None)
    if plan.attention != "auto" and weight is not None:
        query = AttentionQuery(device.type, weight.dtype, 8, 8, 64, 64, 64, 64, lse=plan.ring > 1)
        choose(plan.attention, query)


def _take_off(module: nn.Module) -> None:
    runner = runner_of(module)
    assert runner is not None
    holders = TEAM if runner.plan.pipefusion > 1 else TENSOR
    with runner.session.call():
        runner.recover(functools.partial(gather_whole, runner.mesh.group(holders)))
    put_back(module)


def _sit_down(plan: Plan, devices: list[torch.device]) -> torch.device | None:
    """Join the process group, once this rank's device is current; ranks whose devices do not go together all raise.

    Returns:
        The device; None where this rank is alone and may compute on any.

    Raises:
        UsageError: a module is not on its rank's device, or two ranks are on one card.
    """
    world = World.from_environment()
    if plan.world_size == 1:
        join(plan, devices[0], world)
        return None
    device, problem = settle(devices)
    join(plan, device, world)
    store = dist.distributed_c10d._get_default_store()
    compare_seats(Seat.of(device, problem), store, dist.get_rank(), dist.get_world_size(), plan.timeout_s)
    return device
