"""What a request takes on one rank, counted in a process that computes nothing."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from xdit_compile.cli.options.request import Request
from xdit_compile.cli.running.pipeline_call import weights_dtype
from xdit_compile.cli.running.room import counted, need
from xdit_compile.distributed.devices import accelerator


def need_of(request: Request) -> dict[str, Any]:
    """Bytes by what takes them, as `cli.running.room.Need` has them: ``total``, and ``words`` that say the parts.

    Raises:
        XditCompileError: it cannot be counted.
    """
    device = torch.device("cpu") if request.device == "cpu" else accelerator() or torch.device("cpu")
    needed = need(counted(request, weights_dtype(request)), request, device)
    return {**dataclasses.asdict(needed), "total": needed.total, "words": str(needed)}
