"""What PyTorch's watchdog of NCCL may do to this process when a transfer fails."""

from __future__ import annotations

from contextlib import AbstractContextManager

from .environment import defaults

LENIENT = {
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "2",
    "TORCH_NCCL_RETHROW_CUDA_ERRORS": "0",
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "0",
    "TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC": "250",
}


def lenient() -> AbstractContextManager[None]:
    """Process groups that are made inside end their communicators where a transfer fails, and not the process.

    Each group reads these variables when it is made; what the user has set stays.

    - ``ASYNC_ERROR_HANDLING``: 3, the default, ends the process with SIGABRT when a transfer took longer than the
      group's limit or NCCL reports an error, so that no rank can say what happened, and none goes on. With 2 the
      watchdog aborts the communicators, which frees whoever waits for the device; what was computed is then refused, as
      the group says of itself that it failed. With 0 nothing would end a wait of a rank whose other threads hang.
    - ``RETHROW_CUDA_ERRORS``: 1 ends the process as soon as the watchdog meets an error of the device, before the main
      thread does, which can say what it was.
    - ``DUMP_ON_TIMEOUT`` and ``WAIT_TIMEOUT_DUMP_MILSEC``: the watchdog has all processes write their flight records,
      waits a minute for that, and the monitor of the default group ends each of them minutes later.

    ``BLOCKING_WAIT`` stays off: the host would wait for every transfer. ``ENABLE_MONITORING`` stays on: it ends a
    process whose watchdog itself hangs, as nothing else can.
    """
    return defaults(LENIENT)
