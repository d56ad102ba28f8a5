"""What launchers say of a rank, and a user's script under each of them that is here."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from xdit_compile.cli.options.request import DEMO_PIPELINE
from xdit_compile.distributed.world import World
from xdit_compile.errors import UsageError

SCRIPT = f"""
import torch, xdit_compile
from diffusers import DiffusionPipeline
from diffusers.utils import logging

if not xdit_compile.is_main_process():
    logging.disable_progress_bar()
pipe = DiffusionPipeline.from_pretrained({str(DEMO_PIPELINE)!r}).to(xdit_compile.local_device())
pipe = xdit_compile.parallelize(pipe, xdit_compile.Plan(ulysses=2, backend="eager", cache=None))
pipe.set_progress_bar_config(disable=not xdit_compile.is_main_process())
image = pipe("a red circle", num_inference_steps=1, generator=torch.Generator().manual_seed(0)).images[0]
if xdit_compile.is_main_process():
    image.save("out.png")
"""


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, World()),
        ({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}, World(1, 1, 2, True)),
        (
            {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "0"},
            World(1, 0, 2, True),
        ),
        ({"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1"}, World(1, 1, 2, True)),
        ({"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "4", "SLURM_LOCALID": "1"}, World(3, 1, 4, True)),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}, World()),
        ({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1", "SLURM_LOCALID": "0"}, World(0, 0, 1, False)),
        ({"RANK": "5", "WORLD_SIZE": "8", "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "2"}, World(5, None, 8, True)),
    ],
    ids=["none", "torchrun", "Open MPI", "Intel MPI", "srun", "sbatch", "srun of one", "torchrun in srun"],
)
def test_a_launcher_is_understood(environment: dict[str, str], expected: World) -> None:
    assert World.from_environment(environment) == expected


def test_ranks_that_are_not_told_where_to_meet_are_refused() -> None:
    world = World(1, 1, 2, True)
    with pytest.raises(UsageError, match="set MASTER_ADDR and MASTER_PORT .* or start with torchrun"):
        world.check_meeting({})
    world.check_meeting({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"})
    with pytest.raises(UsageError, match="OMPI_COMM_WORLD_RANK='x'"):
        World.from_environment({"OMPI_COMM_WORLD_RANK": "x", "OMPI_COMM_WORLD_SIZE": "2"})


LAUNCHERS = {
    "torchrun": [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port"],
    "accelerate": [
        *(sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"),
        *("--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port"),
    ],
    "mpirun": ["mpirun", "--oversubscribe", "-np", "2", sys.executable],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LAUNCHERS)
def test_a_script_writes_one_file_with_one_loading_bar(name: str, tmp_path: Path) -> None:
    command = LAUNCHERS[name]
    if shutil.which(command[0]) is None:
        pytest.skip(f"there is no {command[0]} here")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    (tmp_path / "script.py").write_text(SCRIPT)
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    as_root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    environment = os.environ | meeting | as_root
    whole = [*command, *([] if name == "mpirun" else [port]), "script.py"]
    done = subprocess.run(whole, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    assert {path.name for path in tmp_path.iterdir()} == {"out.png", "script.py"}
    assert done.stderr.count("Loading pipeline components...:   0%") == 1


SLOW = """
import sys, time
import torch
import torch.distributed as dist
from xdit_compile import Plan
from xdit_compile.distributed import seats
from xdit_compile.distributed.world import World

waits = seats._wait_for
seats._wait_for = lambda *given: (time.sleep(1.5 * int(sys.argv[1])), waits(*given))
seats.join(Plan(ulysses=2, timeout_s=20), torch.device("cpu"), World.from_environment())
total = torch.ones(1)
dist.all_reduce(total)
print(total.item())
"""


def test_a_rank_that_looks_late_finds_the_others() -> None:
    """Where rank 0 serves the store that ranks meet in, as under mpirun."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    places = [
        {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        for rank in range(2)
    ]
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", SLOW, place["RANK"]], env={**os.environ, **place}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for place in places
    ]  # fmt: skip
    assert [rank.communicate(timeout=60)[0].splitlines()[-1] for rank in ranks] == ["2.0", "2.0"]
