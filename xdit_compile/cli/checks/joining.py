"""One of the processes that join a group for `running.processes`: ``python -m`` under torchrun."""

from __future__ import annotations

import datetime
import sys
import time

import torch
import torch.distributed as dist

from xdit_compile.distributed.devices import CPU, backend_for, local_device

LIMIT = datetime.timedelta(seconds=60)


def main() -> None:
    """Join, add up a number on every device that ranks would use, and have rank 0 say by what it was sent.

    Raises:
        RuntimeError: the group cannot be made, or the sum is another.
    """
    cards = torch.accelerator.device_count() if torch.accelerator.is_available() else 0
    begun = time.perf_counter()
    device = local_device() if cards > 1 else CPU
    backend = backend_for(device)
    dist.init_process_group(backend, timeout=LIMIT)
    ranks = dist.get_world_size()
    for each in dict.fromkeys((CPU, device)):
        total = torch.ones(4, device=each)
        dist.all_reduce(total)
        if total.tolist() != [float(ranks)] * 4:
            raise RuntimeError(f"the sum of {ranks} ones on {each} is {total.tolist()}")
    if dist.get_rank() == 0:
        # one write: what ranks print in pieces is mixed
        sys.stdout.write(f"joined over {backend} and added up a number, in {time.perf_counter() - begun:.1f} s\n")
        sys.stdout.flush()
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
