"""Two processes of one thread each that share the branches of guidance, against one: seconds per denoising step.

A step is both branches and their combination, either stacked in one batch (``stacked``) or by one call for each
(``two calls``), as pipelines do it; each kind is compared with one process that does the same.
"""

from __future__ import annotations

import pathlib

import click
from comparison import compare
from contenders import guidance
from denoiser import Size
from processes import Setting


@click.command()
@click.option("--backend", type=click.Choice(["inductor", "eager"]), default="inductor", show_default=True)
@click.option("--hidden", default=Size.hidden, show_default=True)
@click.option("--blocks", default=Size.blocks, show_default=True, help="Double and single blocks, half of each.")
@click.option("--tokens", default=Size.tokens, show_default=True, help="Image tokens; a square number.")
@click.option("--rounds", default=15, show_default=True, help="Steps of each contender; all take one in each round.")
@click.option("--json", "json_file", type=click.Path(path_type=pathlib.Path), help="Write everything measured here.")
def main(backend: str, hidden: int, blocks: int, tokens: int, rounds: int, json_file: pathlib.Path | None) -> None:
    """Compare guidance over two processes with one process, step by step."""
    try:
        setting = Setting(Size(hidden, blocks, tokens, batch=2), backend, suite="guidance")
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    wanted = guidance(backend)
    compare(wanted, wanted[1].name, setting, rounds, json_file=json_file)


if __name__ == "__main__":
    main()
