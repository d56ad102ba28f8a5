"""The figures of an evaluation against values computed by hand."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from scipy import stats

from xdit_compile.evaluation import intervals
from xdit_compile.evaluation.checker import judge
from xdit_compile.evaluation.distances import distances, perceptual
from xdit_compile.evaluation.drawing import draw
from xdit_compile.evaluation.features import FEATURES, WEIGHTS, FeatureNet, load_features
from xdit_compile.evaluation.fidelity import JUDGED, fidelity
from xdit_compile.evaluation.frechet import frechet_difference, frechet_distance, scene_features
from xdit_compile.evaluation.ideal import scene_of
from xdit_compile.evaluation.prompts import held_out_captions, questions
from xdit_compile.evaluation.sheet import contact_sheet
from xdit_compile.evaluation.table import render

ASKED = questions(held_out_captions(0, 12), 50)


@pytest.fixture(scope="module")
def net():
    """The trained network."""
    return load_features()


@pytest.fixture(scope="module")
def right() -> np.ndarray:
    """Pictures of all captions, everything right."""
    return np.stack([draw(scene_of(one.request, one.seed), 128) for one in ASKED])


def gray(value: int, count: int = 1, side: int = 32) -> np.ndarray:
    """Pictures of one shade."""
    return np.full((count, side, side, 3), value, np.uint8)


def test_identical_pictures_have_no_psnr(net, right):
    for found in distances(right, right.copy(), net):
        assert found.identical
        assert found.psnr is None
        assert found.ssim == pytest.approx(1, abs=1e-9)
        assert (found.perceptual, found.largest) == (0, 0)


def test_psnr_and_the_largest_difference_by_hand(net):
    (even,) = distances(gray(110), gray(100), net)
    assert even.psnr == pytest.approx(20 * math.log10(255 / 10), abs=1e-3)
    assert even.largest == 10
    one, other = gray(100), gray(100)
    one[0, 3, 4, 1] = 151
    (single,) = distances(one, other, net)
    assert single.psnr == pytest.approx(10 * math.log10(255**2 / (51**2 / (32 * 32 * 3))), abs=1e-3)
    assert (single.largest, single.identical) == (51, False)


def test_ssim_by_hand(net):
    """Of two even pictures only the term of the means is left (Wang et al. 2004)."""
    (found,) = distances(gray(51), gray(204), net)
    one, other, small = 0.2, 0.8, 0.01**2
    assert found.ssim == pytest.approx((2 * one * other + small) / (one**2 + other**2 + small), abs=1e-4)


def test_a_picture_too_small_for_ssim_has_none(net):
    (found,) = distances(gray(51, side=10), gray(204, side=10), net)
    assert found.ssim is None and found.psnr is not None


def test_many_pictures_give_what_each_gives_alone(net, right):
    many, others = np.concatenate([right, right[::-1]]), np.concatenate([right[::-1], right[::-1]])
    together = distances(many, others, net)
    assert len(together) == 24
    for index in (0, 5, 17, 23):
        (alone,) = distances(many[index : index + 1], others[index : index + 1], net)
        assert together[index].psnr == pytest.approx(alone.psnr) if alone.psnr else together[index].psnr is None
        assert together[index].ssim == pytest.approx(alone.ssim, abs=1e-6)
        assert together[index].perceptual == pytest.approx(alone.perceptual, abs=1e-6)


def test_the_perceptual_distance_by_hand():
    class Two:
        """Two layers of given features: a turn by a right angle at one of four places, then nothing."""

        def layers(self, images: torch.Tensor) -> list[torch.Tensor]:
            first = torch.zeros(1, 2, 2, 2)
            first[:, 0] = 5
            if images.sum() > 0:
                first[:, :, 0, 0] = torch.tensor([0.0, 3.0])
            return [first, torch.ones(1, 4, 1, 1)]

    zeros = torch.zeros(1, 3, 4, 4)
    assert perceptual(zeros, zeros + 1, Two()).tolist() == pytest.approx([2 / 4])
    assert perceptual(zeros, zeros, Two()).tolist() == [0]


def test_the_perceptual_distance_grows_with_the_disturbance(net, right):
    noise = np.random.default_rng(0).normal(0, 1, right.shape)
    levels = [distances((right + size * noise).clip(0, 255).astype(np.uint8), right, net) for size in (4, 16, 48)]
    means = [np.mean([one.perceptual for one in level]) for level in levels]
    assert 0 < means[0] < means[1] < means[2]


def test_the_network_knows_scenes_apart(net, right):
    """Each picture's features lie nearest to those of the same scene, blurred; the file is what training wrote."""
    assert WEIGHTS.stat().st_size < 500_000
    features = scene_features()
    blurred = np.stack([np.asarray(Image.fromarray(one).resize((96, 96)).resize((128, 128))) for one in right])
    one, other = features(right), features(blurred)
    assert one.shape == (12, FEATURES)
    far = np.linalg.norm(one[:, None] - other, axis=-1)
    assert far.argmin(1).tolist() == list(range(12))
    assert not any(parameter.requires_grad for parameter in net.parameters())


