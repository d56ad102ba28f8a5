"""Seconds to the first step of new processes, when nothing is kept of compiled graphs and when all is.

Every run is a team of new processes that load the embedded pipeline, parallelize it and make pictures: the first with
an empty cache folder, the others with what that one left there. Pictures are compared before anything is reported.
What the processes had to make is counted by functions in the place of those that make it, and g++ by a script of that
name.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import functools
import itertools
import json
import os
import pathlib
import platform
import re
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from typing import Any
from unittest import mock

import click
import numpy as np
import torch
import torch.distributed as dist
from comparison import TOLERANCE
from fresh import in_new_processes
from processes import ENVIRONMENT
from rich.console import Console
from rich.table import Table

from xdit_compile import Plan, parallelize
from xdit_compile.cli.options.request import DEMO_PIPELINE

PROMPT = "a large red star in the center on a striped mint background"
PICTURES = 3
MORE_S = 1.0
"""Seconds that a first step may take more than a later one, where all is kept."""
SHARE = 1 / 20
"""Of the seconds that it takes where nothing is."""
LOG = "BENCHMARK_COMPILER_LOG"
"""Environment variable that names the file in which runs of g++ are noted."""
COUNTED = ("captures", "passes", "dynamo frames", "graphs to inductor", "code generated", "graphs loaded", "g++ runs")
"""What is counted of a process: modules recorded, passes of the compiler, functions that dynamo looked at, graphs given
to inductor, graphs that it wrote code for whoever gave them, graphs taken as they were compiled, runs of g++."""
NEEDED = tuple(name for name in COUNTED if name not in ("dynamo frames", "graphs loaded"))
"""What ranks with an empty cache must do, so a counter that sees nothing of it does not count."""


@dataclasses.dataclass(frozen=True)
class Startup:
    """A plan of two ranks, and whether its pictures are decoded; then that is what is timed."""

    degrees: dict[str, Any]
    decodes: bool = False


STARTUPS = {
    "ulysses 2": Startup({"ulysses": 2}),
    "pipefusion 2": Startup({"pipefusion": 2}),
    "tensor 2": Startup({"tensor": 2}),
    "cfg 2": Startup({"cfg": 2}),
    "ulysses 2, patch VAE": Startup({"ulysses": 2, "vae": "patch"}, decodes=True),
}


@dataclasses.dataclass(frozen=True)
class Job:
    """What the processes of one run do."""

    startup: str
    model: str
    cache: str
    steps: int


@dataclasses.dataclass(frozen=True)
class Picture:
    """Seconds from the call to the end of each step, and to the end of all; and what was made."""

    steps: list[float]
    end: float
    made: np.ndarray = dataclasses.field(repr=False)


@dataclasses.dataclass(frozen=True)
class Rank:
    """One process of a run."""

    parallelize_s: float
    pictures: list[Picture]
    counts: dict[str, int]


@dataclasses.dataclass(frozen=True)
class Run:
    """All processes of a run; every time is that of the slowest."""

    ranks: list[Rank]

    @property
    def parallelize_s(self) -> float:
        return max(rank.parallelize_s for rank in self.ranks)

    def first(self, decodes: bool) -> float:
        """Seconds of the first step, with all that comes before it, or of the first decode."""
        return max(_decode(rank.pictures[0]) if decodes else rank.pictures[0].steps[0] for rank in self.ranks)

    def later(self, decodes: bool) -> list[float]:
        """Seconds of each later step of any picture, or of each later decode."""
        if decodes:
            return [max(map(_decode, each)) for each in zip(*(rank.pictures[1:] for rank in self.ranks), strict=True)]
        found = [[b - a for one in rank.pictures for a, b in itertools.pairwise(one.steps)] for rank in self.ranks]
        return [max(each) for each in zip(*found, strict=True)]

    def as_json(self, decodes: bool) -> dict[str, Any]:
        """All times and counts."""
        times = {"first_s": self.first(decodes), "later_s": self.later(decodes)}
        return {**times, "counts": [rank.counts for rank in self.ranks]}


def _decode(picture: Picture) -> float:
    return picture.end - picture.steps[-1]


def noting_compiler(folder: pathlib.Path) -> str:
    """Write a script named g++ that notes every run and then does it; the PATH on which it is found first."""
    real = shutil.which("g++")
    if real is None:
        raise click.ClickException("there is no g++ on the PATH, and it is what compiles")
    script = folder / "g++"
    script.write_text(f'#!/bin/sh\n[ -z "${LOG}" ] || echo "$*" >> "${LOG}"\nexec {real} "$@"\n')
    script.chmod(0o700)
    return f"{folder}{os.pathsep}{os.environ['PATH']}"


@contextlib.contextmanager
def counting(log: pathlib.Path) -> Iterator[dict[str, int]]:
    """Count what this process makes meanwhile, by `COUNTED`; g++ where `noting_compiler` is on the PATH."""
    import torch._inductor.graph
    import torch._inductor.standalone_compile
    from torch._dynamo.utils import counters

    import xdit_compile.capture.capture
    import xdit_compile.compiler

    counts, frames = dict.fromkeys(COUNTED, 0), counters["frames"]["total"]
    before = os.environ.get(LOG)

    def counted(name: str, function: Callable[..., Any], number: Callable[..., int] = lambda *_: 1) -> Any:
        @functools.wraps(function)
        def called(*args: Any, **kwargs: Any) -> Any:
            result = function(*args, **kwargs)
            counts[name] += number(result, *args)
            return result

        return called

    def passes(after: Any, state: Any) -> int:
        return len(after.seconds) - len(state.seconds)

    capture, run_passes = xdit_compile.capture.capture.capture, xdit_compile.compiler.run_passes
    inductor, lowering = torch._inductor, torch._inductor.graph.GraphLowering
    artifact = sys.modules["torch._inductor.standalone_compile"].AOTCompiledArtifact
    wanted = [(module, "capture", counted("captures", capture)) for module in _holding(capture)]
    wanted += [(module, "run_passes", counted("passes", run_passes, passes)) for module in _holding(run_passes)]
    wanted += [(inductor, "standalone_compile", counted("graphs to inductor", inductor.standalone_compile))]
    wanted += [(lowering, "codegen", counted("code generated", lowering.codegen))]
    wanted += [(artifact, "deserialize", staticmethod(counted("graphs loaded", artifact.deserialize)))]
    with contextlib.ExitStack() as patches:
        for place, name, made in wanted:
            patches.enter_context(mock.patch.object(place, name, made))
        os.environ[LOG] = str(log)
        try:
            yield counts
        finally:
            os.environ.pop(LOG) if before is None else os.environ.update({LOG: before})
            counts["dynamo frames"] = counters["frames"]["total"] - frames
            counts["g++ runs"] = len(log.read_text().splitlines()) if log.exists() else 0


def _holding(function: Callable[..., Any]) -> list[Any]:
    """The modules of this package that have a function by its name."""
    ours = [module for name, module in list(sys.modules.items()) if name.partition(".")[0] == "xdit_compile"]
    return [module for module in ours if vars(module).get(function.__name__) is function]


def _start(log: str, job: Job) -> Rank:
    """Load, parallelize, make pictures. That the compiler is imported is a part of parallelizing, not of the step."""
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()
    startup = STARTUPS[job.startup]
    plan = Plan(**startup.degrees, backend="inductor", cache=job.cache)
    pipe = diffusers.DiffusionPipeline.from_pretrained(job.model, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    begin = time.perf_counter()
    with counting(pathlib.Path(log)) as counts:
        pipe = parallelize(pipe, plan)
        parallelize_s = time.perf_counter() - begin
        pictures = [_picture(pipe, job.steps, startup.decodes, seed) for seed in range(PICTURES)]
    return Rank(parallelize_s, pictures, counts)


def _picture(pipe: Any, steps: int, decodes: bool, seed: int) -> Picture:
    dist.barrier()
    begin, ends = time.perf_counter(), list[float]()

    def step_done(step: int, _: Any, latents: torch.Tensor) -> None:
        if step == 0:
            float(latents.flatten()[0])  # whatever method: its values are there
        ends.append(time.perf_counter() - begin)

    made = pipe(
        PROMPT, num_inference_steps=steps, generator=torch.Generator().manual_seed(seed), callback=step_done,
        output_type="pt" if decodes else "latent",
    ).images  # fmt: skip
    return Picture(ends, time.perf_counter() - begin, made.numpy())


def run(job: Job) -> Run:
    """Do a job in new processes."""
    return Run(in_new_processes(_start, Plan(**STARTUPS[job.startup].degrees).world_size, job))


@dataclasses.dataclass(frozen=True)
class Found:
    """The runs of one plan."""

    name: str
    cold: Run
    warm: list[Run]
    difference: float

    def figures(self) -> dict[str, float]:
        """Medians: first step or decode with nothing kept and with all, a later one, and how they compare."""
        decodes = STARTUPS[self.name].decodes
        cold, warm = self.cold.first(decodes), statistics.median(run.first(decodes) for run in self.warm)
        later = statistics.median(seconds for run in self.warm for seconds in run.later(decodes))
        parallelize_s = statistics.median(run.parallelize_s for run in self.warm)
        return {
            "cold_s": cold, "warm_s": warm, "later_s": later, "more_s": warm - later, "ratio": warm / cold,
            "parallelize_s": parallelize_s,
        }  # fmt: skip

    def as_json(self) -> dict[str, Any]:
        """All times and counts."""
        decodes, runs = STARTUPS[self.name].decodes, {"cold": [self.cold], "warm": self.warm}
        every = {kind: [each.as_json(decodes) for each in some] for kind, some in runs.items()}
        return {"name": self.name, "difference": self.difference, **self.figures(), **every}


def compared(name: str, cold: Run, warm: list[Run]) -> Found:
    """The runs of a plan, whose pictures are all those of the first.

    Raises:
        SystemExit: a picture is another one, or the counters did not see what the cold run must have done.
    """
    expected = [one.made for one in cold.ranks[0].pictures]
    greatest = 0.0
    for each in (cold, *warm):
        for rank in each.ranks:
            for one, like in zip(rank.pictures, expected, strict=True):
                difference = float(np.abs(one.made - like).max() / np.abs(like).max())
                if not difference <= TOLERANCE:
                    raise SystemExit(f"{name}: a picture is off by {difference:.1e} of its largest value; nothing told")
                greatest = max(greatest, difference)
    for count in NEEDED:
        if not any(rank.counts[count] for rank in cold.ranks):
            raise SystemExit(f"{name}: no {count} were counted with an empty cache, so these are not seen")
    return Found(name, cold, warm, greatest)


@click.command()
@click.option("--plans", type=click.Choice(list(STARTUPS)), multiple=True, help="Some of the plans; all by default.")
@click.option("--repeats", type=click.IntRange(1), default=3, show_default=True, help="Warm runs of each plan.")
@click.option("--steps", type=click.IntRange(2), default=6, show_default=True, help="Of each of the pictures.")
@click.option("--model", default=str(DEMO_PIPELINE), help="Folder of another pipeline.")
@click.option("--json", "json_file", type=click.Path(path_type=pathlib.Path), help="Write everything measured here.")
def main(plans: tuple[str, ...], repeats: int, steps: int, model: str, json_file: pathlib.Path | None) -> None:
    """Compare first steps of new processes, with an empty cache and with a full one."""
    console = Console()
    console = console if console.is_terminal else Console(width=140)
    found = []
    with tempfile.TemporaryDirectory(prefix="benchmark-") as scratch:
        folder = pathlib.Path(scratch)
        os.environ.update({**ENVIRONMENT, "PATH": noting_compiler(folder)})
        for at, name in enumerate(plans or STARTUPS):
            job = Job(name, model, str(folder / f"cache-{at}"), steps)
            cold, *warm = [run(job) for _ in range(1 + repeats)]
            found.append(compared(name, cold, warm))
            console.print(f"{name}: pictures differ by {found[-1].difference:.1e} at most", highlight=False)
    load = os.getloadavg()[0]
    console.print(_measured(found, load))
    console.print(_counted(found))
    if json_file:
        every = [one.as_json() for one in found]
        json_file.write_text(json.dumps({**about(), "load_average": load, "plans": every}, indent=1) + "\n")


def _measured(found: list[Found], load: float) -> Table:
    versions = ", ".join(f"{name} {value}" for name, value in about()["versions"].items())
    title = (
        f"measured: seconds to the first step or decode of new processes, one cold run and medians of "
        f"{len(found[0].warm)} warm ones;\n{versions}; {processor()}, {os.cpu_count()} cores, one thread per process, "
        f"load average {load:.1f}"
    )
    table = Table("plan", "first", title=title, title_justify="left")
    for column in ("cold s", "warm s", "later s", "warm - later s", "warm / cold", "parallelize s", "difference"):
        table.add_column(column, justify="right")
    table.add_column(f"at most {MORE_S:g} s more, 1/{1 / SHARE:g} of cold")
    for one in found:
        figures = one.figures()
        met = [figures["more_s"] <= MORE_S, figures["ratio"] <= SHARE]
        table.add_row(
            one.name,
            "decode" if STARTUPS[one.name].decodes else "step",
            *(f"{figures[name]:.3f}" for name in ("cold_s", "warm_s", "later_s", "more_s", "ratio", "parallelize_s")),
            f"{one.difference:.1e}",
            ", ".join("met" if each else "NOT MET" for each in met),
        )
    return table


def _counted(found: list[Found]) -> Table:
    title = "counted: what each rank made and loaded, pictures and all; of warm runs the most"
    table = Table("plan", "run", title=title, title_justify="left")
    for column in ("rank", *COUNTED):
        table.add_column(column, justify="right")
    for one in found:
        for kind, runs in (("cold", [one.cold]), ("warm", one.warm)):
            for rank in range(len(runs[0].ranks)):
                most = [max(run.ranks[rank].counts[count] for run in runs) for count in COUNTED]
                table.add_row(one.name, kind, str(rank), *map(str, most))
    return table


def about() -> dict[str, Any]:
    """When and with what something was measured."""
    return {
        "date": datetime.date.today().isoformat(),
        "versions": {name: version(name) for name in ("torch", "diffusers")} | {"python": platform.python_version()},
        "machine": {"cores": os.cpu_count(), "processor": processor(), "kind": platform.machine()},
    }


def processor() -> str:
    """What the processor is called."""
    found = re.search(r"^model name\s*:\s*(.+)$", pathlib.Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return found[1] if found else platform.machine()


if __name__ == "__main__":
    main()
