"""Two processes of one thread each against one: seconds per denoising step, with sequence parallelism of several makes.

Everything runs the same diffusers denoiser with the same weights and inputs. What a contender computes is compared with
the unsplit module before anything is timed; then all contenders take turns, so that what else the machine does falls on
all of them.
"""

from __future__ import annotations

import pathlib

import click
from comparison import compare
from contenders import REFERENCE, Contender, base, contenders
from denoiser import Size
from processes import Setting


@click.command()
@click.option("--backend", type=click.Choice(["inductor", "eager"]), default="inductor", show_default=True)
@click.option("--hidden", default=Size.hidden, show_default=True)
@click.option("--blocks", default=Size.blocks, show_default=True, help="Double and single blocks, half of each.")
@click.option("--tokens", default=Size.tokens, show_default=True, help="Image tokens; a square number.")
@click.option("--text", default=Size.text, show_default=True, help="Text tokens.")
@click.option("--head_dim", default=Size.head_dim, show_default=True)
@click.option("--batch", default=Size.batch, show_default=True)
@click.option("--rounds", default=15, show_default=True, help="Steps of each contender; all take one in each round.")
@click.option("--only", multiple=True, help="Run only contenders whose name contains this (and the base).")
@click.option("--profile", default=0, help="Also print this many rows of a profile of each contender.")
@click.option("--json", "json_file", type=click.Path(path_type=pathlib.Path), help="Write everything measured here.")
def main(
    backend: str,
    hidden: int,
    blocks: int,
    tokens: int,
    text: int,
    head_dim: int,
    batch: int,
    rounds: int,
    only: tuple[str, ...],
    profile: int,
    json_file: pathlib.Path | None,
) -> None:
    """Compare sequence parallelism on two processes with one process, step by step."""
    try:
        setting = Setting(Size(hidden, blocks, tokens, text, head_dim, batch), backend)
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    wanted = [entry for entry in contenders(backend) if _wanted(entry, only, backend)]
    compare(wanted, base(backend), setting, rounds, profile, json_file)


def _wanted(entry: Contender, only: tuple[str, ...], backend: str) -> bool:
    needed = (REFERENCE, base(backend))
    return not only or entry.name in needed or any(part in entry.name for part in only)


if __name__ == "__main__":
    main()