def test_the_script_trains_a_network_that_can_be_loaded(tmp_path: Path):
    script = Path(__file__).parents[2] / "examples" / "train_demo" / "classifier.py"
    weights = tmp_path / "features.safetensors"
    command = [sys.executable, str(script), "--work", str(tmp_path / "run"), "--weights", str(weights), "--smoke"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("of held-out scenes right") == 6
    FeatureNet().load_state_dict(load_file(weights))
    assert weights.stat().st_mode & 0o444 == 0o444
    assert [path.name for path in (tmp_path / "run").iterdir() if path.suffix == ".pt"] == ["classifier.pt"]


def test_frechet_of_gaussians_by_hand():
    rng = np.random.default_rng(0)
    one = rng.normal(size=(20_000, 3))
    shift, scale = np.array([1.0, -2.0, 0.5]), np.array([2.0, 1.0, 0.5])
    expected = (shift**2).sum() + ((1 - scale) ** 2).sum()
    assert frechet_distance(scale * rng.normal(size=(20_000, 3)) + shift, one) == pytest.approx(expected, rel=0.03)
    assert frechet_distance(one + shift, one) == pytest.approx((shift**2).sum(), rel=1e-6)
    assert frechet_distance(one, one) == pytest.approx(0, abs=1e-6)


def test_frechet_of_fewer_samples_than_features_is_symmetric_and_not_negative():
    rng = np.random.default_rng(1)
    one, other = rng.normal(size=(8, 64)), rng.normal(size=(9, 64))
    assert frechet_distance(one, other) == pytest.approx(frechet_distance(other, one), rel=1e-5)
    assert frechet_distance(one, one) == pytest.approx(0, abs=1e-4)
    assert frechet_distance(one[:1], other) is None


def test_frechet_difference_has_the_sign_of_the_better_set():
    rng = np.random.default_rng(2)
    drawn = rng.normal(size=(64, 4))
    near, far = (drawn + 0.2 * rng.normal(size=drawn.shape) + shift for shift in (0, 1))
    found = frechet_difference(far, near, drawn)
    assert found.value == pytest.approx(4, rel=0.1)
    assert 3 < found.low <= found.value <= found.high < 5
    same = frechet_difference(near, near, drawn)
    assert (same.value, same.low, same.high) == (0, 0, 0)
    assert frechet_difference(far[:1], near[:1], drawn[:1]) is None


def test_the_interval_of_a_mean_is_that_of_the_normal_for_many_samples():
    values = np.random.default_rng(3).normal(10, 2, 400)
    found = intervals.mean(values)
    reach = 1.96 * values.std() / 20
    assert found.value == pytest.approx(values.mean())
    assert found.low == pytest.approx(values.mean() - reach, abs=0.03)
    assert found.high == pytest.approx(values.mean() + reach, abs=0.03)
    assert found == intervals.mean(values)


def test_intervals_of_one_sample_and_of_equal_samples():
    assert intervals.mean([3.5]) == intervals.Estimate(3.5)
    assert intervals.mean([3.5] * 4) == intervals.Estimate(3.5, 3.5, 3.5)


def test_a_share_by_hand():
    """Wilson's interval for 9 of 10: centre (p + z2/2n) / (1 + z2/n)."""
    found = intervals.share([True] * 9 + [False])
    z2 = stats.norm.ppf(0.975) ** 2
    centre = (0.9 + z2 / 20) / (1 + z2 / 10)
    assert found.value == 0.9
    assert (found.low + found.high) / 2 == pytest.approx(centre)
    assert intervals.share([True] * 5).high == 1


def test_a_paired_difference_by_hand():
    """Agresti and Min (2005) with 2 pairs for the first, 5 for the second and 13 alike."""
    first = [True] * 2 + [False] * 5 + [True] * 10 + [False] * 3
    second = [False] * 2 + [True] * 5 + [True] * 10 + [False] * 3
    found = intervals.paired_share_difference(first, second)
    centre = (2.5 - 5.5) / 22
    error = math.sqrt((2.5 + 5.5) - (2.5 - 5.5) ** 2 / 22) / 22
    assert found.value == pytest.approx(-0.15)
    assert found.low == pytest.approx(centre - 1.959964 * error, abs=1e-6)
    assert found.high == pytest.approx(centre + 1.959964 * error, abs=1e-6)


def test_pairs_that_all_agree_leave_room_for_others():
    few, many = (intervals.paired_share_difference([True] * n, [True] * n) for n in (4, 400))
    assert few.value == many.value == 0
    assert few.low < many.low < 0 < many.high < few.high
    assert few.high == -few.low


def test_fidelity_of_a_plan_that_spoils_some_pictures(right):
    spoilt = right.copy()
    spoilt[0] = right[1]
    spoilt[3] = 128
    found = fidelity(ASKED, spoilt, right, "scenes", scene_features())
    assert (found.distances.pairs, found.distances.identical) == (12, 10)
    changed = [one.psnr for one in distances(spoilt[[0, 3]], right[[0, 3]], load_features())]
    assert found.distances.psnr.value == found.distances.psnr_median == pytest.approx(np.mean(changed))
    assert found.following_pairs == {"one thing": 9, "two things": 3}
    one, two = (found.following[name]["right"] for name in ("one thing", "two things"))
    assert (one.reference.value, one.plan.value, one.difference.value) == (1, 8 / 9, pytest.approx(-1 / 9))
    assert (two.reference.value, two.plan.value) == (1, pytest.approx(2 / 3))
    assert found.following["two things"]["count"].plan.value == pytest.approx(2 / 3)
    assert set(found.following["one thing"]) == set(JUDGED)
    far = found.frechet
    assert far.drawn == 12
    assert far.reference_to_drawn == pytest.approx(0, abs=1e-3)
    assert far.plan_to_drawn > 1 and far.difference.value == pytest.approx(far.plan_to_drawn - far.reference_to_drawn)
    assert [pair.distance.identical for pair in found.pairs].count(False) == 2


def test_the_report_is_json_even_of_identical_pictures_and_foreign_captions(right):
    asked = questions(["a lighthouse at dusk", "a fox"], 0)
    found = fidelity(asked, right[:2], right[:2], "scenes", scene_features())
    written = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert written["distances"]["identical"] == 2 and written["distances"]["psnr"] is None
    assert written["following"] == {} and written["frechet"]["plan_to_drawn"] is None
    assert written["pairs"][0] == {
        "caption": "a lighthouse at dusk", "seed": 0, "identical": True, "psnr": None, "ssim": pytest.approx(1),
        "perceptual": 0, "largest": 0, "reference": None, "plan": None,
    }  # fmt: skip
    text = render(found)
    assert "2 of them identical" in text and "not applicable" in text and "not Inception FID" in text


def test_the_tables_show_the_figures(right):
    spoilt = right.copy()
    spoilt[0] = right[1]
    text = render(fidelity(ASKED, spoilt, right, "scenes", scene_features()))
    assert "9 captions of one thing" in text and "3 captions of two things" in text
    assert "-11 points" in text
    assert max(map(len, text.splitlines())) <= 110


def test_the_sheet_has_both_rows_and_marks_what_is_wrong(right):
    spoilt = right.copy()
    spoilt[0] = right[1]
    found = fidelity(ASKED, spoilt, right, "scenes", scene_features())
    assert not judge(ASKED[0].request, spoilt[0]).right
    sheet = contact_sheet(found.pairs, spoilt, right)
    pixels = np.asarray(sheet)
    red = (pixels == (200, 30, 30)).all(-1)
    rows, columns = np.nonzero(red)
    assert sheet.width > 4 * 224 and sheet.height > 3 * 2 * 224
    assert columns.max() < sheet.width / 2 and rows.max() < sheet.height / 3
    all_right = contact_sheet(fidelity(ASKED, right, right, "scenes", scene_features()).pairs, right, right)
    assert not (np.asarray(all_right) == (200, 30, 30)).all(-1).any()
    assert contact_sheet(found.pairs[:1], spoilt, right).width < sheet.width / 2
    thumbnail = np.asarray(Image.fromarray(right[0]).resize((224, 224), Image.Resampling.LANCZOS))
    found_at = [x for x in range(80, 120) if np.array_equal(pixels[12 : 12 + 224, x : x + 224], thumbnail)]
    assert len(found_at) == 1
