"""Entries for a GPU that is not there: found and loaded under another build of torch, up to the launch."""

from __future__ import annotations

import dataclasses
import logging
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest import mock

import pytest
import torch
import triton
from torch import nn
from torch.nn import functional as F

from xdit_compile import Plan
from xdit_compile.backends.artifact import Artifact, loaded
from xdit_compile.backends.folders.build_folder import BuildFolder
from xdit_compile.backends.inductor import Inductor
from xdit_compile.backends.registry import find_backend
from xdit_compile.backends.target.card_code import noting_kernels
from xdit_compile.backends.target.cards import CARDS
from xdit_compile.backends.target.pretend_card import DEVICE, check_versions, kept_on_host, pretend_card
from xdit_compile.cache.bundle import pack, unpack
from xdit_compile.cache.environment import environment_of_target
from xdit_compile.cache.store import Store
from xdit_compile.capture.state.in_place import put_back, put_in_place
from xdit_compile.capture.state.signature import signature
from xdit_compile.distributed.mesh import Mesh
from xdit_compile.errors import UsageError
from xdit_compile.runtime.compiled_call import CompiledCall
from xdit_compile.runtime.methods.ahead import build_ahead
from xdit_compile.runtime.runner import Runner
from xdit_compile.runtime.session import Session
from xdit_compile.runtime.stored.shelf import Shelf
from xdit_compile.weights.weights import Weights


def _known() -> bool:
    try:
        check_versions()
    except UsageError:
        return False
    return True


pytestmark = pytest.mark.skipif(not _known(), reason="torch or Triton is of a version whose insides are not known")
TARGET = "sm_90"
BUILD = "2.13.0+cu130"
PLAN = Plan(backend="inductor", verify=False, keep_weights=True)


class Block(nn.Module):
    """Attention behind a norm over few channels, which inductor would time in several configurations."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(64), nn.Linear(64, 192), nn.Linear(64, 64)
        self.register_buffer("order", torch.arange(23, -1, -1))

    def forward(self, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        qkv = self.qkv(self.norm(x) * scale.sigmoid()).unflatten(-1, (3, 4, 16)).permute(2, 0, 3, 1, 4)
        return x.index_select(1, self.order) + self.out(F.scaled_dot_product_attention(*qkv).transpose(1, 2).flatten(2))


def module_and_call() -> tuple[nn.Module, tuple[torch.Tensor, torch.Tensor]]:
    torch.manual_seed(0)
    module = Block().eval().to(torch.bfloat16)
    return module, (torch.randn(2, 24, 64, dtype=torch.bfloat16), torch.randn(2, 24, 64, dtype=torch.bfloat16))


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    store = Store(tmp_path_factory.mktemp("built") / "cache")
    module, args = module_and_call()
    assert not build_ahead(module, "module", args, {}, PLAN, store, lambda rank: None, CARDS[TARGET])
    assert build_ahead(module, "module", args, {}, PLAN, store, lambda rank: None, CARDS[TARGET]) == 1
    return store.folder


@contextmanager
def another_build(target: str = TARGET) -> Iterator[None]:
    """A machine with the card and torch for CUDA, as far as this one can pretend.

    Tensors say that they are on the card, and what pretending sets of inductor's configuration is no user's.
    """
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(torch, "__version__", type(torch.__version__)(BUILD)))
        stack.enter_context(pretend_card(CARDS[target]))
        stack.enter_context(kept_on_host())
        stack.enter_context(mock.patch.object(Shelf, "kind", DEVICE.type))
        stack.enter_context(mock.patch("xdit_compile.cache.environment._changed", lambda name: {}))
        yield


def ready(folder: Path) -> tuple[CompiledCall, dict[str, bool]]:
    """What a runner makes of the call, short of running it, and the kernels that Triton was asked for."""
    module, args = module_and_call()
    session = Session(PLAN, Mesh.named(PLAN, 0), Inductor(), DEVICE, Store(folder), "a making")
    runner = Runner(Weights(module), session, "module", trace_only=True)
    looked: dict[str, bool] = {}
    with mock.patch("xdit_compile.runtime.making.device_of", lambda leaves: DEVICE), torch.no_grad():
        put_in_place(module, {"forward": runner})
        try:
            with noted(looked):
                return runner._prepare(signature(module, args, {}), args, {}, list(args)), looked
        finally:
            put_back(module)
            session.close()


@contextmanager
def noted(looked: dict[str, bool]) -> Iterator[None]:
    """Note which kernels were found and which compiled, wherever Triton is told to tell."""
    from xdit_compile.backends.target import card_code

    def both(note):
        return noting_kernels(lambda folder, known: (note(folder, known), looked.setdefault(folder.name, known)))

    with mock.patch.object(card_code, "noting_kernels", both):
        yield


def copied(built: Path, tmp_path: Path) -> Path:
    """The entries in a cache of another machine, by way of a bundle."""
    file = tmp_path / "bundle"
    digest = pack(Store(built), file, environment_of_target(TARGET))
    with another_build():
        assert unpack(Store(tmp_path / "cache"), file, digest, DEVICE) == len(Store(built).listed())
    return tmp_path / "cache"


def artifacts(folder: Path) -> dict[str, Artifact]:
    store = Store(folder)
    entries = [store.read("code", each.name) for each in store.listed() if each.kind == "code"]
    return {entry.name: Artifact.unpacked(entry.body) for entry in entries if entry is not None}


def test_another_build_loads_what_was_built_and_compiles_nothing(built: Path, tmp_path: Path, caplog) -> None:
    with another_build(), caplog.at_level(logging.INFO, "xdit_compile"):
        call, looked = ready(copied(built, tmp_path))
    assert "1 graphs from the cache, 0 compiled" in call.said
    assert looked and all(looked.values())
    assert "compiled here" not in caplog.text


def check_machine_code(folder: Path, target: str, tmp_path: Path) -> None:
    """See by Triton's own tool that all of it is for a card."""
    for artifact in artifacts(folder).values():
        assert artifact.card is not None and artifact.card.kernels and not artifact.libraries
        for kernel in artifact.card.kernels.values():
            (cubin,) = (content for name, content in kernel.files.items() if name.endswith(".cubin"))
            (tmp_path / "cubin").write_bytes(cubin)
            command = [triton.knobs.nvidia.cuobjdump.path, "--list-elf", str(tmp_path / "cubin")]
            said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            assert re.fullmatch(rf"ELF file +1: \S+\.{target}a?\.cubin\n", said), said


