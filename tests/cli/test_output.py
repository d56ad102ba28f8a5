"""Pixels, files and differences."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import imageio
import numpy as np
import pytest
import torch
from PIL import Image

from xdit_compile.cli.running.output import Pixels, difference, pixels_of
from xdit_compile.cli.running.saving import write
from xdit_compile.errors import XditCompileError


def _ramp(*shape: int) -> np.ndarray:
    return np.linspace(0, 1, int(np.prod(shape)), dtype=np.float32).reshape(shape)


def test_every_form_of_images_gives_the_same_pixels():
    values = np.round(_ramp(2, 6, 7, 3) * 255) / 255
    pictures = [Image.fromarray((item * 255).round().astype(np.uint8)) for item in values]
    forms = [values, pictures, torch.from_numpy(values).permute(0, 3, 1, 2), list(values)]
    for form in forms:
        found = pixels_of(SimpleNamespace(images=form))
        assert not found.is_video
        np.testing.assert_allclose(found.values, values, atol=1e-6)


def test_every_form_of_frames_gives_the_same_video():
    values = np.round(_ramp(1, 5, 6, 7, 3) * 255) / 255
    pictures = [[Image.fromarray((frame * 255).round().astype(np.uint8)) for frame in video] for video in values]
    forms = [values, pictures, torch.from_numpy(values).permute(0, 1, 4, 2, 3), values[0]]
    for form in forms:
        found = pixels_of(SimpleNamespace(frames=form))
        assert found.is_video
        np.testing.assert_allclose(found.values, values, atol=1e-6)


def test_what_is_no_picture_is_refused():
    with pytest.raises(XditCompileError, match="neither images nor frames"):
        pixels_of(SimpleNamespace(audios=_ramp(1, 8)))
    broken = _ramp(1, 4, 4, 3)
    broken[0, 1, 1, 1] = np.nan
    with pytest.raises(XditCompileError, match="not finite; try --dtype float32"):
        pixels_of(SimpleNamespace(images=broken))


def test_difference_counts_pixels_and_floats():
    one = Pixels(_ramp(1, 8, 8, 3))
    other = Pixels(one.values.copy())
    assert difference(one, other).absolute == 0
    other.values[0, 3, 3, 0] += 0.1
    found = difference(one, other)
    assert found.absolute == pytest.approx(0.1, rel=1e-5)
    assert found.pixel in (25, 26)
    with pytest.raises(XditCompileError, match="differ in shape"):
        difference(one, Pixels(_ramp(1, 8, 9, 3)))


@pytest.mark.parametrize("suffix", [".png", ".webp", ".jpg"])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_images_are_written_and_numbered(tmp_path: Path, suffix: str, channels: int):
    if channels == 4 and suffix == ".jpg":
        channels = 3
    written = write(Pixels(_ramp(2, 8, 6, channels)), str(tmp_path / f"a{suffix}"), fps=8)
    assert [path.name for path in written] == [f"a{suffix}", f"a-1{suffix}"]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(path.name for path in written)
    assert Image.open(written[0]).size == (6, 8)


def test_png_holds_the_pixels_exactly(tmp_path: Path):
    pixels = Pixels(_ramp(1, 16, 16, 3))
    (path,) = write(pixels, str(tmp_path / "a.png"), fps=8)
    np.testing.assert_array_equal(np.asarray(Image.open(path)), pixels.bytes()[0])


@pytest.mark.parametrize(("suffix", "size"), [(".mp4", (64, 48)), (".gif", (64, 48)), (".mp4", (33, 35))])
def test_videos_are_written(tmp_path: Path, suffix: str, size: tuple[int, int]):
    height, width = size
    (path,) = write(Pixels(_ramp(1, 7, height, width, 3)), str(tmp_path / f"a{suffix}"), fps=5)
    frames = imageio.mimread(path)
    assert len(frames) == 7
    even = suffix == ".mp4"
    assert frames[0].shape[:2] == ((height + height % 2, width + width % 2) if even else size)
    assert abs(frames[-1][..., :3].astype(int).mean() - 255 * 13 / 14) < 8


def test_bytes_are_rounded_and_not_cut():
    values = np.array([0, 0.4, 0.6, 127.4, 127.6, 254.6, 255], dtype=np.float32) / 255
    assert Pixels(values).bytes().tolist() == [0, 0, 1, 127, 128, 255, 255]


@pytest.mark.parametrize("name", ["a.png", "a.gif", "a.mp4"])
def test_a_write_cut_short_leaves_nothing_and_keeps_what_was_there(tmp_path: Path, name: str):
    (tmp_path / name).write_bytes(b"before")
    shape = (1, 64, 64, 3) if name == "a.png" else (1, 9, 64, 64, 3)
    code = (
        "import resource, signal, numpy as np; from xdit_compile.cli.running.output import Pixels\n"
        "from xdit_compile.cli.running.saving import write\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        f"pixels = Pixels(np.random.default_rng(0).random({shape}, dtype=np.float32))\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))\n"
        f"write(pixels, {str(tmp_path / name)!r}, fps=8, overwrite=True)"
    )
    done = subprocess.run([sys.executable, "-B", "-c", code], capture_output=True, text=True, timeout=60)
    assert ("cut short" if name == "a.mp4" else "File too large") in done.stderr
    assert (tmp_path / name).read_bytes() == b"before"
    assert [path.name for path in tmp_path.iterdir()] == [name]
