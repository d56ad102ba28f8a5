"""What is refused before anything is loaded or compiled, by the real command, with the way out in the same line."""

from __future__ import annotations

import dataclasses
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import TINY_PIPELINE, clean_environment, files, one_error, run
from diffusers import AutoencoderKL
from torch import nn

import xdit_compile
from xdit_compile import Plan
from xdit_compile.cli.commands.explain import explain
from xdit_compile.cli.commands.generate import generate
from xdit_compile.cli.main import main
from xdit_compile.cli.options.plenty import cpu_build, is_plenty
from xdit_compile.cli.options.request import DEMO_PIPELINE, Request
from xdit_compile.cli.parsing.plan_words import FLAGS, in_flags
from xdit_compile.cli.running.check_room import Place, _said
from xdit_compile.cli.running.room import Counts, _WithWorkspaces, counted, need, to_load
from xdit_compile.errors import UsageError, one_line
from xdit_compile.plan.host import _left_in_groups, available_memory, may_have_cuda, visible_cards
from xdit_compile.plan.plan import as_plan

GIB = 2**30
CPU, CARD = torch.device("cpu"), torch.device("cuda")
ON_THE_CPU = pytest.mark.skipif(not cpu_build() and may_have_cuda(), reason="there may be a GPU here")
EARLY = [
    pytest.param(
        "--backend nexfort", "--backend nexfort cannot be used here: nexfort is not installed", marks=ON_THE_CPU
    ),
    pytest.param("--device cuda", "give --device cpu or auto", marks=ON_THE_CPU),
    pytest.param("--attention sage", "is not installed (sageattention); run: pip install", marks=ON_THE_CPU),
    ("--attention sdpa_cudnn --device cpu", "runs on CUDA, not on the CPU; take --attention auto"),
    ("--enable_model_cpu_offload --device cpu", "needs a CUDA device to offload from; leave it out"),
    (
        "--nproc 2 --pipefusion_parallel_degree 2 --warmup_steps 5 --num_inference_steps 3",
        "--warmup_steps 5 is more than --num_inference_steps 3; give --warmup_steps 3 for an exact picture",
    ),
    ("--ulysses_degree 2", "start 2 (--nproc 2, or torchrun --nproc_per_node 2) or change the degrees"),
    ("--cache_dir /dev/null/x", "--cache_dir /dev/null/x: /dev/null is no folder; name another one"),
    ("explain --inputs junk.pt", "--inputs junk.pt is no file of torch.save with tensors and plain values alone; make"),
]


@pytest.mark.parametrize(("arguments", "expected"), EARLY)
def test_what_is_not_here_is_told_without_torch(tmp_path: Path, arguments: str, expected: str):
    words = arguments.split()
    command = ["generate", *words] if words[0].startswith("--") else words
    (tmp_path / "junk.pt").write_text("x")
    code = (
        "import sys; from xdit_compile.cli.main import main;"
        f"code = main({command!r}); print(code, 'torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=clean_environment(), capture_output=True, text=True, timeout=60
    )
    assert done.stdout.split() == ["2", "False"]
    assert expected in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.slow
def test_a_size_beyond_memory_is_refused_with_one_that_fits(tmp_path: Path):
    line = one_error(run("generate", "--height", "8000000", cwd=tmp_path), exit_code=2)
    took = r"--height 8000000 takes about [\d.]+ GiB on 1 process \(weights .*, denoiser .*, decode .*\), and .* of RAM"
    assert re.match(took, line) and line.endswith(", or --force")
    fits = int(re.search(r"take at most --height (\d+)", line)[1])
    assert fits % 8 == 0 and 16 <= fits < 8000000
    assert files(tmp_path) == set()


