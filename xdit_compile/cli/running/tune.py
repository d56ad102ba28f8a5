"""Times on this device what optional passes can rewrite of a denoiser, and keeps that in the cache folder."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from xdit_compile.backends.base import Backend
from xdit_compile.backends.registry import backend_of
from xdit_compile.cache.store import open_store
from xdit_compile.cli.options.request import Request
from xdit_compile.cli.processes.speech import set_logs, show_phases
from xdit_compile.compiler import BEFORE_FUSIONS, analyse, compiled
from xdit_compile.distributed.mesh import Mesh
from xdit_compile.distributed.world import World
from xdit_compile.errors import UsageError, XditCompileError, one_line
from xdit_compile.ir.program import Program
from xdit_compile.passes.fuse.fusions import IN_ORDER, OptionalPass
from xdit_compile.passes.fuse.selection import Noting, Small
from xdit_compile.passes.fuse.timings import Timing, Timings, described, file_of, keep, load
from xdit_compile.plan import Plan
from xdit_compile.runtime.stored.progress import Progress
from xdit_compile.runtime.verify.timed import timed

from .build import of_size, said, without_values
from .explain import denoiser_call
from .pipeline_call import placement

NOISY = (
    "{noisy} of {all} sites are not kept: fused/apart may be off by up to {spread:.0%}, more than the two differ; "
    "something else ran on this device, so tune once more when it is idle, or give more --rounds"
)
ALONE = "it is rewritten only together with what is around it"


@dataclasses.dataclass(frozen=True)
class Row:
    """What came out for a site.

    Args:
        timing: what was measured; None where nothing could be.
        site: the pass, and the site in words.
        estimated: why it would stay apart without a timing; None where it would not.
        failed: why nothing was measured.
    """

    timing: Timing | None
    site: tuple[str, str]
    estimated: str | None
    failed: str = ""


class Tuning:
    """Times sites that are not in a table yet, and adds them.

    Args:
        plan: whose passes are tried.
        device: where they are timed.
        backend: what compiles.
        folder: where the table is.
        again: whether sites that are in the table are timed once more.
        rounds: samples of each, apart and fused.
    """

    def __init__(self, plan: Plan, device: torch.device, backend: Backend, folder: Path, again: bool, rounds: int):
        self._plan, self._device, self._backend, self._folder = plan, device, backend, folder
        self._about = described(device, backend.name, plan.compiled_how)
        self.passes = [each for each in IN_ORDER if each.wanted(plan.without, device)]
        self.path = file_of(folder, self._about)
        self.table = load(folder, self._about)
        self.rows: dict[str, Row] = {}
        self._known = Timings() if again else self.table
        self._rounds, self._progress = rounds, Progress("tune", speaks=True)

    def tune(self, request: Request, component: str | None, inputs: str | None) -> None:
        """Time all sites of a request's denoiser on every rank, of one pass after the other.

        A pass finds what the passes before it left, as they choose by what was measured.
        """
        self._progress.stage("capturing")
        try:
            programs = self._programs(request, component, inputs)
            for fusion in self.passes:
                chooser = Noting(fusion.name, Timings(), fusion.needs_timing)
                for program in programs:
                    fusion.run(program, chooser)
                self._measure(fusion, {key: seen for key, seen in chooser.seen.items() if self._is_new(key)}, programs)
                programs = [fusion.run(program, fusion.chooser(self.table)) for program in programs]
        finally:
            self._progress.end()

    def _is_new(self, key: str) -> bool:
        return key not in self._known.entries and key not in self.rows

    def _programs(self, request: Request, component: str | None, inputs: str | None) -> list[Program]:
        """What all ranks run, before any pass that can be left out; in one process, without weights."""
        call = denoiser_call(request, component, inputs, self._device.type)
        module, args, kwargs = without_values(call.module, call.args, call.kwargs, self._device)
        with torch.inference_mode(False), torch.no_grad():
            analysis = analyse(module, self._plan, args, kwargs, check=False, run=False)
            ranks = (Mesh.named(self._plan, rank) for rank in range(self._plan.world_size))
            states = [compiled(analysis, self._plan, mesh, until=BEFORE_FUSIONS, device=self._device) for mesh in ranks]
        return [program for state in states for program in state.programs.values()]

    def _measure(self, fusion: OptionalPass, sites: dict[str, Any], programs: Sequence[Program]) -> None:
        self._progress.begin(len(sites))
        for key, (small, choice) in sites.items():
            row = self._row(fusion, small, choice.reason, programs[0])
            self.rows[key] = row
            if row.timing is not None and not row.timing.is_noise:
                self.table = self.table.with_others({key: row.timing})
                self._keep({key: row.timing})
            self._progress.step(1)

    def _keep(self, entries: dict[str, Timing]) -> None:
        try:
            keep(self._folder, self._about, entries)
        except OSError as error:
            raise XditCompileError(f"the table of timings {self.path} cannot be written: {one_line(error)}") from error

    def _row(self, fusion: OptionalPass, small: Small, estimated: str | None, like: Program) -> Row:
        site = (fusion.name, str(small))
        try:
            timing = timed(small, fusion, like, self._backend, self._device, self._rounds)
        except Exception as error:  # whatever a compiler raises, or a device that has no memory left
            return Row(None, site, estimated, one_line(error))
        return Row(timing, site, estimated, "" if timing is not None else ALONE)


def tune(
    request: Request, component: str | None, inputs: str | None, sizes: Sequence[tuple[int, int] | None],
    batches: Sequence[int], again: bool, rounds: int,
) -> Iterator[str]:  # fmt: skip
    """Time every distinct site of a denoiser, for every size and batch, and keep what came out.

    Args:
        request: the model, the plan and the dtype.
        component: names the denoiser, else it is the one called first.
        inputs: a file that gives the denoiser's arguments.
        sizes: heights and widths in pixels; None for the pipeline's own.
        batches: numbers of prompts in one call.
        again: whether sites that are in the table are timed once more.
        rounds: samples of each, apart and fused.

    Yields:
        What is printed: a table of the sites, and where it is kept.

    Raises:
        UsageError: there is nowhere to keep timings, or no pass is for the device.
        XditCompileError: the model cannot be built, the plan cannot be done with it, or the table cannot be written.
    """
    show_phases(request, World())
    set_logs(request)
    plan, store = request.plan, open_store(request.plan.cache)
    if store is None:
        raise UsageError("the cache folder cannot be used, so there is nowhere to keep timings: give --cache_dir")
    device, _ = placement(request, World())
    tuning = Tuning(plan, device, backend_of(plan), store.folder, again, rounds)
    if not tuning.passes:
        raise UsageError(f"there is nothing to time: no pass that the plan leaves in is for {device.type}")
    for size, batch in [(size, batch) for size in sizes for batch in batches]:
        tuning.tune(of_size(request, size, batch), component, inputs)
        yield f"{said(size, batch)}: done"
    if tuning.rows:
        yield _table(list(tuning.rows.values()))
    noisy = [row.timing.spread for row in tuning.rows.values() if row.timing is not None and row.timing.is_noise]
    if noisy:
        yield NOISY.format(noisy=len(noisy), all=len(tuning.rows), spread=max(noisy))
    yield f"{len(tuning.rows)} sites timed now, {len(tuning.table.entries)} in {tuning.path}"


def _table(rows: Sequence[Row]) -> str:
    from rich.table import Table

    from xdit_compile.reports.report import printed

    table = Table("pass", "site", title="measured on this device", title_justify="left")
    for column in ("apart us", "fused us", "fused/apart", "off"):
        table.add_column(column, justify="right")
    table.add_column("by estimate")
    table.add_column("taken")
    for row in rows:
        table.add_row(*row.site, *_numbers(row.timing), "apart" if row.estimated else "fused", _verdict(row))
    return printed([table])


def _numbers(timing: Timing | None) -> list[str]:
    """Times in microseconds, their ratio, and how far the result was off."""
    if timing is None:
        return [""] * 4
    error = "" if timing.error is None else f"{timing.error:.1e}"
    if timing.apart is None or timing.fused is None:
        return ["", "", "", error]
    ratio = timing.fused / timing.apart
    return [f"{timing.apart * 1e6:,.1f}", f"{timing.fused * 1e6:,.1f}", f"{ratio:.3f}", error]


def _verdict(row: Row) -> str:
    if row.timing is None:
        return f"not timed: {row.failed}"
    if row.timing.wrong:
        return f"apart: {row.timing.wrong}"
    if row.timing.is_noise:
        return f"not kept: within noise of {row.timing.spread:.0%}"
    return "fused" if row.timing.refusal is None else "apart"
