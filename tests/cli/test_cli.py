"""The command line as a user types it: every test but the last few starts the real command in its own processes."""

from __future__ import annotations

import gc
import json
import re
import shutil
import subprocess
import sys
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from commands import COMMAND, TINY_PIPELINE, clean_environment, files, one_error, run
from PIL import Image
from safetensors.numpy import load_file

from xdit_compile.cli.running.output import Pixels

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_addr", "127.0.0.1"]
SMALL = ["--model", str(TINY_PIPELINE), "--backend", "eager"]
QUICK = [*SMALL, "--num_inference_steps", "2", "--height", "128", "--width", "128"]
DIFFERENCE = re.compile(
    r"greatest difference (\d+) of 255 .* in the float output \(([\d.e+-]+) of its greatest value\)"
)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("--nproc 2 --ulysses_degree 3", "--ulysses_degree 3 needs 3 processes, and --nproc 2 asks for 2; give --np"),
        (
            "--ulysses_degree 2",
            "needs 2 processes but 1 is running; start 2 (--nproc 2, or torchrun --nproc_per_node 2)",
        ),
        ("--nproc 2 --ulysses_degree -1", "--ulysses_degree -1 must be a whole number of at least 1"),
        ("--ring-degree 0", "--ring_degree 0 must be a whole number of at least 1"),
        ("--backend tvm", "--backend tvm is unknown; choose one of auto, inductor, nexfort, eager"),
        ("--attention magic", "--attention magic is unknown; choose one of auto, sdpa"),
        ("--nproc 0", "--nproc 0 must be at least 1"),
        ("--model ./nowhere", "--model ./nowhere is no folder"),
        ("--model .", "--model . has no model_index.json"),
        ("--output picture.bmp", "--output picture.bmp must end in one of .png"),
        ("--output nowhere/picture.png", "folder nowhere does not exist"),
        ("--height -8", "--height -8 must be at least 1"),
        ("--num_inference_steps 0", "--num_inference_steps 0 must be at least 1"),
        ("--dtype int3", "--dtype int3 is unknown; choose one of auto, float32"),
        ("--guidance_scale nan", "--guidance_scale nan must be a finite number"),
        ("--output_type video", "--output_type video is unknown; choose one of pil, latent"),
        ("--output_type latent --output a.png", "must end in one of .safetensors with --output_type latent"),
        ("--enable_model_cpu_offload --enable_sequential_cpu_offload", "exclude each other"),
        ("--nproc 2 --ulysses_degree 2 --enable_sequential_cpu_offload", "a split graph takes all weights at once"),
        ("--nproc 2 --tensor_parallel_degree 2 --enable_model_cpu_offload", "a rank holds slices; leave one of them"),
        ("--enable_model_cpu_offload --device cpu", "needs a CUDA device to offload from"),
        ("--ulysses_degree two", "'two' is not a valid integer"),
        ("--ulises_degree 2", "No such option '--ulises_degree'"),
    ],
)
def test_a_wrong_request_is_one_line_and_exit_code_2(tmp_path: Path, arguments: str, expected: str):
    assert expected in one_error(run("generate", *arguments.split(), cwd=tmp_path), exit_code=2)
    assert files(tmp_path) == set()


def test_every_problem_is_named_at_once(tmp_path: Path):
    wrong = "--ulysses_degree -1 --backend tvm --height 0 --model ./nowhere --output picture.bmp"
    line = one_error(run("generate", *wrong.split(), cwd=tmp_path), exit_code=2)
    for name in ("--ulysses_degree -1", "--backend tvm", "--height 0", "--model ./nowhere", "--output picture.bmp"):
        assert name in line


def test_help_and_usage_errors_do_not_wait_for_torch(tmp_path: Path):
    code = (
        "import sys; from xdit_compile.cli.main import main;"
        "flags = [['generate', '--help'], ['generate', '--nproc', '2', '--ring_degree', '3']];"
        "flags += [['explain', '--backend', 'x']];"
        "codes = [main(one) for one in flags];"
        "print(codes, 'torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=clean_environment(), capture_output=True, text=True, timeout=60
    )
    assert done.stdout.splitlines()[-1] == "[0, 2, 2] False"


def test_nproc_under_torchrun_is_refused(tmp_path: Path):
    done = run("generate", "--nproc", "2", cwd=tmp_path, RANK="0", WORLD_SIZE="2", LOCAL_RANK="0")
    assert "2 processes are already launched; leave out --nproc" in one_error(done, exit_code=2)


