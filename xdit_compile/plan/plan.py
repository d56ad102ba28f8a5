"""What the user asks for: degrees of each parallelism and the choices that go with them."""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Mapping
from typing import Any

from xdit_compile.errors import PlanError, WrongTypeError

from . import backend_options as options_of
from .backend_options import GRAPHS, Options
from .methods import DIMENSIONS, MESH_ORDER, METHODS, Degrees, dimensions
from .nearest import unknown

BACKENDS = ("auto", "inductor", "nexfort", "eager", "aot_eager")
COMPILE_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
GRAPH_MODES = ("reduce-overhead", "max-autotune")
"""Those that record CUDA graphs. On a processor, which has none, ``max-autotune`` is the one without."""
ATTENTIONS = (
    "auto",
    "sdpa",
    "sdpa_math",
    "sdpa_flash",
    "sdpa_efficient",
    "sdpa_cudnn",
    "flash_attn",
    "flash_attn_3",
    "flash_attn_4",
    "sage",
    "yunchang",
    "chunked",
)
INEXACT_ATTENTIONS = ("sage",)
"""Those that round beyond the dtype of their operands. ``auto`` takes none of them."""
FALLBACKS = ("gather", "error", "unsplit")
SPLIT_SCHEMES = ("all", "heads", "ffn")
VAES = ("whole", "patch", "distvae")
COMPILES = ("now", "background")
OPTIONAL_PASSES = (
    "hoist_linears",
    "spread_norms",
    "late_biases",
    "join_edges",
    "fold_activations",
    "split_concatenations",
    "norm_rope",
    "pack_heads",
    "join_linears",
    "join_norms",
    "hide_exchanges",
)
"""Passes that change how fast something runs, and can be left out."""
_CHOICES = (
    ("compile", COMPILES),
    ("backend", BACKENDS),
    ("compile_mode", COMPILE_MODES),
    ("attention", ATTENTIONS),
    ("fallback", FALLBACKS),
    ("split_scheme", SPLIT_SCHEMES),
    ("vae", VAES),
)


