"""Cards that code is generated for: what is asked of a card, and the two figures that bound what it does."""

from __future__ import annotations

import dataclasses
import importlib.util

from xdit_compile.errors import UsageError


@dataclasses.dataclass(frozen=True)
class Card:
    """What is asked of a card, by the names that ``torch.cuda.get_device_properties`` has for it, and its peaks.

    Args:
        flops: of dense products of bfloat16 in a second, as its maker says.
        bandwidth: bytes of its memory in a second, as its maker says.
    """

    name: str
    major: int
    minor: int
    multi_processor_count: int
    shared_memory_per_block_optin: int
    flops: float
    bandwidth: float
    regs_per_multiprocessor: int = 2**16
    max_threads_per_multi_processor: int = 2048
    max_threads_per_block: int = 1024
    warp_size: int = 32
    gcnArchName: str = ""

    @property
    def target(self) -> str:
        """The architecture that is compiled for."""
        return f"sm_{self.major}{self.minor}"

    def seconds(self, flops: float, moved: float) -> float:
        """That one kernel takes at best, bound by its arithmetic or by the bytes that it moves."""
        return max(flops / self.flops, moved / self.bandwidth)


CARDS = {
    card.target: card
    for card in (
        Card("NVIDIA A100-SXM4-80GB", 8, 0, 108, 163 * 2**10, 312e12, 2.039e12),
        Card("NVIDIA L40S", 8, 9, 142, 99 * 2**10, 362.05e12, 0.864e12, max_threads_per_multi_processor=1536),
        Card("NVIDIA H100 80GB HBM3", 9, 0, 132, 227 * 2**10, 989e12, 3.35e12),
        Card("NVIDIA B200", 10, 0, 148, 227 * 2**10, 2250e12, 8e12),
        Card(
            "NVIDIA GeForce RTX 5090", 12, 0, 170, 99 * 2**10, 209.5e12, 1.792e12, max_threads_per_multi_processor=1536
        ),
    )
}
"""By target."""


def card_for(target: str) -> Card:
    """The card of a target, where code can be compiled for it here.

    Raises:
        UsageError: there is no such card, no Triton, or a torch that compiles for other makers' cards.
    """
    if target not in CARDS:
        raise UsageError(f"target={target!r} is unknown; choose one of {', '.join(CARDS)}")
    if importlib.util.find_spec("triton") is None:
        raise UsageError(f"target={target!r} needs Triton to compile for a card; install the triton package")
    import torch

    if torch.version.hip is not None:
        raise UsageError(f"target={target!r} needs a torch for CUDA or for CPUs; this one is for AMD's cards")
    return CARDS[target]
