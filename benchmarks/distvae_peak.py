"""Activations that the distvae package holds on one rank, counted while it decodes without its peers."""

from __future__ import annotations

import multiprocessing

import torch
import torch.distributed as dist
from autoencoder import Picture

from xdit_compile.ir.peak_memory import peak_bytes


def distvae_peak(side: int, ranks: int) -> int:
    """Bytes alive at one time on a rank in the middle.

    distvae has no graph to count from, so it computes: in a process of its own, where every transfer is done at once
    and brings what happens to be in memory.
    """
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_count, (side, ranks))


def _count(side: int, ranks: int) -> int:
    from distvae.vae import parallelize_decoder
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.set_num_threads(1)
    dist.init_process_group("fake", store=FakeStore(), rank=ranks // 2, world_size=ranks)
    picture = Picture(side)
    module = picture.build()
    parallelize_decoder(module, None)
    with torch.no_grad():
        return peak_bytes(module.decode, **picture.inputs())