def test_machine_code_is_for_the_card(built: Path, tmp_path: Path) -> None:
    assert all("for sm_90" in entry.about["for"] for entry in Store(built).entries())
    check_machine_code(built, TARGET, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("target", sorted(set(CARDS) - {TARGET}))
def test_other_cards(target: str, tmp_path: Path) -> None:
    store, (module, args) = Store(tmp_path / "cache"), module_and_call()
    build_ahead(module, "module", args, {}, PLAN, store, lambda rank: None, CARDS[target])
    check_machine_code(store.folder, target, tmp_path)
    with another_build(target):
        call, looked = ready(store.folder)
    assert "1 graphs from the cache, 0 compiled" in call.said and looked and all(looked.values())


def load_all(folder: str) -> None:
    """Load every structure of a cache in this process, and print how many kernels Triton found and compiled."""
    looked: dict[str, bool] = {}
    build_folder = BuildFolder()
    with another_build(), noted(looked):
        for artifact in artifacts(Path(folder)).values():
            loaded(artifact, build_folder)
    print(sum(looked.values()), len(looked) - sum(looked.values()))


@pytest.mark.slow
def test_the_command_builds_what_another_process_loads(tmp_path: Path) -> None:
    folder = str(tmp_path / "cache")
    flags = ("--target", TARGET, "--ulysses_degree", "2", "--size", "192x256", "--cache_dir", folder)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    tests = Path(__file__).parents[1]
    for command in (
        ["-m", "xdit_compile", "build", *flags],
        ["-c", f"from cache.test_target import load_all; load_all({folder!r})"],
    ):
        done = subprocess.run(
            [sys.executable, *command], cwd=tests, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
    check_machine_code(Path(folder), TARGET, tmp_path)
    found, compiled = map(int, done.stdout.split())
    assert found > 10 and compiled == 0


def test_launch_configurations_are_those_of_the_entry(built: Path, tmp_path: Path) -> None:
    folder = copied(built, tmp_path)
    ((name, artifact),) = artifacts(folder).items()
    assert artifact.card is not None
    ((kernel, chosen),) = artifact.card.chosen.items()
    artifact.card.chosen[kernel] = {**chosen, "XBLOCK": 8}
    Store(folder).write("code", name, {}, artifact.packed())
    with another_build():
        _, looked = ready(folder)
    assert list(looked.values()).count(False) == 1


def test_a_kernel_that_is_not_whole_is_compiled_on_the_spot(built: Path, tmp_path: Path, caplog) -> None:
    folder = copied(built, tmp_path)
    store = Store(folder)
    ((name, artifact),) = artifacts(folder).items()
    key, kernel = next(iter(artifact.card.kernels.items()))
    files = {
        file: content[:-1] + b"\1" if file.endswith(".cubin") else content for file, content in kernel.files.items()
    }
    artifact.card.kernels[key] = dataclasses.replace(kernel, files=files)
    store.write("code", name, {}, artifact.packed())
    with another_build(), caplog.at_level(logging.INFO, "xdit_compile"):
        call, looked = ready(folder)
    assert "1 graphs from the cache, 0 compiled" in call.said
    assert [key for key, known in looked.items() if not known] == [key]
    assert f"1 of {len(looked)} kernels were compiled here" in caplog.text
    assert caplog.text.count("compiled here") == 1


def test_with_another_triton_of_that_version_all_is_compiled_on_the_spot(built: Path, tmp_path: Path, caplog) -> None:
    with (
        another_build(),
        mock.patch("triton.runtime.cache.triton_key", lambda: "another one"),
        caplog.at_level(logging.INFO, "xdit_compile"),
    ):
        call, looked = ready(copied(built, tmp_path))
    assert looked and not any(looked.values())
    assert f"{len(looked)} of {len(looked)} kernels were compiled here" in caplog.text


def test_code_runs_on_the_card_of_its_rank(built: Path, tmp_path: Path) -> None:
    from torch._inductor.codecache import PyCodeCache

    cards = {"current_device": lambda: 3, "device_count": lambda: 4}
    with another_build(), mock.patch.multiple(torch.cuda, **cards):
        _, looked = ready(copied(built, tmp_path))
        sources = [Path(str(module.__file__)).read_text() for module in PyCodeCache.modules]
    assert any("_DeviceGuard(3)" in source for source in sources) and all(looked.values())
    assert not any(text in source for source in sources for text in ("_DeviceGuard(0)", "index=0", "raw_stream(0)"))


def test_key_of_a_target(monkeypatch: pytest.MonkeyPatch) -> None:
    here = environment_of_target(TARGET, {})
    monkeypatch.setattr(torch, "__version__", BUILD)
    assert environment_of_target(TARGET, {"CXX": "clang"}) == here != environment_of_target("sm_80", {})
    monkeypatch.setattr(torch, "__version__", "2.13.1+cu130")
    assert environment_of_target(TARGET, {}) != here
    monkeypatch.setattr(torch, "__version__", "2.14.0")
    with pytest.raises(
        UsageError, match=r"with torch 2\.13 and triton 3\.7 or 3\.9 alone; here are torch 2\.14\.0 and"
    ):
        check_versions()


@pytest.mark.parametrize(("backend", "mode"), [("eager", "default"), ("inductor", "max-autotune-no-cudagraphs")])
def test_backends_that_cannot_compile_ahead_say_so(backend: str, mode: str) -> None:
    with pytest.raises(UsageError, match="for sm_90 ahead of time; use backend='inductor'|for sm_90 use 'default'"):
        find_backend(backend, mode).for_card(CARDS[TARGET])


def test_a_bundle_for_another_card_is_refused(built: Path, tmp_path: Path) -> None:
    digest = pack(Store(built), tmp_path / "bundle", environment_of_target(TARGET))
    with another_build("sm_80"), pytest.raises(UsageError, match="target: 'sm_90', and here it is 'sm_80'"):
        unpack(Store(tmp_path / "cache"), tmp_path / "bundle", digest, DEVICE)