@dataclasses.dataclass(frozen=True)
class Plan(Degrees):
    """How a pipeline is spread over devices.

    Args:
        patches: parts of the tokens that flow through the stages of ``pipefusion``; as many as stages by default. With
            several, one stage works too. Ranks of a stage share every patch by ``ulysses``, ``ring`` and ``tensor``,
            pipelines the branches by ``cfg``.
        warmup_steps: first steps of a generation that compute all tokens at once, with nothing from a step before.
        stage_layers: how many blocks each stage has; the even share of their cost by default.
        split_scheme: what ``tensor`` splits: ``heads``, ``ffn`` or ``all``.
        vae: ``patch`` splits the rows that the autoencoder decodes and encodes over ranks, ``whole`` does all on each;
            ``distvae`` has the package of that name do it, for the classes that it knows.
        vae_degree: how many ranks share these rows; all but the data ranks by default.
        vae_memory: bytes that the autoencoder may take beside weights on one rank, as a number or with a unit
            (``"2GiB"``): convolutions run in as many strips as that takes. Works on one rank, too.
        keep_weights: keep the whole weights on every rank, where ``tensor`` would let it hold its slices alone.
        mesh_order: the degrees from the farthest ranks to the nearest; those that talk most stand last.
        backend: what runs the rewritten graphs: ``inductor``, ``nexfort`` or ``eager``; ``auto`` takes ``inductor``
            where it can be used and ``eager`` elsewhere. ``aot_eager`` runs inductor's decompositions without the code
            that it generates, to find which of the two makes a result differ.
        compile_mode: that of ``torch.compile`` for ``inductor``; ``max-autotune-no-cudagraphs`` times several kernels
            for each matrix product and takes the fastest, which compiles for longer. ``reduce-overhead`` records all
            that one rank runs as one CUDA graph and replays it, on one rank alone; results are copies, which later
            calls leave as they are. ``max-autotune`` is both.
        backend_options: settings for the backend as they are, by name: of ``torch._inductor.config``
            (``{"max_autotune": True, "triton.cudagraphs": False}``, or nested), or what onediff hands to ``nexfort``.
        attention: which kernel computes attention; ``auto`` takes the best exact one that is available. ``chunked``
            needs memory linear in the tokens on any device, and takes every mask and dtype. ``sage`` is not exact: the
            first call is compared with exact attention in its place, then with it, and how far it moves the result is
            told in a warning. Autoencoders have exact attention then.
        fallback: ``gather`` runs what cannot be split on gathered tensors and reports it, ``error`` refuses it;
            ``unsplit`` gathers, and runs a denoiser that cannot be captured, as one that keeps state from step to step,
            whole on every rank with a warning.
        verify: compare the first call of every new graph, and one later call of the first generation, with the
            unsplit module; a smaller call of it where a rank has no memory for that.
        max_programs: graphs, one for each size and kind of call, that a module keeps compiled; the one that was not
            used for the longest time is dropped first.
        timeout_s: seconds for which a rank may give no sign of life, or let the others wait while it does nothing of
            ours, before all ranks end. One that loads, captures or compiles takes as long as it takes, while it runs.
        compile: ``background`` runs calls of a new size op by op at once, while another process compiles; all ranks go
            on with what was compiled from the same step on. It takes a cache.
        link: what connects a rank with the others of ``ulysses``, one way, as ``"450GB/s"`` or ``"25GB/s"``: values
            leave before queries and keys are computed, and results return in halves, wherever that is worth more
            all-to-alls over such a link. Nothing is hidden without it.
        without: names of passes to leave out: ``join_linears`` makes one product of linears that read the same value.
        cache: the folder in which compiled graphs are kept for later processes; ``auto`` takes the one that the
            environment variable ``XDIT_COMPILE_CACHE`` names, or the user's cache folder, and None keeps nothing.
    """

    patches: int | None = None
    warmup_steps: int = 1
    stage_layers: tuple[int, ...] | None = None
    split_scheme: str = "all"
    vae: str = "whole"
    vae_degree: int | None = None
    vae_memory: str | int | None = None
    keep_weights: bool = False
    mesh_order: tuple[str, ...] = MESH_ORDER
    backend: str = "auto"
    compile_mode: str = "default"
    backend_options: Mapping[str, Any] | Options = ()
    attention: str = "auto"
    fallback: str = "gather"
    verify: bool = True
    max_programs: int = 32
    timeout_s: float = 300.0
    compile: str = "now"
    link: str | None = None
    without: tuple[str, ...] = ()
    cache: str | os.PathLike[str] | None = dataclasses.field(default="auto", compare=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "backend_options", options_of.settled(self.backend_options))

    @property
    def options(self) -> dict[str, Any]:
        """``backend_options`` by their full names."""
        return dict(self.backend_options)

    @property
    def records_graphs(self) -> bool:
        """Whether CUDA graphs are asked for, by the mode or by its setting."""
        return bool(self.options.get(GRAPHS, self.compile_mode in GRAPH_MODES))

    @property
    def compiled_how(self) -> str:
        """The mode, and the options beside it: code of the same backend that was made in another way differs."""
        return " ".join([self.compile_mode, *(f"{name}={value}" for name, value in self.options.items())])

    @property
    def sequence(self) -> int:
        """Ranks that share the tokens."""
        return self.ulysses * self.ring

    @property
    def patch_count(self) -> int:
        """Parts of the tokens that flow through the stages one after the other."""
        return self.patches or self.pipefusion

    @property
    def is_stale(self) -> bool:
        """Whether steps take anything from the step before."""
        return self.patch_count > 1 or any(method.stale and self.degree(method) > 1 for method in METHODS)

    @property
    def alternates(self) -> bool:
        """Whether ranks may answer calls of several requests in turns: they keep nothing of one between two calls."""
        return not self.is_stale and self.cfg == 1

    @property
    def replica(self) -> int:
        """Ranks that share one part of the batch."""
        return self.world_size // self.data

    @property
    def rows(self) -> Plan:
        """The plan by which the autoencoder is split: its batch by data, its rows and the tokens of its attention by
        ring."""
        degrees: dict[str, Any] = {method.name: 1 for method in METHODS if method.name != "data"}
        degrees["ring"] = (self.vae_degree or self.replica) if self.vae != "whole" else 1
        degrees["attention"] = "auto" if self.attention in INEXACT_ATTENTIONS else self.attention
        return dataclasses.replace(self, patches=None, stage_layers=None, **degrees)

    @property
    def vae_bytes(self) -> int | None:
        """``vae_memory`` as a number; None where it is none."""
        if isinstance(self.vae_memory, int):
            return self.vae_memory if self.vae_memory > 0 and self.vae_memory is not True else None
        return bytes_in(self.vae_memory or "")

    @property
    def hiding_link(self) -> float | None:
        """Bytes per second of ``link``, by which exchanges are hidden; None where they are not."""
        return bytes_per_second(self.link) if self.link is not None and "hide_exchanges" not in self.without else None

    @property
    def dimensions(self) -> tuple[str, ...]:
        """The dimensions of the mesh, from outer to inner: one for each method."""
        return dimensions(self.mesh_order)

    @property
    def used(self) -> list[str]:
        """The names of the degrees above 1, from outer to inner."""
        return [name for name in self.dimensions if getattr(self, name) > 1]

    @property
    def world_size(self) -> int:
        """Ranks that the plan needs in all."""
        return math.prod(self.degree(method) for method in METHODS)

    def problems(self, world_size: int | None = None) -> list[str]:
        """Every reason why this plan cannot run, each as one clause that says what to change."""
        problems = []
        for name in DIMENSIONS:
            if not _is_count(getattr(self, name), 1):
                problems.append(f"{name}={getattr(self, name)!r} must be a whole number of at least 1")
        for name, allowed in _CHOICES:
            if getattr(self, name) not in allowed:
                problems.append(unknown(f"{name}={getattr(self, name)!r}", getattr(self, name), allowed))
        if sorted(self.mesh_order) != sorted(MESH_ORDER):
            problems.append(f"mesh_order={self.mesh_order!r} must name each of {', '.join(MESH_ORDER)} once")
        for name in ("verify", "keep_weights"):
            if not isinstance(getattr(self, name), bool):
                problems.append(f"{name}={getattr(self, name)!r} must be True or False")
        if not _is_count(self.max_programs, 1):
            problems.append(f"max_programs={self.max_programs!r} must be a whole number of at least 1")
        if not isinstance(self.without, tuple):
            problems.append(f"without={self.without!r} must be a tuple of some of {', '.join(OPTIONAL_PASSES)}")
        elif strange := [name for name in self.without if name not in OPTIONAL_PASSES]:
            problems.append(unknown(f"without={(strange[0],)!r}", strange[0], OPTIONAL_PASSES))
        if self.link is not None and not bytes_per_second(self.link):
            problems.append(f"link={self.link!r} must be bytes per second of one rank, such as '450GB/s' or '25GB/s'")
        if self.cache is not None and not isinstance(self.cache, str | os.PathLike):
            problems.append(f"cache={self.cache!r} must be a folder, 'auto' or None")
        if not isinstance(self.timeout_s, int | float) or not math.isfinite(self.timeout_s) or self.timeout_s <= 0:
            problems.append(f"timeout_s={self.timeout_s!r} must be a positive number of seconds")
        if not problems and self.compile_mode != "default" and self.backend not in ("auto", "inductor"):
            problems.append(
                f"compile_mode={self.compile_mode!r} is inductor's, and backend={self.backend!r}; change one"
            )
        problems += options_of.problems(self.backend_options, self.backend)
        if not problems:
            problems += self._graph_problems()
        if not problems and self.link is not None and self.backend == "nexfort":
            problems.append(
                f"link={self.link!r} begins exchanges early, and backend='nexfort' is not known to keep them in order; "
                "leave one out"
            )
        if not problems and self.compile == "background" and self.cache is None:
            problems.append(
                "compile='background' hands graphs over by way of the cache, and cache=None keeps none; change one"
            )
        if not problems:
            problems += self._patch_problems() + self._vae_problems()
        if not problems and world_size is not None and self.world_size != world_size:
            degrees, needed = self.degrees_shown(), self.world_size
            running = "1 is" if world_size == 1 else f"{world_size} are"
            problems.append(
                f"{degrees} needs {needed} process{'es' if needed > 1 else ''} but {running} running; "
                f"start {needed} (--nproc {needed}, or torchrun --nproc_per_node {needed}) or change the degrees"
            )
        return problems

    def degrees_shown(self) -> str:
        """The degrees worth naming, each with its name."""
        return " x ".join(f"{name}={getattr(self, name)}" for name in self._shown())

    def _graph_problems(self) -> list[str]:
        """Reasons against CUDA graphs: what others send, and what a step leaves for the next, is in no recording."""
        if not self.records_graphs or self.backend == "nexfort" or (self.world_size == 1 and not self.is_stale):
            return []
        why = f"{self.world_size} ranks send to one another" if self.world_size > 1 else "patches are kept over steps"
        if self.compile_mode not in GRAPH_MODES:
            return [f"{GRAPHS}=True records what one rank computes alone, and {why}; leave it out"]
        other = "max-autotune-no-cudagraphs" if self.compile_mode == "max-autotune" else "default"
        return [
            f"compile_mode={self.compile_mode!r} records what one rank computes alone, and {why}; "
            f"take compile_mode={other!r}"
        ]

    def _patch_problems(self) -> list[str]:
        problems = []
        if self.patches is not None and not _is_count(self.patches, 1):
            problems.append(f"patches={self.patches!r} must be a whole number of at least 1")
        if not _is_count(self.warmup_steps, 1):
            problems.append(f"warmup_steps={self.warmup_steps!r} must be at least 1: the first step has none before it")
        layers = self.stage_layers
        if layers is not None and not (isinstance(layers, tuple) and all(_is_count(each, 1) for each in layers)):
            problems.append(f"stage_layers={layers!r} must be whole numbers of at least 1, one for each stage")
        elif layers is not None and len(layers) != self.pipefusion:
            problems.append(
                f"stage_layers={layers!r} must have one number for each stage, and pipefusion={self.pipefusion} makes "
                f"{self.pipefusion}"
            )
        return problems or self._rivals()

    def _rivals(self) -> list[str]:
        """Methods that share the tokens in place of one another."""
        for method in METHODS:
            if method.instead_of and self.degree(method) > 1:
                others = [f"{name}={getattr(self, name)}" for name in method.instead_of if getattr(self, name) > 1]
                others += [f"patches={self.patches}"] if self.patch_count > self.pipefusion else []
                if others:
                    mine = f"{method.name}={self.degree(method)}"
                    return [f"{mine} shares the tokens, as {' and '.join(others)} would; take one of them"]
        return []

    def _vae_problems(self) -> list[str]:
        degree = self.vae_degree
        if degree is not None and self.vae == "whole" or self.vae_memory is not None and self.vae != "patch":
            name = "vae_degree" if self.vae_memory is None else "vae_memory"
            return [f"{name}={getattr(self, name)!r} has no use with vae={self.vae!r}; set vae='patch'"]
        if self.vae_memory is not None and not self.vae_bytes:
            return [f"vae_memory={self.vae_memory!r} must be a number of bytes, or such as '2GiB' or '800MB'"]
        if degree is None:
            return []
        if not _is_count(degree, 1):
            return [f"vae_degree={degree!r} must be a whole number of at least 1"]
        if self.replica % degree:
            ranks = "1 rank that has all rows" if self.replica == 1 else f"{self.replica} ranks that share the rows"
            return [f"vae_degree={degree} must divide the {ranks}; change it, or leave it out for all of them"]
        return []

    def _shown(self) -> list[str]:
        """The degrees worth naming: those above 1, and the two of sequence parallelism where none is."""
        return self.used or ["ulysses", "ring"]

    def check(self, world_size: int | None = None) -> Plan:
        """Return the plan itself.

        Raises:
            PlanError: naming every problem at once.
        """
        problems = self.problems(world_size)
        if problems:
            raise PlanError("; ".join(problems))
        return self


