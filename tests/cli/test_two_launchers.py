"""Two torchruns that meet, as on two hosts: here both are on this one, with a process each."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import commands
import numpy as np
import pytest
from PIL import Image


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@pytest.mark.slow
def test_two_nodes_of_torchrun_make_one_picture(tmp_path: Path) -> None:
    small = ["--model", str(commands.TINY_PIPELINE), "--backend", "eager", "--num_inference_steps", "2"]
    generate = ["-m", "xdit_compile", "generate", *small, "--ulysses_degree", "2", "--output", "both.png"]
    meeting = ["--rdzv_backend", "c10d", "--rdzv_endpoint", f"127.0.0.1:{free_port()}", "--rdzv_id", "two"]
    torchrun = [sys.executable, "-P", "-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1"]
    here = ["--local_addr", "127.0.0.1"]
    launchers = [
        subprocess.Popen(
            [*torchrun, *meeting, *here, *generate],
            cwd=tmp_path,
            env={**commands.clean_environment(), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    try:
        said = [launcher.communicate(timeout=240) for launcher in launchers]
    finally:
        for launcher in launchers:
            launcher.kill()
    assert [launcher.returncode for launcher in launchers] == [0, 0], said
    assert sum("both.png" in out + err for out, err in said) == 1, "rank 0 alone tells what it wrote"
    alone = commands.run("generate", *small, "--output", "alone.png", cwd=tmp_path)
    assert alone.returncode == 0, alone.stderr
    one, two = (np.asarray(Image.open(tmp_path / name), dtype=int) for name in ("alone.png", "both.png"))
    assert one.shape == two.shape and abs(one - two).max() <= 1
    assert commands.files(tmp_path) == {"alone.png", "both.png"}