@pytest.fixture
def broken_model(tmp_path: Path) -> Path:
    """A pipeline folder whose denoiser's weights are cut short."""
    folder = tmp_path / "broken"
    shutil.copytree(TINY_PIPELINE, folder)
    weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    return folder


@pytest.mark.parametrize(
    "processes",
    [
        pytest.param([], id="one", marks=pytest.mark.slow),
        pytest.param("--nproc 2 --ulysses_degree 2".split(), id="two"),
    ],
)
def test_a_failure_is_one_line_and_exit_code_1(tmp_path: Path, broken_model: Path, processes: list[str]):
    done = run("generate", "--model", str(broken_model), *processes, cwd=tmp_path)
    line = one_error(done, exit_code=1)
    assert f"--model {broken_model} cannot be loaded" in line
    assert ("rank " in line) == bool(processes)
    assert files(tmp_path) == {"broken"}


@pytest.mark.slow
def test_a_checkpoint_cut_short_is_named_by_its_file(tmp_path: Path, broken_model: Path):
    arguments = ["--nproc", "2", "--tensor_parallel_degree", "2"]
    line = one_error(run("generate", "--model", str(broken_model), *arguments, cwd=tmp_path), exit_code=2)
    assert "is damaged or cut short" in line and "safetensors" in line
    assert files(tmp_path) == {"broken"}


