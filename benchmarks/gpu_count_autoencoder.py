"""What a card would run to decode a picture whose rows ranks share, counted without a card as `gpu_count.py` does.

The autoencoder is Stable Diffusion's architecture in bfloat16, on the meta device. Counted is rank 0, or another: ranks
inside have neighbours on both sides.
"""

from __future__ import annotations

import click
import torch
from autoencoder import CONFIG, SCALE
from diffusers import AutoencoderKL
from rich.console import Console
from rich.table import Table

from xdit_compile import Plan
from xdit_compile.backends.target.cards import CARDS, Card
from xdit_compile.backends.target.pretend_card import pretend_card
from xdit_compile.capture.capture import capture
from xdit_compile.compiler import Analysis
from xdit_compile.distributed.mesh import Mesh
from xdit_compile.passes.axes.infer import Inference, infer
from xdit_compile.passes.choose.rows import choose_rows
from xdit_compile.passes.rules.registry import rulebook
from xdit_compile.plan.plan import OPTIONAL_PASSES
from xdit_compile.reports.counted_report import on_paper
from xdit_compile.reports.counting.count import counted
from xdit_compile.reports.counting.counts import Total
from xdit_compile.reports.counting.table import COUNTED


def decoding(side: int) -> Inference:
    """One call of ``decode`` for a picture of ``side`` pixels, typed."""
    with torch.device("meta"):
        model = AutoencoderKL(**CONFIG).eval()
        latent = torch.empty(1, CONFIG["latent_channels"], side // SCALE, side // SCALE, dtype=torch.bfloat16)
    torch.nn.Module.to(model, torch.bfloat16)
    program = capture(model, (latent,), {"return_dict": False}, forward=model.decode)
    return infer(program, rulebook())


def count(inference: Inference, ranks: int, without: tuple[str, ...], card: Card, rank: int = 0) -> Total:
    """All calls of one rank."""
    plan = Plan(ring=ranks, without=without)
    analysis = Analysis(inference.program, inference, choose_rows(inference, plan))
    program = on_paper(analysis, plan, Mesh.simulated(plan, rank)).programs["call"]
    with pretend_card(card) as binaries:
        return Total.of(counted(program, binaries, card))


@click.command()
@click.option("--ranks", type=click.IntRange(1), multiple=True, default=(1, 2, 8), show_default=True)
@click.option("--rank", type=click.IntRange(0), default=0, show_default=True, help="Which one is counted.")
@click.option("--without", type=click.Choice(OPTIONAL_PASSES), multiple=True, help="Not in what is fused.")
@click.option("--side", type=click.IntRange(64), default=1024, show_default=True, help="Pixels of one side.")
@click.option("--target", type=click.Choice(list(CARDS)), default="sm_90", show_default=True)
def main(ranks: tuple[int, ...], rank: int, without: tuple[str, ...], side: int, target: str) -> None:
    """Count without the passes that a plan can leave out, and with them. Nothing is timed."""
    if rank >= min(ranks):
        raise click.BadParameter(f"there is no rank {rank} of {min(ranks)}", param_hint="--rank")
    inference, card = decoding(side), CARDS[target]
    title = f"decoding {side} x {side} pixels, rank {rank}, {target}: {COUNTED}"
    table = Table("ranks", title=title, title_justify="left")
    for column in ("launches, apart", "fused", "MB, apart", "fused", "fused / apart", "roofline us, apart", "fused"):
        table.add_column(column, justify="right")
    for number in ranks:
        apart, fused = (count(inference, number, left_out, card, rank) for left_out in (OPTIONAL_PASSES, without))
        moved = f"{apart.moved / 1e6:,.0f}", f"{fused.moved / 1e6:,.0f}", f"{fused.moved / apart.moved:.3f}"
        times = f"{apart.seconds * 1e6:,.0f}", f"{fused.seconds * 1e6:,.0f}"
        table.add_row(str(number), str(apart.launches), str(fused.launches), *moved, *times)
    Console(width=130).print(table)


if __name__ == "__main__":
    main()