def as_plan(plan: Any) -> Plan:
    """A plan that was given, checked; one rank's where there is none.

    Raises:
        WrongTypeError: something else was given.
        PlanError: with every problem of the plan.
    """
    if plan is None:
        plan = Plan()
    if not isinstance(plan, Plan):
        what = f"the class {plan.__name__}" if isinstance(plan, type) else f"{plan!r} of type {type(plan).__name__}"
        raise WrongTypeError(f"a plan is a Plan, such as Plan(ulysses=2), not {what}; xdit_compile.Plan makes one")
    return plan.check()


def bytes_in(text: str) -> int | None:
    """A number of bytes, or such as ``2GiB`` or ``800MB``; None where it is none."""
    number = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?\s*", text, re.IGNORECASE)
    if number is None:
        return None
    power = " KMGT".find(number[2].upper() or " ")
    return int(float(number[1]) * (1024 if number[3] else 1000) ** power)


def bytes_per_second(text: object) -> float | None:
    """A number of bytes per second such as ``450GB/s``; None where it is none, or not above zero."""
    number = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT]?)(i?)B/s", text) if isinstance(text, str) else None
    if number is None or (number[3] and not number[2]):
        return None
    return float(number[1]) * (1024 if number[3] else 1000) ** " KMGT".find(number[2] or " ") or None


def _is_count(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least
