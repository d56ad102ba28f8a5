"""nexfort: why it cannot be used here, from versions that are read, and the way to it through onediff's registry."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx

from xdit_compile import Plan
from xdit_compile.backends import registry
from xdit_compile.errors import PlanError, ProviderUnavailable
from xdit_compile.plan.packages import version_of

HERE = torch.__version__.partition("+")[0]


def installed(folder: Path, name: str, version: str, *requirements: str) -> None:
    """What pip leaves of a package for others to read."""
    metadata = folder / f"{name}-{version}.dist-info"
    metadata.mkdir()
    lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
    (metadata / "METADATA").write_text("\n".join([*lines, *(f"Requires-Dist: {each}" for each in requirements)]) + "\n")


def reason(**options: Any) -> str:
    with pytest.raises(ProviderUnavailable) as error:
        registry.find_backend("nexfort")
    return str(error.value)


def test_the_newest_release_cannot_be_beside_this_torch() -> None:
    if version_of("nexfort") is not None:
        pytest.skip("nexfort is installed")
    assert f"(0.1.dev330) cannot be beside torch {HERE}: it requires torch<=2.5.1,>=2.3.0" in reason()
    assert "use backend='inductor'" in reason()


def test_an_installed_one_is_asked_what_it_requires(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    installed(tmp_path, "nexfort", "0.2", "loguru", "torch (<2.6,>=2.4) ; extra == 'x'", "torch<2.6,>=2.4")
    assert f"nexfort 0.2 requires torch<2.6,>=2.4, and this is torch {HERE}; use backend='inductor'" in reason()


def test_one_that_fits_wants_onediff_and_a_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a card")
    monkeypatch.syspath_prepend(str(tmp_path))
    installed(tmp_path, "nexfort", "9.0", "torch>=2.11")
    if version_of("onediff") is None:
        assert "onediff is not installed; run: pip install 'xdit-compile[onediff]'" in reason()
        installed(tmp_path, "onediff", "1.2.0")
    assert "nexfort 9.0 compiles for CUDA alone, and there is no CUDA device here" in reason()


def test_options_are_those_of_the_plan() -> None:
    plan = Plan(backend="nexfort", backend_options={"mode": "max-optimize", "dynamic": True}).check()
    assert registry.backends(options=plan.options)["nexfort"]._options == {"mode": "max-optimize", "dynamic": True}
    with pytest.raises(PlanError, match="backend_options are for inductor and nexfort, and backend='eager'"):
        Plan(backend="eager", backend_options={"mode": "max-optimize"}).check()


class Doubling(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
        return (x * 2,)


def root_of_two_calls() -> fx.GraphModule:
    graph = fx.Graph()
    first = graph.call_module("block", (graph.placeholder("x"),))
    graph.output(graph.call_module("block", (graph.call_function(lambda t: t[0], (first,)),)))
    return fx.GraphModule({"block": fx.symbolic_trace(Doubling())}, graph)


def test_structures_go_through_the_registry_of_onediff(monkeypatch: pytest.MonkeyPatch) -> None:
    """The real onediff; under nexfort's name stands a backend of the test, as no nexfort runs beside this torch."""
    backends = pytest.importorskip("onediff.infer_compiler.backends.registry")
    monkeypatch.setattr(backends, "_BACKENDS", {})
    compiled: list[Any] = []

    @backends.register_backend("nexfort")
    def stands_in(module: fx.GraphModule, *, options: Any = None) -> fx.GraphModule:
        compiled.append((type(module), options))
        return module

    backend = registry.backends(options={"memory_format": "channels_last"})["nexfort"]
    (found,) = backend.compile(root_of_two_calls())(torch.ones(2))
    assert torch.equal(found, torch.full((2,), 4.0))
    wanted = {"mode": "max-optimize:max-autotune:low-precision", "memory_format": "channels_last"}
    assert [options for _, options in compiled] == [wanted] and issubclass(compiled[0][0], fx.GraphModule)


@pytest.mark.slow
def test_the_real_onediff(tmp_path: Path) -> None:
    """Where onediff is not installed it is fetched into a folder, and the test above is run with it."""
    if version_of("onediff") is not None:
        pytest.skip("it is installed, and the test above has run")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(tmp_path), "onediff==1.2.0"]
    if (fetched := subprocess.run(pip, capture_output=True, text=True, timeout=300)).returncode:
        pytest.skip(f"onediff cannot be had: {fetched.stderr.strip().splitlines()[-1:]}")
    test = f"{__file__}::test_structures_go_through_the_registry_of_onediff"
    command = [
        sys.executable,
        "-c",
        "import sys, pytest; sys.path.append(sys.argv[1]); sys.exit(pytest.main(sys.argv[2:]))",
    ]
    done = subprocess.run([*command, str(tmp_path), "-q", test], capture_output=True, text=True, timeout=300)
    assert "1 passed" in done.stdout, done.stdout + done.stderr
