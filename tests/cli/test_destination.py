"""Only the named file is written, only where that may be, and what was computed is never lost."""

from __future__ import annotations

import json
import os
import pty
import resource
import signal
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
from commands import COMMAND, TINY_PIPELINE, clean_environment, files, one_error, run
from PIL import Image

from xdit_compile.cli.options.destination import check_made
from xdit_compile.cli.options.request import DEMO_PIPELINE
from xdit_compile.cli.options.result_kind import kind_in_folder, kind_of
from xdit_compile.cli.running.output import Latents, Pixels
from xdit_compile.cli.running.saving import save, write
from xdit_compile.errors import UsageError, XditCompileError

QUICK = ["--model", str(TINY_PIPELINE), "--backend", "eager", "--height", "64", "--width", "64"]
STEP = [*QUICK, "--num_inference_steps", "1"]
BEFORE = b"before"


@pytest.mark.parametrize(
    ("there", "arguments", "expected"),
    [
        ("out.png", "generate --output out.mp4", "this pipeline makes images; end it in one of .png, .jpg, .jpeg"),
        ("out.png", "generate", "out.png exists; give --overwrite, or another --output"),
        ("a-2.png", "generate --output a.png --num_images_per_prompt 3", "a-2.png exists; give --overwrite"),
        ("a-1.png", "generate --output a.png --prompt one --prompt two", "a-1.png exists; give --overwrite"),
        ("out.safetensors", "generate --output_type latent", "out.safetensors exists; give --overwrite"),
        ("a.png", "generate --output /proc/self/a.png", "/proc/self/a.png cannot be written: No such file"),
        ("a.png", f"generate --output {'a' * 300}.png", "cannot be written: File name too long"),
        ("evaluation/report.json", "evaluate", "evaluation/report.json exists; give --overwrite"),
        (
            "e/images/0002-plan.png",
            "evaluate --output e --images --num_prompts 4",
            "e/images/0002-plan.png exists; give --overwrite",
        ),
        ("e/images", "evaluate --output e --images", "e/images is a file; it stands where a folder is needed"),
        ("evaluation/sheet.png", "evaluate --model video", "this pipeline makes videos, and this command takes images"),
        (
            "a.bundle",
            "build --cache_dir cache --output a.bundle",
            "a.bundle exists; give --overwrite, or another --output",
        ),
        (
            "a.bundle",
            "build --cache_dir cache --output no/a.bundle",
            "--output no/a.bundle: folder no does not exist; make it first",
        ),
    ],
)
def test_what_cannot_be_written_is_refused_and_what_was_there_stays(
    tmp_path: Path, there: str, arguments: str, expected: str
):
    _empty_pipeline(tmp_path / "video", "LattePipeline")
    (tmp_path / there).parent.mkdir(exist_ok=True, parents=True)
    (tmp_path / there).write_bytes(BEFORE)
    before = files(tmp_path)
    assert expected in one_error(run(*arguments.split(), cwd=tmp_path), exit_code=2)
    assert (tmp_path / there).read_bytes() == BEFORE
    assert files(tmp_path) == before


def test_a_full_disk_is_noticed_before_anything_runs(tmp_path: Path):
    done = subprocess.run(
        [*COMMAND, "generate"], cwd=tmp_path, env=clean_environment(), capture_output=True, text=True, timeout=60,
        preexec_fn=_full_disk,
    )  # fmt: skip
    assert "out.png cannot be written: File too large; give another --output" in one_error(done, exit_code=2)
    assert files(tmp_path) == set()