def test_the_refusal_names_what_would_fit():
    request = Request(height=8192, width=1024, num_images_per_prompt=1)
    counts = counted(request, torch.float32)
    small = Place(CPU, 2 * GIB, 2 * GIB, 2)
    line = _said(request, counts, small)
    assert line.startswith("--height 8192 --width 1024 --num_images_per_prompt 1 takes about ")
    assert "on each of 2 processes" in line and "and 2.0 GiB of RAM are free for it; take at most --height " in line
    split = dataclasses.replace(request, plan=Plan(ulysses=4))
    assert " or --use_parallel_vae or " in _said(split, counts, Place(CPU, 3 * GIB, None, 4))
    card = _said(request, COUNTS, Place(CARD, 17 * GIB, 64 * GIB, 1, more=4))
    assert "17.0 GiB of the device are free" in card
    assert "--nproc 2 --tensor_parallel_degree 2 --use_parallel_vae" in card


def test_what_is_counted_is_what_a_real_decode_makes():
    counts = counted(Request(height=256, width=128), torch.float32)
    coder = AutoencoderKL.from_pretrained(DEMO_PIPELINE / "vae")
    with torch.no_grad(), _WithWorkspaces() as storages:
        coder.decode(torch.zeros(1, coder.config.latent_channels, 32, 16), return_dict=False)
    assert counts.decoding == pytest.approx(storages.peak, rel=0.01)
    assert counts.weights["vae"] == sum(each.nbytes for each in coder.parameters())
    assert counts.denoising > 0 and counts.denoisers == {"transformer"}
    larger = counted(Request(height=256 * 512, width=128), torch.float32)
    assert 480 < larger.decoding / counts.decoding < 520


def test_a_small_request_is_not_counted_and_a_large_one_is():
    assert is_plenty(Request(height=64, width=64, device="cpu"), 1) == ((available_memory() or 0) > 3 * GIB)
    assert not is_plenty(Request(height=100000, width=100000, device="cpu"), 1)
    assert not is_plenty(Request(model="some/pipeline", device="cpu"), 1)


COUNTS = Counts({"transformer": 8 * GIB, "vae": 2 * GIB}, frozenset({"transformer"}), 4 * GIB, 12 * GIB)


@pytest.mark.parametrize(
    ("fields", "weights", "denoiser", "decode"),
    [
        ({}, 10, 4, 12),
        ({"plan": Plan(ulysses=4)}, 10, 1, 12),
        ({"plan": Plan(ulysses=2, vae="patch")}, 10, 2, 6),
        ({"plan": Plan(tensor=2)}, 6, 4, 12),
        ({"plan": Plan(data=2, vae="patch")}, 10, 2, 6),
        ({"plan": Plan(vae="patch", vae_memory="9GiB")}, 10, 4, 9),
        ({"plan": Plan(vae="patch", vae_memory="1GiB")}, 10, 4, 8),
        ({"enable_model_cpu_offload": True}, 8, 4, 12),
        ({"enable_sequential_cpu_offload": True}, 0, 4, 12),
    ],
)
def test_a_plan_shares_what_it_shares(fields: dict[str, Any], weights: int, denoiser: int, decode: int):
    needed = need(COUNTS, Request(**fields), CPU)
    assert (needed.weights, needed.denoiser, needed.autoencoder) == (weights * GIB, denoiser * GIB, decode * GIB)
    assert needed.total == (1 + weights + max(denoiser, decode)) * GIB


def test_weights_for_a_card_pass_through_memory():
    request = Request()
    assert to_load(COUNTS, request) == 11 * GIB
    assert Place(CARD, 80 * GIB, 16 * GIB, 1).fits(COUNTS, request)
    assert not Place(CARD, 80 * GIB, 10 * GIB, 1).fits(COUNTS, request)
    assert Place(CARD, 80 * GIB, 10 * GIB, 1).fits(COUNTS, Request(plan=Plan(tensor=2)))
    assert not Place(CARD, 20 * GIB, 64 * GIB, 1).fits(COUNTS, request)


