"""The methods: every way to use several ranks, each described once, where it gives `Plan` its degree."""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Iterable
from typing import Any

PATCH = "patch"
"""Parts of the tokens whose keys and values stay from call to call: they follow one another in time on one rank, or lie
on ranks that do not wait for one another."""
SEQUENCE = "sequence"
BATCH = "cfg"
DATA = "data"
"""The batch where only ``data`` ranks share it, as it has too few entries for the branches of guidance too."""
TENSOR = "tensor"
GATHERED = "gathered"
"""Tokens of queries, where every rank has the keys of all."""
SPLITS = (PATCH, SEQUENCE, GATHERED, BATCH, DATA, TENSOR)
"""What a program may be split by, in the order in which it is."""


@dataclasses.dataclass(frozen=True)
class Method:
    """One way to use several ranks: a degree of the plan, and a dimension of the mesh.

    Args:
        name: of the degree and the dimension.
        title: how tables call it.
        paper: where it was published, as a number of arXiv; None where there is no paper.
        flag: of the command line, as xDiT spells it.
        flag_degree: the degree that the flag stands for where it takes no number.
        help: what its ranks do, in a clause.
        nearness: its place in the default order of the mesh: the more its ranks talk, the higher; None for one that
            stands where the last of ``instead_of`` does, as it is never used with that.
        splits: the names of `SPLITS` under which a program is split over its ranks; empty where it splits no program.
        team: whether its ranks compute one call of a denoiser together, in place of sharing a batch or branches.
        stale: whether calls take something from the step before.
        instead_of: methods that share the same thing, so that only one of them can be used.
        what, sends, exact: what is split, what ranks send one another, and whether results stay the same.
        suits, costs, most: when to take it, at what price, and how many ranks are of use.
    """

    name: str
    title: str
    paper: str | None
    flag: str
    help: str
    nearness: int | None
    splits: tuple[str, ...]
    what: str
    sends: str
    exact: str
    suits: str
    costs: str
    most: str
    team: bool = True
    stale: bool = False
    flag_degree: int | None = None
    instead_of: tuple[str, ...] = ()

    @property
    def row(self) -> tuple[str, ...]:
        """The method as a row of the README's table, in Markdown: method, flag, what is split, communication, exact."""
        paper = f" ([{self.paper}](https://arxiv.org/abs/{self.paper}))" if self.paper else ""
        return f"{self.title}{paper}", f"`--{self.flag}`", self.what, self.sends, self.exact

    @property
    def advice(self) -> tuple[str, ...]:
        """The method as a row of the table in docs/plans.md: degree, helps with, costs, ranks at most."""
        return f"`{self.name}`", self.suits, self.costs, self.most


def _cited(paper: str | None) -> str:
    return f" (arXiv:{paper})" if paper else ""


def _degree(**facts: Any) -> Any:
    """A degree of the plan, 1 by default, with what there is to know of its method."""
    return dataclasses.field(default=1, metadata=facts)


