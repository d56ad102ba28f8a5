"""What is seen of a pipeline's folder before anything is loaded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from commands import TINY_PIPELINE

from xdit_compile.cli.options.request import Request
from xdit_compile.distributed.world import World
from xdit_compile.errors import UsageError
from xdit_compile.weights.model_folder import check_parts, check_size, pixel_multiple


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A copy of the embedded pipeline that a test may break."""
    return Path(shutil.copytree(TINY_PIPELINE, tmp_path / "model"))


def folder_of(path: Path, class_name: str = "SomePipeline", **components: dict) -> Path:
    """A pipeline folder of configurations alone."""
    index = {"_class_name": class_name} | {name: ["diffusers", "Some"] for name in components}
    for name, configuration in components.items():
        (path / name).mkdir()
        (path / name / "config.json").write_text(json.dumps(configuration))
    (path / "model_index.json").write_text(json.dumps(index))
    return path


def test_the_embedded_pipeline_is_whole():
    check_parts(TINY_PIPELINE, weights=True)
    assert pixel_multiple(TINY_PIPELINE) == 16


def test_everything_that_is_missing_is_named_at_once(model: Path):
    shutil.rmtree(model / "vae")
    (model / "text_encoder_3" / "model.safetensors").unlink()
    shutil.rmtree(model / "tokenizer")
    (model / "tokenizer").mkdir()
    with pytest.raises(UsageError) as caught:
        check_parts(model, weights=True)
    for part in ("no folder vae", "text_encoder_3 has no weights", "tokenizer is empty", "is not whole"):
        assert part in str(caught.value)
    assert "scheduler" not in str(caught.value) and "image_encoder" not in str(caught.value)


def test_explain_needs_no_weights(model: Path):
    for file in model.rglob("*.safetensors"):
        file.unlink()
    check_parts(model, weights=False)
    Request(model=str(model)).check(World(), weights=False)
    with pytest.raises(UsageError, match="transformer has no weights"):
        Request(model=str(model)).check(World())


@pytest.mark.parametrize(
    ("autoencoder", "denoiser", "expected"),
    [
        ({"block_out_channels": [8, 16, 16, 16]}, {"patch_size": 2}, 16),
        ({"block_out_channels": [8, 16, 16, 16]}, {}, 8),
        ({"block_out_channels": [8]}, {"patch_size": 4}, 4),
        ({"encoder_block_out_channels": [1, 2, 3, 4, 5, 6]}, {"patch_size": 1}, 32),
        ({"dim_mult": [1, 2, 4, 4], "scale_factor_spatial": 16}, {"patch_size": [1, 2, 2]}, 32),
        ({"dim_mult": [1, 2, 4, 4]}, {"patch_size": [1, 2, 2]}, 16),
        ({"spatial_compression_ratio": 32, "block_out_channels": [1, 2]}, {"patch_size": None}, 32),
        ({"latent_channels": 4}, {"patch_size": 2}, None),
    ],
)
def test_what_must_divide_a_side_is_read_from_the_configurations(tmp_path: Path, autoencoder, denoiser, expected):
    assert pixel_multiple(folder_of(tmp_path, vae=autoencoder, transformer=denoiser)) == expected


def test_a_pipeline_without_an_autoencoder_takes_any_size(tmp_path: Path):
    folder = folder_of(tmp_path, unet={"patch_size": 2})
    assert pixel_multiple(folder) is None
    check_size(folder, 17, 3, False)


def test_a_size_that_does_not_divide_names_the_nearest():
    check_size(TINY_PIPELINE, 256, 16, False)
    with pytest.raises(UsageError) as caught:
        check_size(TINY_PIPELINE, 250, 9, False)
    assert "--height 250 is no multiple of 16, as this model needs; take 240 or 256" in str(caught.value)
    assert "--width 9 is no multiple of 16, as this model needs; take 16" in str(caught.value)


def test_a_pipeline_that_may_resize_takes_any_size():
    check_size(TINY_PIPELINE, 250, 300, True)


def test_a_size_that_was_asked_for_is_made_unless_resizing_was_asked_for_too():
    assert Request().binning is None
    assert Request(width=250).binning is False
    assert Request(width=250, use_resolution_binning=True).binning is True
    assert Request(use_resolution_binning=False).binning is False
