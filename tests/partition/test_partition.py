"""Every named model, split over simulated meshes, against the single device."""

from __future__ import annotations

import pytest
from splitting import captured, run_split
from zoo import more as zoo_more
from zoo import transformers as zoo

from xdit_compile.plan import Plan

MESHES = [(2, 1), (1, 2), (3, 1), (1, 3), (4, 1), (2, 2), (2, 3), (3, 2), (8, 1), (1, 8)]


ALIKE = {
    "cogvideox",
    "cogvideox_1_5",
    "cogvideox_learned",
    "cogvideox_rotary",
    "flux2",
    "flux_unguided",
    "hunyuandit",
    "latte",
    "lumina2",
    "lumina2_ragged",
    "mochi",
    "pixart_alpha",
    "qwenimage",
    "qwenimage_masked",
    "sana",
    "sd3",
    "sd3_dual",
    "wan_i2v",
    "zimage",
    "zimage_ragged",
}
"""Models that the slow run alone has: of most a close relative is in the quick one."""


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow if n in ALIKE else ()) for n in sorted(zoo.MODELS)]
)
def test_split_model_equals_the_single_device(name: str) -> None:
    model = captured(name)
    for ulysses, ring in MESHES:
        worst, ranks = run_split(model, Plan(ulysses=ulysses, ring=ring))
        assert worst <= 2e-5, f"ulysses={ulysses} ring={ring}"
        collectives = {item.op for item in ranks[0].ledger.collectives}
        assert collectives & {"all_to_all", "ring_attention", "all_reduce"}, "nothing but gathers"
        in_blocks = [gather for gather in ranks[0].ledger.gathers if gather.place.repeated]
        assert not in_blocks


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(zoo_more.MORE))
def test_every_other_model_equals_the_single_device(name: str) -> None:
    model = captured(name)
    for ulysses, ring in [(2, 1), (1, 3), (2, 2)]:
        assert run_split(model, Plan(ulysses=ulysses, ring=ring))[0] <= 2e-5, f"ulysses={ulysses} ring={ring}"