@dataclasses.dataclass(frozen=True)
class Degrees:
    """How many ranks each method has: one field for each, which describes it."""

    ulysses: int = _degree(
        title="Ulysses",
        paper="2309.14509",
        flag="ulysses_degree",
        help="ranks that exchange tokens for heads around each attention",
        nearness=5,
        splits=(SEQUENCE,),
        what="tokens; heads inside attention",
        sends="two all-to-alls per self-attention",
        exact="yes",
        suits="long sequences",
        costs="two all-to-alls per self-attention",
        most="best where it divides the heads",
    )
    ring: int = _degree(
        title="Ring attention",
        paper="2310.01889",
        flag="ring_degree",
        help="ranks around which keys and values travel; with ulysses that is USP, arXiv:2405.07719",
        nearness=4,
        splits=(SEQUENCE,),
        what="tokens; keys and values travel",
        sends="point to point",
        exact="yes",
        suits="long sequences, few heads",
        costs="keys and values travel, behind the computation",
        most="tokens",
    )
    cfg: int = _degree(
        title="guidance (CFG)",
        paper=None,
        flag="use_cfg_parallel",
        flag_degree=2,
        help="ranks that share the branches of classifier-free guidance",
        nearness=1,
        splits=(BATCH,),
        team=False,
        what="stacked branches, or the calls of separate branches",
        sends="one all-gather of the result",
        exact="yes",
        suits="guidance, nearly twice as fast",
        costs="one all-gather of the result a step",
        most="branches of guidance (2 or 3)",
    )
    data: int = _degree(
        title="data",
        paper=None,
        flag="data_parallel_degree",
        help="ranks that share the batch of every call, which is the images of a request",
        nearness=0,
        splits=(BATCH, DATA),
        team=False,
        what="the batch: images of one call",
        sends="one all-gather of the result",
        exact="yes",
        suits="many images",
        costs="one all-gather of the result a step; every rank runs the rest for all images",
        most="images of a call",
    )
    tensor: int = _degree(
        title="tensor",
        paper="1909.08053",
        flag="tensor_parallel_degree",
        help="ranks that share heads and feed-forward channels, and with them the weights",
        nearness=6,
        splits=(TENSOR,),
        what="heads, feed-forward and convolution channels, and their weights",
        sends="one all-reduce a projection",
        exact="yes",
        suits="weights that do not fit",
        costs="one all-reduce a projection of every block",
        most="heads and feed-forward channels",
    )
    pipefusion: int = _degree(
        title="PipeFusion",
        paper="2405.14430",
        flag="pipefusion_parallel_degree",
        help="stages of a pipeline of blocks, through which parts of the tokens flow, with keys and values of the "
        "others from the step before",
        nearness=2,
        splits=(),
        stale=True,
        what="blocks over stages; patches of the tokens over time",
        sends="hidden states from stage to stage",
        exact="after warm-up others' keys and values are a step old",
        suits="slow links, weights that do not fit",
        costs="pictures differ a little; hidden states from stage to stage",
        most="blocks",
    )
    distrifusion: int = _degree(
        title="DistriFusion",
        paper="2402.19481",
        flag="distrifusion_parallel_degree",
        help="ranks that share the tokens and take keys, values and rows of one another from the step before, so that "
        "nobody waits",
        nearness=3,
        splits=(PATCH,),
        stale=True,
        instead_of=("pipefusion", "ring", "ulysses"),
        what="tokens; rows of U-Nets",
        sends="keys, values and rows, behind a whole step",
        exact="the same",
        suits="U-Nets, links too slow for `ulysses`",
        costs="pictures differ a little; every rank has all weights, and keys and values of all tokens",
        most="tokens, rows",
    )

    allgather: int = _degree(
        title="all-gather of keys",
        paper="2407.21783",
        flag="allgather_degree",
        help="ranks that share the tokens and gather keys and values of all of them before each attention",
        nearness=None,
        splits=(GATHERED,),
        instead_of=("distrifusion", "pipefusion", "ulysses", "ring"),
        what="tokens; keys and values are gathered",
        sends="one all-gather of keys and one of values per self-attention",
        exact="yes",
        suits="few key heads, fast links",
        costs="keys and values of all tokens on every rank",
        most="tokens",
    )

    def __init_subclass__(cls) -> None:
        """Put what a field of this class is into the text of what has it."""
        said = (
            f"{field.name}: {field.metadata['help']}{_cited(field.metadata['paper'])}."
            for field in dataclasses.fields(Degrees)
        )
        wrapped = ("\n".join(textwrap.wrap(line, 112, subsequent_indent=" " * 4)) for line in said)
        arguments = textwrap.indent("\n".join(wrapped), " " * 8)
        cls.__doc__ = (cls.__doc__ or "").replace("Args:\n", f"Args:\n{arguments}\n", 1)

    def degree(self, method: Method) -> int:
        """How many ranks a method has."""
        degree: int = getattr(self, method.name)
        return degree


METHODS = tuple(Method(name=field.name, **field.metadata) for field in dataclasses.fields(Degrees))
"""All methods, in the order of the fields of `Degrees`."""


def _in_order() -> list[str]:
    placed = [method for method in METHODS if method.nearness is not None]
    return [method.name for method in sorted(placed, key=lambda method: method.nearness or 0)]


def dimensions(order: Iterable[str]) -> tuple[str, ...]:
    """The dimensions of the mesh, outer to inner, for an order of those methods that have a place of their own."""
    guests = [method for method in METHODS if method.nearness is None]
    return tuple(
        name for each in order for name in (each, *(guest.name for guest in guests if guest.instead_of[-1] == each))
    )


MESH_ORDER = tuple(_in_order())
"""Methods with a place of their own, from those whose ranks may be far apart to those whose ranks should be near."""
DIMENSIONS = dimensions(MESH_ORDER)
_BY_NAME = {method.name: method for method in METHODS}
MEMBERS = {split: tuple(name for name in DIMENSIONS if split in _BY_NAME[name].splits) for split in SPLITS}
"""The dimensions of the mesh behind each name that a program is split by."""
TEAM = tuple(name for name in DIMENSIONS if _BY_NAME[name].team)
"""Ranks that compute one call of a denoiser together, whatever the batch."""
