"""Tensors in patches: what runs patch by patch, what takes all of them, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from xdit_compile.ir.patch_layout import PatchLayout
from xdit_compile.runtime.tensors.patched_tensor import Part, PatchedTensor, whole_of

X = torch.arange(2 * 3 * 7 * 4, dtype=torch.float32).reshape(2, 3, 7, 4).sin()
Y = torch.linspace(-1, 1, 2 * 3 * 7 * 4).reshape(2, 3, 7, 4)
POSITIONS = ((0, 3, 4), (1, 2), (5, 6))
"""Rows of three patches, not all neighbours."""


def patched(here: bool, counts: list[int]) -> PatchedTensor:
    """``X`` cut along its third dim; patches that are not here yet come when they are asked for."""

    def collect(tensor: PatchedTensor) -> torch.Tensor:
        counts.append(1)
        return tensor.patch_layout.join([part.value() for part in tensor.parts])

    layout = PatchLayout(2, POSITIONS)
    values = [layout.take(X, at).clone() for at in range(3)]
    parts = [Part.of(value) if here else Part(value.to("meta"), make=lambda v=value: v) for value in values]
    return PatchedTensor(parts, layout, X.device, collect)


APART: dict[str, Callable[[torch.Tensor], Any]] = {
    "pointwise": lambda x: (x * 2 + Y).clamp(-1, 1).to(torch.float64),
    "broadcast": lambda x: x + Y[:1, :, :, :1] + Y[:, :, :1] + 3,
    "two": lambda x: torch.lerp(x, x * x, 0.3) - x,
    "guidance": lambda x: x.chunk(2)[0] + 4 * (x.chunk(2)[1] - x.chunk(2)[0]),
    "channels": lambda x: x[:, :2] + x.split([1, 2], dim=1)[1],
    "joined": lambda x: torch.cat([x, Y, x], dim=1),
    "stacked": lambda x: torch.stack([x, x * 2], dim=1),
    "stacked behind": lambda x: torch.stack([x, x], dim=-1).select(-1, 0),
    "moved": lambda x: x.permute(0, 2, 3, 1).unsqueeze(-1).squeeze(-1).transpose(0, 1),
    "history": lambda x: torch.einsum("k,bk...->b...", torch.tensor([0.5, 2.0]), torch.stack([x, Y * x], dim=1)),
    "frequencies": lambda x: torch.fft.fft(x.flip(1), dim=1).abs().amax(1),
    "normed": lambda x: torch.nn.functional.layer_norm(x, (4,)).sum(1),
    "in place": lambda x: x.clone().add_(Y).mul_(2).copy_(Y[:1]),
    "in place, dtype": lambda x: x.to(torch.float16).add_(Y),
    "drawn": lambda x: x + torch.randn_like(x, dtype=torch.float32),
}


@pytest.mark.parametrize("here", [True, False], ids=["here", "to come"])
@pytest.mark.parametrize("name", APART)
def test_patches_stay_apart(name, here):
    counts: list[int] = []
    torch.manual_seed(0)
    expected = APART[name](X)
    torch.manual_seed(0)
    found = APART[name](patched(here, counts))
    assert not counts and isinstance(found, PatchedTensor) and found.shape == expected.shape
    assert whole_of(found).dtype == expected.dtype
    torch.testing.assert_close(whole_of(found), expected)


TOGETHER: dict[str, Callable[[torch.Tensor], Any]] = {
    "mean": lambda x: x.mean(),
    "along": lambda x: x.softmax(2),
    "rows": lambda x: x[:, :, 2:4],
    "flat": lambda x: x.flatten(1),
    "number": lambda x: torch.tensor(float(x.max())),
    "noise": lambda x: (torch.manual_seed(0), torch.native_dropout(x, 0.5, True)[0])[1],
    "into a plain one": lambda x: Y.clone().add_(x),
}


@pytest.mark.parametrize("name", TOGETHER)
def test_others_take_all_patches(name):
    counts: list[int] = []
    torch.testing.assert_close(whole_of(TOGETHER[name](patched(False, counts))), TOGETHER[name](X))
    assert counts == [1]


def test_a_change_in_place_is_seen_after_all_patches_were_read():
    x = patched(True, [])
    before = whole_of(x).clone()
    x.add_(1)
    torch.testing.assert_close(whole_of(x), before + 1)


def _masked(x: torch.Tensor) -> Any:
    x[x > 0.5] = 0
    return x


def _channel(x: torch.Tensor) -> Any:
    x[0, 1] -= Y[0, 1] * 2
    x[:, 0] = Y[:, 2]
    return x


def _of_a_view(x: torch.Tensor) -> Any:
    half = x.chunk(2)[1]
    moved = half[:, 1:].transpose(1, 3)
    moved.mul_(3)
    return x + 1


def _seen_in_a_view(x: torch.Tensor) -> Any:
    half, channel = x.chunk(2)[1], x[:, 1]
    x.add_(Y)
    channel[1] *= 2
    return half * 1


def _rows(x: torch.Tensor) -> Any:
    channel = x[:, 1]
    x[:, :, 2:4] -= 1
    channel += 2
    return x + channel.unsqueeze(1)


def _flat(x: torch.Tensor) -> Any:
    flat = x.view(-1)
    x[0, 1] += 1
    flat[3:90].zero_()
    x *= 2
    return x + flat.sum()


IN_PLACE = [(_channel, 0), (_of_a_view, 0), (_seen_in_a_view, 0), (_masked, 2), (_rows, 1), (_flat, 1)]


@pytest.mark.parametrize("here", [True, False], ids=["here", "to come"])
@pytest.mark.parametrize(("change", "collected"), IN_PLACE)
def test_views_write_to_what_they_look_into(change, collected, here):
    """Patches stay apart where views move other dims; rows and flat views take all patches, and see one another."""
    counts: list[int] = []
    x, plain = patched(here, counts), X.clone()
    found, expected = change(x), change(plain)
    assert len(counts) <= collected
    torch.testing.assert_close(whole_of(found), expected)
    torch.testing.assert_close(x.patch_layout.join([part.value() for part in x.parts]), plain)


def test_another_form_in_place_is_refused():
    with pytest.raises(RuntimeError, match="changes the form of a denoiser's result in place; do it to a clone"):
        patched(True, []).transpose_(0, 1)