@pytest.mark.slow
def test_latents_are_written_as_safetensors(tmp_path: Path):
    done = run("generate", *QUICK, "--output_type", "latent", "--compare", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (latents,) = load_file(tmp_path / "out.safetensors").values()
    assert latents.ndim == 4 and latents.shape[-1] * 8 == 128
    assert "greatest difference 0.00e+00 in the float output" in done.stdout


@pytest.mark.slow
def test_debug_shows_the_traceback(tmp_path: Path, broken_model: Path):
    done = run("generate", "--model", str(broken_model), "--debug", cwd=tmp_path)
    assert done.returncode == 1
    assert "Traceback (most recent call last)" in done.stderr
    assert done.stderr.rstrip().splitlines()[-1].startswith("xdit-compile: error: ")


def test_one_process_makes_a_picture_and_names_what_it_ignored(tmp_path: Path):
    done = run("generate", *QUICK, "--width", "160", "--num_frames", "3", "--compare", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "--num_frames has no effect: this pipeline does not take it" in done.stderr
    assert files(tmp_path) == {"out.png"}
    picture = Image.open(tmp_path / "out.png")
    assert picture.size == (160, 128)
    assert np.asarray(picture).std() > 10
    pixel, relative = DIFFERENCE.search(done.stdout).groups()
    assert int(pixel) <= 1
    assert float(relative) < 1e-3


@pytest.mark.parametrize(
    "degree",
    [
        "--ulysses_degree",
        *(pytest.param(f"--{name}_degree", marks=pytest.mark.slow) for name in ("tensor_parallel", "ring")),
    ],
)
def test_two_processes_make_the_picture_of_one(tmp_path: Path, degree: str):
    split = ["--nproc", "2", degree, "2", "--compare", "--output", "split.png", "--seed", "7"]
    done = run("generate", *QUICK, *split, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    pixel, relative = DIFFERENCE.search(done.stdout).groups()
    assert int(pixel) <= 1
    assert float(relative) < 1e-3
    assert done.stdout.count("wrote ") == 1
    assert files(tmp_path) == {"split.png"}


@pytest.mark.slow
def test_seed_and_prompt_decide_the_picture(tmp_path: Path):
    for name, more in {"a": [], "b": [], "c": ["--seed", "43"], "d": ["--prompt", "a red fox"]}.items():
        done = run("generate", *QUICK, "--output", f"{name}.png", *more, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    a, b, c, d = (np.asarray(Image.open(tmp_path / f"{name}.png")).astype(int) for name in "abcd")
    assert (a == b).all()
    assert np.abs(a - c).max() > 8
    assert np.abs(a - d).max() > 0


@pytest.mark.slow
def test_torchrun_makes_the_picture_of_nproc(tmp_path: Path):
    arguments = ["generate", *QUICK, "--ulysses_degree", "2"]
    launched = run(*arguments, "--nproc", "2", "--output", "nproc.png", cwd=tmp_path)
    assert launched.returncode == 0, launched.stderr
    done = torchrun([*COMMAND, *arguments, "--output", "torchrun.png"], tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("wrote torchrun.png") == 1
    one, other = (np.asarray(Image.open(tmp_path / f"{name}.png")).astype(int) for name in ("nproc", "torchrun"))
    assert np.abs(one - other).max() <= 1


@pytest.fixture
def video_model(tmp_path: Path) -> Path:
    """A tiny video pipeline in a folder, made of the tiny pipeline's tokenizer, text encoder and autoencoder."""
    import torch
    from diffusers import DDIMScheduler, DiffusionPipeline, LattePipeline, LatteTransformer3DModel

    tiny = DiffusionPipeline.from_pretrained(TINY_PIPELINE)
    torch.manual_seed(0)
    transformer = LatteTransformer3DModel(
        num_attention_heads=4, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2, patch_size=2,
        cross_attention_dim=32, sample_size=16, caption_channels=64, activation_fn="gelu-approximate",
        norm_type="ada_norm_single", norm_elementwise_affine=False, norm_eps=1e-6, attention_bias=True, video_length=4,
    )  # fmt: skip
    scheduler = DDIMScheduler(beta_schedule="linear", steps_offset=1, clip_sample=False)
    pipe = LattePipeline(tiny.tokenizer_3, tiny.text_encoder_3, tiny.vae, transformer, scheduler)
    pipe.save_pretrained(tmp_path / "video")
    return tmp_path / "video"


def test_a_video_pipeline_writes_a_video(tmp_path: Path, video_model: Path):
    import imageio

    arguments = [*QUICK, "--model", str(video_model), "--num_frames", "4", "--output", "v.gif", "--fps", "5"]
    done = run("generate", *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "1 video of 4 frames, 128 x 128 pixels" in done.stdout
    assert len(imageio.mimread(tmp_path / "v.gif")) == 4
    assert files(tmp_path) == {"video", "v.gif"}


def torchrun(command: list[str], cwd: Path, timeout: float = 240) -> subprocess.CompletedProcess[str]:
    """The command on two processes of PyTorch's own launcher."""
    launcher = [*TORCHRUN, "--master_port", "0", "--rdzv_backend", "c10d", "--rdzv_endpoint", "127.0.0.1:0"]
    return subprocess.run(
        [*launcher, "--local_addr", "127.0.0.1", "--no_python", *command],
        cwd=cwd,
        env={**clean_environment(), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=timeout,
    )


@pytest.mark.parametrize(
    ("flags_of_rank_1", "expected"),
    [
        pytest.param("--ring_degree 2", "plan", id="another plan", marks=pytest.mark.slow),
        pytest.param("--ulysses_degree 2 --height 192", "input", id="other inputs"),
    ],
)
def test_a_rank_that_disagrees_ends_all(tmp_path: Path, flags_of_rank_1: str, expected: str):
    command = " ".join([*COMMAND, "generate", *QUICK])
    script = f'if [ "$RANK" = 1 ]; then exec {command} {flags_of_rank_1}; fi; exec {command} --ulysses_degree 2'
    done = torchrun(["sh", "-c", script], tmp_path, timeout=120)
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if line.startswith("xdit-compile: error: ")]
    assert lines
    assert any(expected in line for line in lines), lines
    assert files(tmp_path) == set()


def start(tmp_path: Path) -> subprocess.Popen[str]:
    """A command of two processes that would run for a long time; what it prints goes to a file."""
    arguments = ["generate", *SMALL, "--nproc", "2", "--ulysses_degree", "2"]
    with open(tmp_path / "log", "w") as log:
        return subprocess.Popen(
            [*COMMAND, *arguments, "--num_inference_steps", "900"],
            cwd=tmp_path,
            env=clean_environment(),
            stdout=log,
            stderr=log,
            text=True,
        )


def workers_of(process: subprocess.Popen[str]) -> dict[int, psutil.Process]:
    """The processes that a command has started, by rank."""
    children = psutil.Process(process.pid).children(recursive=True)
    return {int(child.environ()["RANK"]): child for child in children if "worker" in child.cmdline()}


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[str], limit_s: float = 180) -> None:
    """Wait while a command runs; fail where it ends first or the limit passes."""
    limit = time.monotonic() + limit_s
    while not condition():
        assert process.poll() is None
        assert time.monotonic() < limit
        time.sleep(0.1)


def test_a_killed_rank_ends_the_command_within_30_seconds(tmp_path: Path):
    process = start(tmp_path)
    log = tmp_path / "log"
    wait_until(lambda: re.search(r" [1-9]\d*/900 ", log.read_text()) is not None, process)
    workers = workers_of(process)
    assert set(workers) == {0, 1}
    workers[1].kill()
    begin = time.monotonic()
    assert process.wait(timeout=60) == 1
    assert time.monotonic() - begin < 30
    lines = log.read_text().replace("\r", "\n").splitlines()
    assert [line for line in lines if line.startswith("xdit-compile: error: ")] == [
        "xdit-compile: error: rank 1 was killed by SIGKILL; see that there is memory enough, and start again"
    ]
    assert files(tmp_path) == {"log"}
    assert not any(worker.is_running() for worker in workers.values())


def test_workers_end_with_the_command_that_started_them(tmp_path: Path):
    process = start(tmp_path)
    wait_until(lambda: set(workers_of(process)) == {0, 1}, process)
    workers = workers_of(process)
    wait_until(lambda: all(len(worker.threads()) > 1 for worker in workers.values()), process)
    process.kill()
    process.wait(timeout=30)
    gone, alive = psutil.wait_procs(list(workers.values()), timeout=5)
    for worker in alive:
        worker.kill()
    assert len(gone) == 2
    assert files(tmp_path) == {"log"}


def test_explain_reads_no_weights_and_needs_one_process(tmp_path: Path):
    shutil.copytree(TINY_PIPELINE, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    done = run("explain", "--model", "model", "--ulysses_degree", "2", "--ring_degree", "2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "all_to_all" in done.stdout or "all-to-all" in done.stdout
    assert files(tmp_path) == {"model"}


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("--component nothing", "--component nothing is not in this pipeline; choose one of"),
        ("--component transformer --inputs nowhere.pt", "--inputs nowhere.pt is no file"),
        ("--ulysses_degree 0", "--ulysses_degree 0 must be"),
        ("--ulysses_degree 2 --link fast", "--link fast must be bytes per second of one rank, such as '450GB/s'"),
    ],
)
def test_explain_refuses_in_one_line(tmp_path: Path, arguments: str, expected: str):
    assert expected in one_error(run("explain", *arguments.split(), cwd=tmp_path), exit_code=2)


def test_request_survives_the_way_to_the_workers():
    from xdit_compile import Plan
    from xdit_compile.cli.options.request import Request

    request = Request(
        Plan(ulysses=2, timeout_s=3.5), prompt=('ein "Leuchtturm"\n—', "b"), seed=2**62, guidance_scale=1.5
    )
    assert Request.from_json(request.to_json()) == request
    assert json.loads(request.to_json())["plan"]["ulysses"] == 2


def test_the_pipeline_is_gone_before_the_reference_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Both on one device would need its memory twice; what stands in the place of a module holds it in a circle."""
    import torch

    from xdit_compile import Plan
    from xdit_compile.cli.options.request import Request
    from xdit_compile.cli.running import generate
    from xdit_compile.distributed.world import World
    from xdit_compile.ir import peak_memory as memory

    request = Request(
        model=str(TINY_PIPELINE), plan=Plan(backend="eager"), output=str(tmp_path / "a.png"), compare=True,
        num_inference_steps=1, height=64, width=64, device="cpu",
    )  # fmt: skip
    parts, emptied = {}, []
    own = generate.open_parallel

    def opened(request: Request, world: World) -> Any:
        pipe = own(request, world)
        modules = {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
        parts.update((name, weakref.ref(part)) for name, part in modules.items())
        parts.update((f"weights of {name}", weakref.ref(next(part.parameters()))) for name, part in modules.items())
        return pipe

    def compared(request: Request) -> tuple[Pixels, float]:
        assert [name for name, part in parts.items() if part() is not None] == [] and len(emptied) == 1
        return Pixels(np.zeros((1, 64, 64, 3), dtype=np.float32)), 1.0

    gc.disable()
    try:
        monkeypatch.setattr(generate, "open_parallel", opened)
        monkeypatch.setattr(generate, "reference", compared)
        monkeypatch.setattr(memory, "release_unused", emptied.append)
        generate.generate(request, World())
    finally:
        gc.enable()
    assert len(parts) > 6