def test_the_limits_of_control_groups_count(tmp_path: Path):
    membership, inner = tmp_path / "cgroup", tmp_path / "two" / "job" / "step"
    inner.mkdir(parents=True)
    for folder, limit in ((inner, "max"), (inner.parent, str(3 * GIB))):
        (folder / "memory.max").write_text(limit)
        (folder / "memory.current").write_text(str(2 * GIB))
        (folder / "memory.stat").write_text(f"anon 5\ninactive_file {GIB}\n")
    membership.write_text("0::/job/step\n")
    assert _left_in_groups(tmp_path / "two", membership) == [2 * GIB]
    old = tmp_path / "one" / "memory"
    old.mkdir(parents=True)
    (old / "memory.limit_in_bytes").write_text(str(5 * GIB))
    (old / "memory.usage_in_bytes").write_text(str(GIB))
    membership.write_text("4:memory:/gone\n2:cpu:/\n")
    assert _left_in_groups(tmp_path / "one", membership) == [4 * GIB]


def test_cards_are_counted_by_their_files(tmp_path: Path):
    assert not may_have_cuda(tmp_path) and visible_cards(tmp_path, {}) is None
    for name in ("nvidia0", "nvidia1", "nvidiactl"):
        (tmp_path / name).touch()
    assert may_have_cuda(tmp_path) and visible_cards(tmp_path, {}) == 2
    assert visible_cards(tmp_path, {"CUDA_VISIBLE_DEVICES": "1"}) == 1
    assert visible_cards(tmp_path, {"CUDA_VISIBLE_DEVICES": "0,7,1"}) == 1
    assert visible_cards(tmp_path, {"CUDA_VISIBLE_DEVICES": "GPU-1"}) is None


@pytest.mark.parametrize(
    ("wrong", "expected"),
    [
        ("ulysses=2", "not 'ulysses=2' of type str"),
        ({"ulysses": 2}, "not {'ulysses': 2} of type dict"),
        (Plan, "not the class Plan"),
        (2, "not 2 of type int"),
    ],
)
def test_a_plan_of_another_type_is_a_type_error(wrong: Any, expected: str):
    for call in (xdit_compile.parallelize, xdit_compile.from_pretrained):
        with pytest.raises(TypeError, match=r"a plan is a Plan, such as Plan\(ulysses=2\), ") as refused:
            call(nn.Linear(2, 2), wrong)
        assert expected in str(refused.value) and isinstance(refused.value, UsageError)
    assert as_plan(None) == Plan()


@pytest.mark.parametrize("wrong", [None, "flux", nn.Linear, {"unet": 1}], ids=str)
def test_a_target_of_another_type_is_a_type_error(wrong: Any):
    with pytest.raises(TypeError, match="neither a diffusers pipeline nor a module; load one first"):
        xdit_compile.parallelize(wrong, Plan(backend="eager", cache=None))


def test_long_errors_end_in_whole_words():
    said = one_line(ValueError("word " * 500), limit=99)
    assert said.endswith("word ...") and len(said) <= 99 and set(said.split()) == {"word", "..."}
    assert one_line(ValueError("a\n  b")) == "a b" and one_line(ValueError()) == "ValueError"
    assert len(one_line(ValueError("x" * 500), limit=99)) <= 99


@pytest.mark.slow
@pytest.mark.parametrize("steps", ["1", "3"])
def test_no_guidance_is_seen_before_anything_is_compiled(tmp_path: Path, steps: str):
    arguments = "--nproc 2 --use_cfg_parallel --guidance_scale 1 --cache_dir kept --num_inference_steps".split()
    done = run("generate", *arguments, steps, cwd=tmp_path)
    line = done.stderr.rstrip().splitlines()[-1]
    assert done.returncode == 2 and line.startswith("xdit-compile: error: rank ")
    assert "; leave out --use_cfg_parallel, or take a guidance scale above 1 (--guidance_scale 4)" in line
    assert not [path for path in (tmp_path / "kept").rglob("*") if path.is_file() and path.stat().st_size > 4096]