def _full_disk() -> None:
    """Files of this process can hold a few bytes."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))


def _empty_pipeline(folder: Path, name: str) -> Path:
    """A pipeline of a class, without any component."""
    folder.mkdir()
    (folder / "model_index.json").write_text(json.dumps({"_class_name": name}))
    return folder


def test_a_terminal_is_asked_and_a_no_keeps_the_file(tmp_path: Path):
    (tmp_path / "out.png").write_bytes(BEFORE)
    code, said = _at_a_terminal(["generate"], "n\n", tmp_path)
    assert code == 1
    assert "out.png exists. Overwrite? [y/N]:" in said
    assert said.rstrip().endswith("xdit-compile: error: out.png stays as it was; give another --output")
    assert (tmp_path / "out.png").read_bytes() == BEFORE


@pytest.mark.slow
def test_a_terminal_is_asked_and_a_yes_writes_over_the_file(tmp_path: Path):
    (tmp_path / "out.png").write_bytes(BEFORE)
    code, said = _at_a_terminal(["generate", *STEP], "y\n", tmp_path)
    assert code == 0, said
    assert Image.open(tmp_path / "out.png").size == (64, 64)
    assert files(tmp_path) == {"out.png"}


def _at_a_terminal(arguments: list[str], answer: str, cwd: Path) -> tuple[int, str]:
    """The exit code of a command whose terminal answers, and everything that is shown there."""
    mine, its = pty.openpty()
    with subprocess.Popen(
        [*COMMAND, *arguments], cwd=cwd, env=clean_environment(), stdin=its, stdout=its, stderr=its
    ) as process:
        os.close(its)
        os.write(mine, answer.encode())
        said = b""
        while True:
            try:
                piece = os.read(mine, 4096)
            except OSError:
                break
            if not piece:
                break
            said += piece
        os.close(mine)
        return process.wait(timeout=60), said.decode()


def _picture(*shape: int) -> Pixels:
    return Pixels(np.linspace(0, 1, int(np.prod(shape)), dtype=np.float32).reshape(shape))


@pytest.mark.parametrize(
    ("made", "name", "suffix", "why"),
    [
        (_picture(2, 16, 16, 3), "a.webp", ".webp", "No such file or directory"),
        (_picture(1, 4, 16, 16, 3), "a.mp4", ".mp4", "No such file or directory"),
        (Latents(np.ones((1, 4), dtype=np.float32)), "a.safetensors", ".safetensors", "No such file or directory"),
        (_picture(1, 16, 16, 3), "a.mp4", ".png", "this pipeline makes images; end it in one of .png"),
        (_picture(1, 4, 16, 16, 3), "a.png", ".mp4", "this pipeline makes videos; end it in one of .mp4"),
    ],
)
def test_what_cannot_be_written_goes_elsewhere(
    made: Pixels | Latents, name: str, suffix: str, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(XditCompileError) as told:
        save(made, f"/proc/self/{name}", fps=8)
    assert why in str(told.value)
    assert told.value.exit_code == 1
    kept = str(told.value).partition(" went to ")[2].split(", ")
    assert len(kept) == len(made.values) and all(file.startswith(str(tmp_path)) for file in kept)
    assert all(file.endswith(suffix) and os.path.getsize(file) > 50 for file in kept)


def test_where_the_temporary_folder_is_full_as_well_the_next_one_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("tempfile.tempdir", "/proc/self/none")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(XditCompileError, match="the picture went to ") as told:
        save(_picture(1, 16, 16, 3), "/proc/self/a.png", fps=8)
    assert str(told.value).partition(" went to ")[2].startswith(str(tmp_path / "cache"))


def test_a_file_that_came_meanwhile_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    (tmp_path / "a.png").write_bytes(BEFORE)
    with pytest.raises(XditCompileError, match="something came there meanwhile; the picture went to "):
        save(_picture(1, 16, 16, 3), str(tmp_path / "a.png"), fps=8)
    assert (tmp_path / "a.png").read_bytes() == BEFORE
    save(_picture(1, 16, 16, 3), str(tmp_path / "a.png"), fps=8, overwrite=True)
    assert Image.open(tmp_path / "a.png").size == (16, 16)


@pytest.mark.slow
def test_a_folder_that_took_no_file_in_the_end_costs_no_picture(tmp_path: Path):
    """The real command: a folder comes to stand, while it computes, where the picture was to be written."""
    process = subprocess.Popen(
        [*COMMAND, "generate", *QUICK, "--num_inference_steps", "200"], cwd=tmp_path, text=True,
        env={**clean_environment(), "TMPDIR": str(tmp_path)}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    limit = time.monotonic() + 120
    seen = ""
    assert process.stdout is not None
    while "ready in" not in seen:
        assert time.monotonic() < limit and process.poll() is None, seen
        seen += process.stdout.readline()
    (tmp_path / "out.png").mkdir()
    rest = process.communicate(timeout=120)[0]
    assert process.returncode == 1, rest
    (kept,) = (line.partition("the picture went to ")[2] for line in rest.splitlines() if "went to" in line)
    assert Image.open(kept).size == (64, 64)


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_every_file_has_the_mode_of_new_files(tmp_path: Path, umask: int):
    before = os.umask(umask)
    try:
        written = write(Latents(np.ones((1, 4), dtype=np.float32)), str(tmp_path / "a.safetensors"), fps=8)
        written += write(_picture(1, 16, 16, 3), str(tmp_path / "a.png"), fps=8)
        written += write(_picture(1, 4, 16, 16, 3), str(tmp_path / "a.mp4"), fps=8)
    finally:
        os.umask(before)
    assert {file.stat().st_mode & 0o777 for file in written} == {0o666 & ~umask}


def test_a_link_leads_to_the_file_that_is_written(tmp_path: Path):
    (tmp_path / "real.png").write_bytes(BEFORE)
    (tmp_path / "a.png").symlink_to("real.png")
    write(_picture(1, 16, 16, 3), str(tmp_path / "a.png"), fps=8, overwrite=True)
    assert (tmp_path / "a.png").is_symlink()
    assert Image.open(tmp_path / "real.png").size == (16, 16)


def test_what_a_pipeline_makes_is_read_in_its_source(tmp_path: Path):
    assert kind_in_folder(DEMO_PIPELINE) == "images"
    kinds = {"LattePipeline": "videos", "StableAudioPipeline": "audios", "Nothing": None}
    for name, kind in kinds.items():
        assert kind_in_folder(_empty_pipeline(tmp_path / name, name)) == kind

    class Video:
        def __call__(self, prompt: str) -> SimpleNamespace:
            return SimpleNamespace(frames=prompt)

    assert kind_of(Video()) == "videos"
    with pytest.raises(UsageError, match="this pipeline makes audios, and this command takes images and videos alone"):
        check_made("audios")


@pytest.mark.slow
def test_it_is_known_of_nearly_every_pipeline_what_it_makes(tmp_path: Path):
    names = {name for name in diffusers._import_structure["pipelines"] if name.endswith("Pipeline")}
    kinds = [kind_in_folder(_empty_pipeline(tmp_path / name, name)) for name in names]
    assert len(names) > 250
    assert kinds.count(None) < 0.07 * len(names)
    assert kinds.count("images") > 150 and kinds.count("videos") > 60
