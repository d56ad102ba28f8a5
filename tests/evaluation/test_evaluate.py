"""The command `evaluate` as a user types it, on the embedded pipeline."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from commands import COMMAND, TINY_PIPELINE, clean_environment, files, one_error, run
from PIL import Image

from xdit_compile.cli.inputs.asked import prompts_in
from xdit_compile.cli.options.evaluation_request import EvaluationRequest
from xdit_compile.plan import Plan

QUICK = f"--model {TINY_PIPELINE} --num_inference_steps 2 --backend eager --height 64 --width 96".split()
TWO = "--nproc 2 --ulysses_degree 2".split()


def report(folder: Path) -> dict:
    """What a command wrote; numbers that are not finite are refused."""

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    return json.loads((folder / "report.json").read_text(), parse_constant=refuse)


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory) -> tuple[Path, str]:
    """One evaluation of Ulysses on two processes, and what it printed."""
    folder = tmp_path_factory.mktemp("two")
    done = run("evaluate", *QUICK, *TWO, *"--num_prompts 6 --batch_size 2 --images".split(), cwd=folder)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stderr.splitlines() if " s so far)" not in line]
    assert [re.sub(r"[\d.]+ s", "", line).split(":")[0] for line in lines] == ["transformer ready in ", "time"], lines
    return folder, done.stdout


def test_it_writes_a_report_a_sheet_and_the_pictures(two_processes: tuple[Path, str]):
    folder, said = two_processes
    assert files(folder) == {"evaluation"}
    assert files(folder / "evaluation") == {"report.json", "sheet.png", "images"}
    assert len(files(folder / "evaluation" / "images")) == 12 + 1
    assert Image.open(folder / "evaluation" / "images" / "0000-plan.png").size == (96, 64)
    assert Image.open(folder / "evaluation" / "sheet.png").width > 900
    for part in ("6 pairs of pictures", "PSNR, dB", "5 captions of one thing", "1 caption of two things",
                 "not Inception FID", "wrote evaluation/report.json"):  # fmt: skip
        assert said.count(part) == 1, said


def test_the_report_holds_the_settings_every_figure_and_every_pair(two_processes: tuple[Path, str]):
    found = report(two_processes[0] / "evaluation")
    assert set(found) == {"settings", "distances", "following", "following_pairs", "frechet", "pairs"}
    settings = found["settings"]
    assert (settings["processes"], settings["num_prompts"], settings["height"], settings["width"]) == (2, 6, 64, 96)
    assert settings["plan"]["ulysses"] == 2
    assert [pair["seed"] for pair in found["pairs"]] == list(range(42, 48))
    assert len({pair["caption"] for pair in found["pairs"]}) == 6
    right = found["following"]["one thing"]["right"]
    assert set(right) == {"reference", "plan", "difference"}
    assert right["difference"]["low"] <= right["difference"]["value"] <= right["difference"]["high"]
    assert found["frechet"]["features"] == "scenes" and found["frechet"]["drawn"] == 6
    assert found["frechet"]["plan_to_drawn"] > 1


def test_an_exact_plan_makes_the_pictures_of_one_process(two_processes: tuple[Path, str]):
    """Every picture of a batch, not only its first: each has a seed of its own, without the plan and with it."""
    found = report(two_processes[0] / "evaluation")
    for pair in found["pairs"]:
        assert pair["largest"] <= 1
        assert pair["psnr"] is None or pair["psnr"] > 60
        assert pair["ssim"] > 0.999
        assert pair["reference"] == pair["plan"]
    assert abs(found["frechet"]["plan_to_reference"]) < 0.01


def test_the_figures_are_those_of_the_pictures(two_processes: tuple[Path, str]):
    folder = two_processes[0] / "evaluation"
    for index, pair in enumerate(report(folder)["pairs"]):
        plan, reference = (
            np.asarray(Image.open(folder / "images" / f"{index:04}-{name}.png")).astype(float)
            for name in ("plan", "reference")
        )
        error = ((plan - reference) ** 2).mean()
        assert pair["largest"] == np.abs(plan - reference).max()
        assert (pair["psnr"] is None) == pair["identical"] == (error == 0)
        if error:
            assert pair["psnr"] == pytest.approx(10 * math.log10(255**2 / error), abs=1e-3)


@pytest.mark.slow
def test_pictures_of_one_process_are_taken_from_an_earlier_evaluation(two_processes: tuple[Path, str]):
    folder = two_processes[0]
    again = [*QUICK, *"--num_prompts 6 --batch_size 2 --num_pipeline_patch 2 --reference evaluation".split()]
    done = run("evaluate", *again, *"--output again".split(), cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "one process: " not in done.stdout
    first, second = (report(folder / name)["following"]["one thing"]["right"] for name in ("evaluation", "again"))
    assert first["reference"] == second["reference"]
    assert one_error(run("evaluate", *again, *"--seed 3".split(), cwd=folder), 2) == (
        "--reference evaluation holds pictures of another seed: 42; give the same flags as there, or leave it out"
    )


@pytest.mark.slow
def test_own_prompts_on_one_process(tmp_path: Path):
    prompts = ["a lighthouse at dusk", "a red circle at the top", "a fox"]
    (tmp_path / "mine.txt").write_text("\n".join([prompts[0], "", *prompts[1:], " "]))
    done = run("evaluate", *QUICK, *"--prompts mine.txt --seed 7 --output found --batch_size 3".split(), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = report(tmp_path / "found")
    assert [(pair["caption"], pair["seed"]) for pair in found["pairs"]] == list(zip(prompts, (7, 8, 9), strict=True))
    assert found["settings"]["prompts"] == "mine.txt"
    assert found["distances"]["identical"] == 3 and found["distances"]["psnr"] is None
    assert found["following_pairs"] == {"one thing": 1}
    assert [pair["plan"] is None for pair in found["pairs"]] == [True, False, True]
    assert found["frechet"]["plan_to_drawn"] is None
    assert files(tmp_path / "found") == {"report.json", "sheet.png"}


@pytest.mark.slow
def test_pictures_do_not_depend_on_the_batches(two_processes: tuple[Path, str], tmp_path: Path):
    done = run("evaluate", *QUICK, *"--num_prompts 6 --batch_size 6 --images".split(), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for index in range(6):
        name = f"evaluation/images/{index:04}-reference.png"
        one, other = (np.asarray(Image.open(folder / name)).astype(int) for folder in (tmp_path, two_processes[0]))
        assert np.abs(one - other).max() <= 1


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("--prompts empty.txt", "--prompts empty.txt holds no prompt; write one a line"),
        ("--prompts nowhere.txt", "--prompts nowhere.txt cannot be read"),
        ("--height 250", "--height 250 is no multiple of 16, as this model needs; take 240 or 256"),
        ("--model partly", "--model partly is not whole: there is no folder vae"),
        ("--num_prompts 0", "--num_prompts 0 must be at least 1"),
        ("--num_prompts 5000", "--num_prompts 5000 is too many; at most 4096"),
        ("--batch_size 0", "--batch_size 0 must be at least 1"),
        ("--features vgg", "--features vgg is unknown; choose one of scenes, inception"),
        ("--output empty.txt", "--output empty.txt is a file; name a folder"),
        ("--output nowhere/found", "folder nowhere does not exist"),
        ("--nproc 2 --ring_degree 3", "needs 3 processes, and --nproc 2 asks for 2; give --nproc 3"),
    ],
)
def test_a_wrong_request_is_one_line_and_exit_code_2(tmp_path: Path, arguments: str, expected: str):
    (tmp_path / "empty.txt").write_text("\n  \n")
    shutil.copytree(TINY_PIPELINE, tmp_path / "partly", ignore=shutil.ignore_patterns("vae"))
    assert expected in one_error(run("evaluate", *arguments.split(), cwd=tmp_path), exit_code=2)
    assert files(tmp_path) == {"empty.txt", "partly"}


@pytest.mark.parametrize("command", ["generate", "explain"])
def test_the_other_commands_look_at_folder_and_size_too(tmp_path: Path, command: str):
    shutil.copytree(TINY_PIPELINE, tmp_path / "partly", ignore=shutil.ignore_patterns("tokenizer_2"))
    line = one_error(run(command, *"--model partly --width 100".split(), cwd=tmp_path), exit_code=2)
    assert "there is no folder tokenizer_2" in line
    line = one_error(run(command, "--width", "100", cwd=tmp_path), exit_code=2)
    assert "--width 100 is no multiple of 16, as this model needs; take 96 or 112" in line
    assert files(tmp_path) == {"partly"}


def test_it_refuses_before_anything_heavy_is_imported(tmp_path: Path):
    (tmp_path / "empty.txt").touch()
    code = (
        "import sys; from xdit_compile.cli.main import main;"
        "flags = [['--help'], ['--prompts', 'empty.txt'], ['--height', '250'], ['--features', 'vgg']];"
        "codes = [main(['evaluate', *one]) for one in flags];"
        "print(codes, sorted({'torch', 'torchmetrics', 'scipy', 'numpy', 'diffusers'} & set(sys.modules)))"
    )
    begin = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=clean_environment(), capture_output=True, text=True, timeout=60
    )
    assert done.stdout.splitlines()[-1] == "[0, 2, 2, 2] []", done.stderr
    assert time.monotonic() - begin < 10


@pytest.mark.parametrize("missing", [["torchmetrics"], ["torchmetrics", "scipy"]])
def test_missing_libraries_are_named_with_what_to_install(tmp_path: Path, missing: list[str]):
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({missing}));"
        "from xdit_compile.cli.main import main; sys.exit(main(['evaluate']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=clean_environment(), capture_output=True, text=True, timeout=60
    )
    expected = f"evaluate needs {' and '.join(missing)}; pip install 'xdit-compile[evaluate]'"
    assert one_error(done, exit_code=2) == expected


def test_inception_says_where_its_weights_belong(tmp_path: Path):
    """Without torch-fidelity it names the package, with it the file."""
    done = run("evaluate", "--features", "inception", cwd=tmp_path, TORCH_HOME=str(tmp_path / "cache"))
    assert "--features inception needs " in one_error(done, exit_code=2)
    package = tmp_path / "site" / "torch_fidelity"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    environment = {"TORCH_HOME": str(tmp_path / "cache"), "PYTHONPATH": str(tmp_path / "site")}
    done = run("evaluate", "--features", "inception", cwd=tmp_path, **environment)
    expected = f"needs weights-inception-2015-12-05-6726825d.pth of torch-fidelity in {tmp_path}/cache/hub/checkpoints"
    assert expected in one_error(done, exit_code=2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("images", "there", "gone", "why"),
    [
        ([], "a/out", "a", "No such file or directory"),
        (["--images"], "a/out", "a", "No such file or directory"),
        (["--images"], "a/out/images/reference.json", "a/out/images", "Not a directory"),
    ],
    ids=["figures", "all pictures", "a file where a folder was"],
)
def test_figures_whose_folder_is_gone_in_the_end_are_kept_elsewhere(
    tmp_path: Path, images: list[str], there: str, gone: str, why: str
):
    """The real command: what is ``gone`` is moved away once ``there`` is there, long before the report is written."""
    for folder in ("a", "safe"):
        (tmp_path / folder).mkdir()
    asked = [*COMMAND, "evaluate", *QUICK, "--num_prompts", "2", "--output", "a/out", *images]
    environment = clean_environment() | {"TMPDIR": str(tmp_path / "safe")}
    with subprocess.Popen(asked, cwd=tmp_path, env=environment, text=True, stderr=subprocess.PIPE) as process:
        limit = time.monotonic() + 120
        while not (tmp_path / there).exists():
            assert time.monotonic() < limit and process.poll() is None
            time.sleep(0.01)
        (tmp_path / gone).rename(tmp_path / "gone")
        if why == "Not a directory":
            (tmp_path / gone).touch()
        said = process.communicate(timeout=120)[1]
    (kept,) = (tmp_path / "safe").glob("xdit-compile-*")
    error = said.splitlines()[-1]
    assert process.returncode == 1 and f"error: --output a/out cannot be written: {why}; report.json" in error
    assert error.endswith(f" went to {kept}")
    assert files(kept) == {"report.json", "sheet.png", *(["images"] if images else [])}
    assert report(kept)["settings"]["num_prompts"] == 2
    if images:
        pictures = {f"{index:04}-{which}.png" for index in range(2) for which in ("plan", "reference")}
        assert files(kept / "images") == {*pictures, "reference.json"}


@pytest.mark.slow
def test_a_failure_of_a_rank_is_one_line(tmp_path: Path):
    shutil.copytree(TINY_PIPELINE, tmp_path / "broken")
    weights = tmp_path / "broken" / "transformer" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    line = one_error(run("evaluate", *QUICK, *TWO, "--model", "broken", cwd=tmp_path), exit_code=1)
    assert "rank " in line and "--model broken cannot be loaded" in line
    assert files(tmp_path) == {"broken"}


def test_the_request_survives_the_way_to_the_workers():
    request = EvaluationRequest(Plan(ulysses=2), prompts="ä b.txt", num_prompts=3, use_resolution_binning=False)
    assert EvaluationRequest.from_json(request.to_json()) == request


def test_a_file_of_prompts_may_have_a_mark_and_windows_lines(tmp_path: Path):
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffa fox\r\n\r\nein Bär \r\n".encode())
    assert prompts_in(str(path), "--prompts") == ["a fox", "ein Bär"]