@pytest.mark.slow
def test_processes_without_a_method_get_one_and_hear_of_another(tmp_path: Path):
    small = ["--model", str(TINY_PIPELINE), "--backend", "eager", "--height", "128", "--width", "128"]
    done = run("generate", *small, "--nproc", "2", "--num_inference_steps", "2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "no method was given for 2 processes: taking --ulysses_degree 2" in done.stderr
    assert "the pipeline ran with guidance: --use_cfg_parallel shares its branches" in done.stdout


@pytest.mark.slow
def test_warnings_of_the_engine_name_flags(tmp_path: Path):
    small = ["--model", str(TINY_PIPELINE), "--backend", "eager", "--no_cache", "--height", "16", "--width", "64"]
    done = run("generate", *small, "--nproc", "3", "--use_parallel_vae", "--num_inference_steps", "1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    warning = "xdit-compile: warning: decode: 2 rows, so 1 of 3 ranks have nothing to do; lower --vae_parallel_degree"
    assert done.stderr.splitlines().count(warning) == 1, done.stderr


@pytest.mark.parametrize("command", ["build", "tune"])
def test_a_size_that_the_model_cannot_have_is_refused_like_one_of_a_picture(
    command: str, capsys: pytest.CaptureFixture[str]
):
    assert main([command, "--size", "64x64", "--size", "64x63"]) == 2
    assert "--width 63 is no multiple of 16" in capsys.readouterr().err


WRONG = [
    ("generate --backend inducter", "--backend inducter is unknown; did you mean inductor? There are auto, inductor, "),
    ("generate --without join_linear", "--without join_linear is unknown; did you mean join_linears? There are "),
    ("generate --link fast", "--link fast must be bytes per second of one rank"),
    ("generate --timeout -1", "--timeout -1.0 must be a positive number of seconds"),
    (
        "generate --vae_parallel_degree 2",
        "--vae_parallel_degree 2 has no use without --use_parallel_vae; set --use_par",
    ),
    (
        "generate --compile background --no_cache",
        "--compile background hands graphs over by way of the cache, and --no_c",
    ),
    (
        "generate --attn_layer_num_for_pp 3,4",
        "--attn_layer_num_for_pp 3,4 must have one number for each stage, and --pip",
    ),
    (
        "generate --backend eager --backend_options a=1",
        "--backend_options are for inductor and nexfort, and --backend eage",
    ),
    (
        "generate --distrifusion_parallel_degree 2 --ring_degree 2",
        "--distrifusion_parallel_degree 2 shares the tokens, as",
    ),
    (
        "generate --nproc 2 --use_cfg_parallel --ring_degree 2",
        "--use_cfg_parallel x --ring_degree 2 needs 4 processes, and ",
    ),
    (
        "generate --prompt a red circle",
        "--prompt is followed by 3 words; quote a text of several: --prompt 'a red circle'",
    ),
    (
        "tune --prompt a red circle",
        "--prompt is followed by 3 words; quote a text of several: --prompt 'a red circle' (see",
    ),
    (
        "generate --negative_prompt no star",
        "--negative_prompt is followed by 2 words; quote a text of several: --negative",
    ),
    ("generate --height 64 96", "--height takes one value, and '96' follows '64'; leave it out"),
    ("generate --prompt --height 64", "--prompt needs a value, and --height follows it"),
    ("serve --retry --port 99999", "--port 99999 must lie between 0 and 65535"),
    ("generate --overwrite yes", "--overwrite takes no value, and 'yes' follows it; leave that out"),
    ("generate star", "'star' belongs to no flag; a prompt is given as --prompt star"),
    ("generate --height", "Option '--height' requires an argument (see xdit-compile generate --help)"),
    (
        "build --also '--seed 2'",
        "--also '--seed 2': a plan has no flag --seed; give such as --tensor_parallel_degree 4",
    ),
    ("build --also --help", "--also '--help': a plan has no flag --help; give such as"),
    ("build --also '--backend foo'", "--also '--backend foo': --backend foo is unknown; choose one of auto"),
    ("build --also ''", "--also '': there is no flag in it; give flags of one more plan, or leave it out"),
    ("build --also '\"'", "No closing quotation; close the quotes"),
    (
        "explain --component scheduler",
        "--component scheduler is no module; choose one of text_encoder, transformer, vae",
    ),
    ("explain --component x", "--component x is not in this pipeline; choose one of text_encoder, transformer, vae"),
    ("cache", "say which: cache clear, list, prune, show, unpack or verify (see xdit-compile cache --help)"),
    *((f"{each} --cache_dir /dev/null", "/dev/null is no folder; name") for each in ("build", "explain", "tune")),
    (
        "generate --nproc 2 --use_parallel_vae --vae_parallel_size 3",
        "--vae_parallel_degree 3 must divide the 2 ranks that share the rows",
    ),
    ("frob", "take build, cache, completion, doctor, evaluate, explain, generate, serve or tune (see xdit-compile --h"),
    ("cache frob", "No such command 'frob'; take clear, list, prune, show, unpack or verify"),
    ("completion", "Choose from: bash, zsh, fish (see xdit-compile completion --help)"),
]


@pytest.mark.parametrize(("line", "expected"), WRONG)
def test_what_is_wrong_is_told_in_flags_and_with_the_way_out(
    line: str, expected: str, capsys: pytest.CaptureFixture[str]
):
    assert main(shlex.split(line)) == 2
    said = capsys.readouterr()
    assert expected in said.err and said.err.count("\n") == 1 and said.out == ""


def test_a_truth_in_the_environment_is_1_or_0(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setenv("XDIT_COMPILE_DEBUG", "maybe")
    assert main(["generate"]) == 2
    said = "Invalid value for '--debug': 'maybe' is neither true nor false; write 1 or 0 (from XDIT_COMPILE_DEBUG) (see"
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("--pipefusion_parallel_degree 9", "this denoiser has 8; take at most --pipefusion_parallel_degree 8"),
        (
            "--num_pipeline_patch 999",
            "into 999 patches: no attention has 999 rows of tokens that stand in the input and",
        ),
        (
            "--pipefusion_parallel_degree 2 --attn_layer_num_for_pp 1,2",
            "--attn_layer_num_for_pp 1,2 must be 2 numbers that add up to 8 blocks",
        ),
        (
            "--component transformer --inputs junk.pt",
            "--inputs junk.pt is no file of torch.save with tensors and plain va",
        ),
        (
            "--component transformer --inputs list.pt",
            "--inputs list.pt holds no dict with args or kwargs; make one with",
        ),
        (
            "--component transformer --inputs more.pt",
            "--inputs more.pt is not what transformer takes: missing a req",
        ),
        ("--component vae", "the pipeline never called --component vae; take transformer"),
    ],
)
def test_what_the_model_does_not_allow_is_told_in_flags(
    flags: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    Path("junk.pt").write_text("x")
    torch.save([1], "list.pt")
    torch.save({"kwargs": {"colour": 1}}, "more.pt")
    assert main(["explain", "--quiet", *flags.split()]) == 2
    assert expected in capsys.readouterr().err


def test_every_setting_of_a_plan_has_a_flag_and_python_keeps_its_words():
    unsaid = {"keep_weights", "verify", "max_programs"}
    assert {field.name for field in dataclasses.fields(Plan)} - unsaid == FLAGS.keys() - {"target"}
    assert {f"--{flag}" for flag in FLAGS.values()} <= {
        name for each in (generate, explain) for flag in each.params for name in flag.opts
    }
    said = Plan(backend="foo", without=("x", "y"), mesh_order=("cfg",)).problems()
    assert said[0].startswith("backend='foo' is unknown") and said[-1].startswith("without=('x',) is unknown")
    assert in_flags(said[1]).startswith("--mesh_order cfg must name each of data, cfg, ")
    assert in_flags("run it whole with Plan(fallback='unsplit')") == "run it whole with --fallback unsplit"
    assert in_flags("cfg=2 but ...; use cfg=1") == "--use_cfg_parallel but ...; leave out --use_cfg_parallel"
    assert in_flags("--warmup_steps 3 in /a/mesh_order/b") == "--warmup_steps 3 in /a/mesh_order/b"
