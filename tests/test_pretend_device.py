"""An accelerator that is not there: two devices of their own, one for each rank, as strict as CUDA and NCCL are."""

from __future__ import annotations

import datetime
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

import pretend
import procs
import pytest
import torch
import torch.distributed as dist
from conformance import runner
from conformance.plans import PLANS
from conformance.runner import Cell, Limits, Store
from conformance.verdicts import Verdict
from torch import nn
from zoo.pipelines import PIPELINES
from zoo.transformers import Draw

import xdit_compile
from xdit_compile import Plan
from xdit_compile.capture.by_values import by_values
from xdit_compile.capture.tracing import Flat

pytestmark = pytest.mark.skipif(pretend.unavailable() is not None, reason=str(pretend.unavailable()))
TEN = (
    "flux_true_cfg", "sd3_prompted", "pixart", "qwenimage", "wan", "cogvideox", "sana", "hunyuandit", "sdxl", "ltx"
)  # fmt: skip
GOOD = (Verdict.EXACT, Verdict.REFUSED, Verdict.INAPPLICABLE)


class Selecting(nn.Module):
    """Reads a length, and makes tensors whose sizes follow from values."""

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        lengths = mask.sum(1).tolist()
        places = torch.arange(max(lengths), device=x.device)
        return x[mask.bool()] * places.sum() + torch.nonzero(mask).shape[0]


def refused(compute: Any) -> str:
    try:
        compute()
    except RuntimeError as error:
        return str(error)
    return ""


def alone(rank: int) -> dict[str, Any]:
    device = pretend.start()
    here, there, host = (torch.ones(3, device=each) for each in ("pretend:0", "pretend:1", "cpu"))
    found: dict[str, Any] = {
        "mixed": [
            refused(lambda: here + there),
            refused(lambda: here + host),
            refused(lambda: here + torch.tensor(1.0)),
        ]
    }
    with pretend.reading(device) as reads:
        here.sum().item(), here.cpu(), (here + 1).add_(here)
    found["reads"] = reads
    x, mask = torch.randn(1, 4, 3, device="pretend:0"), torch.tensor([[1, 1, 0, 1]], device="pretend:0")
    module = Selecting()
    flat = Flat(module, module.forward, (x, mask), {})
    device.forget_counts()
    trace = by_values(flat)
    found["operators"] = device.operators()
    found["constants"] = {str(each.device) for each in trace.constants.values()}
    return found


def test_mixed_devices_are_refused_and_reads_counted_and_captured_values_need_no_device() -> None:
    (found,) = procs.run(alone, 1)
    assert all("at least two devices" in each for each in found["mixed"][:2]) and not found["mixed"][2]
    assert found["reads"] == {"aten::_local_scalar_dense": 1, "copy to the host": 1}
    assert found["operators"] == {} and found["constants"] == {"pretend:0"}


def on_devices(rank: int, folder: str, jobs: list[tuple[str, dict[str, Any]]]) -> list[Any]:
    device = pretend.start()
    here = f"{pretend.NAME}:{rank}"
    dist.destroy_process_group()
    torch.accelerator.set_device_index(rank)
    dist.init_process_group(
        pretend.BACKENDS[pretend.NAME], init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2,
        timeout=datetime.timedelta(seconds=60),
    )  # fmt: skip
    return [
        (*differences(name, here, Plan(backend="eager", timeout_s=60, **plan)), device.operators())
        for name, plan in jobs
    ]


def differences(name: str, device: str, plan: Plan) -> tuple[float, float]:
    expected = generated(PIPELINES[name].build().to(device), name, device)
    pipe = xdit_compile.parallelize(PIPELINES[name].build().to(device), plan)
    found = [generated(pipe, name, device) for _ in range(2)]
    assert read_in_calls(pipe, name, device, 3) == read_in_calls(pipe, name, device, 5)
    first, second = (((each - expected).abs().max() / expected.abs().max()).item() for each in found)
    return first, second


def generated(pipe: Any, name: str, device: str, steps: int = 3) -> torch.Tensor:
    case = PIPELINES[name]
    return case.call(pipe, 0, steps, "latent", **case.arguments(Draw(0, device))).cpu()


def read_in_calls(pipe: Any, name: str, device: str, steps: int) -> int:
    """How often the host waits for values within calls of a denoiser: for those that a request begins with alone."""
    found = []

    def note(what: str) -> None:
        frames = traceback.extract_stack()
        if any(frame.filename.endswith("/runtime.py") and frame.name == "__call__" for frame in frames):
            found.append(what)

    with pretend.reading(pretend.start(), note):
        generated(pipe, name, device, steps)
    return len(found)


def test_each_rank_has_a_device_of_its_own() -> None:
    jobs = [("sd3", {"ulysses": 2}), ("sd3", {"pipefusion": 2, "warmup_steps": 3})]
    with tempfile.TemporaryDirectory() as folder:
        for rank, found in enumerate(procs.run(on_devices, 2, folder, jobs, timeout=240)):
            assert max(max(first, second) for first, second, _ in found) < 2e-5
            assert set(found[-1][2]) == {rank}


@pytest.mark.slow
def test_a_killed_build_stops_no_other(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "import pretend; pretend.extension()"]
    settings = {**os.environ, "TMPDIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    killed = subprocess.Popen(command, env=settings, start_new_session=True)
    end = time.monotonic() + 120
    while not list(tmp_path.rglob("lock")):
        assert killed.poll() is None and time.monotonic() < end
        time.sleep(0.1)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    subprocess.run(command, env=settings, check=True, timeout=240)


@pytest.mark.slow
@pytest.mark.parametrize("plan", PLANS)
def test_ten_pipelines(plan: str, tmp_path: Path) -> None:
    wanted = [Cell(case, plan) for case in TEN]
    found = runner.run(wanted, Store(tmp_path), Limits(240), device=pretend.NAME)
    assert {cell: answer.reason for cell, answer in found.items() if answer.verdict not in GOOD} == {}
    assert sum(answer.verdict is Verdict.EXACT for answer in found.values()) >= 5
