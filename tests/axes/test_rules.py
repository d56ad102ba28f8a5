"""Every rule, with each dim of its input split over ranks that do not divide it: exact, whatever the rule says."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from splitting import Captured, run_split
from torch import nn

from xdit_compile.capture.capture import capture
from xdit_compile.ir.axes import atoms
from xdit_compile.passes.axes.infer import infer
from xdit_compile.passes.rules.registry import rulebook
from xdit_compile.plan import Plan

Function = Callable[[torch.Tensor], torch.Tensor | tuple[torch.Tensor, ...]]


@functools.lru_cache
def table(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(9))


OPERATORS: dict[str, Function] = {
    "add": lambda x: x + x.flip(3),
    "broadcast": lambda x: x * x[:, :1] + x.mean(2, keepdim=True),
    "scalar": lambda x: 2 - x.clamp(-1, 1) ** 2,
    "where": lambda x: torch.where(x > 0, x, x.sin()),
    "complex": lambda x: torch.view_as_real(torch.view_as_complex(x.unflatten(3, (3, 2)).contiguous()) * 1j).flatten(3),
    "merge": lambda x: x.flatten(1, 2) + 1,
    "merge and part": lambda x: x.flatten(0, 2).view(2, 7, 10, 6).cos(),
    "split a dim": lambda x: x.view(2, 7, 2, 5, 2, 3).transpose(1, 4).contiguous(),
    "misaligned view": lambda x: x.reshape(2, 10, 7, 6) + 1,
    "swap": lambda x: x.permute(3, 1, 0, 2).squeeze(0) if x.shape[3] == 1 else x.permute(3, 1, 0, 2),
    "unsqueeze": lambda x: x.unsqueeze(2).expand(2, 14, 4, 5, 6).sum(2),
    "repeat": lambda x: x.repeat(1, 2, 1, 1) + x.repeat_interleave(2, 1),
    "cat": lambda x: torch.cat([x, x * 2, x[:, 3:5]], 1),
    "cat other": lambda x: torch.cat([x, x], 3)[..., 2:9],
    "cat nothing": lambda x: torch.cat([x, x[:, :0]], 1),
    "stack": lambda x: torch.stack([x, -x], 2).flatten(1, 2),
    "slice": lambda x: x[:, 2:9] * x[:, 3:10],
    "slice step": lambda x: torch.cat([x[:, 0::2], x[:, 1::2]], 1),
    "odd step": lambda x: x[:, ::3],
    "chunk": lambda x: sum(x.chunk(2, 1)),
    "split sizes": lambda x: torch.cat(x.split([3, 4, 7], 1)[::-1], 1),
    "single steps": lambda x: torch.cat(x.split(1, 1)[::-1], 1),
    "unbind": lambda x: torch.stack(x.unbind(1), 1),
    "select": lambda x: x.select(1, 3) + x.select(1, -1),
    "write a part": lambda x: torch.slice_scatter(x, x[:, :4] * 3, 1, 5, 9),
    "write a step": lambda x: torch.select_scatter(x, x[:, 0] * 3, 1, 5),
    "pad": lambda x: F.pad(x, (1, 2, 0, 0, 2, 1), value=0.5),
    "pad reflect": lambda x: F.pad(x, (1, 2, 2, 1), mode="reflect"),
    "flip": lambda x: x.flip(1),
    "fourier": lambda x: torch.fft.irfftn(torch.fft.rfftn(x, dim=(2, 3)) * 1j, dim=(2, 3)) + torch.fft.fft(x).real,
    "fourier of two": lambda x: torch.fft.ifftshift(torch.fft.fftshift(torch.fft.fft2(x), dim=(2, 3))).abs(),
    "roll": lambda x: x.roll(2, 1),
    "pixel shuffle": lambda x: F.pixel_shuffle(x[:, :12], 2),
    "pixel unshuffle": lambda x: F.pixel_unshuffle(x[..., :4, :], 2),
    "linear": lambda x: F.linear(x, table(7, 6), table(7)),
    "linear over tokens": lambda x: F.linear(x.transpose(1, 3), table(3, 14), table(3)),
    "matmul": lambda x: x @ x.transpose(-1, -2),
    "scores": lambda x: (x.flatten(2) @ x.flatten(2).transpose(1, 2)).softmax(-1) @ x.flatten(2),
    "batched": lambda x: torch.bmm(x.flatten(2).transpose(1, 2), x.flatten(2)),
    "baddbmm": lambda x: torch.baddbmm(table(14, 14), x.flatten(2), x.flatten(2).transpose(1, 2)),
    "addmm": lambda x: torch.addmm(table(3), x.flatten(0, 2), table(6, 3)),
    "addmm over tokens": lambda x: torch.addmm(table(14), table(3, 14), x[0, :, :, 0] @ table(5, 14)),
    "einsum": lambda x: torch.einsum("bthc,bshc->bhts", x, x) + torch.einsum("...hc,dc->...hd", x, table(9, 6)).sum(),
    "unpatchify": lambda x: torch.einsum("nhwpqc->nchpwq", x.view(2, 7, 2, 5, 2, 3)).reshape(2, 3, 35, 4),
    "sum": lambda x: x.sum(1) * 2,
    "mean": lambda x: x.mean(1, keepdim=True) + x.mean((1, 2)).sum(),
    "amax": lambda x: x.amax(1) + x.var(1),
    "layer norm": lambda x: F.layer_norm(x, (6,), table(6), table(6)),
    "layer norm without a weight": lambda x: F.layer_norm(x, (6,), None, table(6)),
    "layer norm of two": lambda x: F.layer_norm(x, (5, 6)),
    "rms norm": lambda x: F.rms_norm(x, (6,), table(6)),
    "group norm without a weight": lambda x: F.group_norm(x, 7, None, table(14)),
    "group norm": lambda x: F.group_norm(x, 7, table(14), table(14)),
    "softmax": lambda x: x.softmax(1) + x.softmax(3),
    "cumsum": lambda x: x.cumsum(1),
    "topk": lambda x: x.topk(2, 1).values + x.topk(2, 1).indices,
    "sort": lambda x: x.sort(1).values,
    "conv of few": lambda x: F.conv2d(x.permute(0, 2, 1, 3), table(3, 5, 1, 1), table(3)),
    "conv 1x1": lambda x: F.conv2d(x, table(4, 14, 1, 1), table(4)),
    "conv same": lambda x: F.conv2d(x, table(4, 14, 3, 3), table(4), padding=1),
    "conv wide": lambda x: F.conv2d(x, table(4, 14, 5, 5), padding=4, dilation=2),
    "conv between parts": lambda x: F.conv1d(x.flatten(2), table(4, 14, 3), padding=1).view(2, 4, 5, 6),
    "conv of joined rows": lambda x: F.conv2d(torch.cat([x, x[:, :, 1:3]], 2), table(4, 14, 3, 3), padding=1),
    "conv depthwise": lambda x: F.conv2d(x, table(14, 1, 3, 3), table(14), padding=1, groups=14),
    "conv grouped": lambda x: F.conv2d(x, table(4, 7, 1, 1), groups=2),
    "conv strided": lambda x: F.conv2d(x, table(4, 14, 3, 3), stride=2, padding=1),
    "conv patches": lambda x: F.conv2d(x, table(4, 14, 1, 2), table(4), stride=(1, 2)),
    "conv 3d": lambda x: F.conv3d(x.unsqueeze(2), table(3, 14, 1, 3, 3), padding=(0, 1, 1)),
    "conv transposed": lambda x: F.conv_transpose2d(x, table(14, 3, 2, 2), stride=2),
    "nearest": lambda x: F.interpolate(x, scale_factor=2.0),
    "nearest odd": lambda x: F.interpolate(x, size=(7, 9)),
    "pool": lambda x: F.avg_pool2d(x, (1, 2)) + F.max_pool2d(x, (1, 2)),
    "embedding": lambda x: F.embedding((x > 0).long(), table(2, 3)),
    "index": lambda x: x[:, torch.tensor([3, 1, 2])] + x[:, torch.tensor([4, 5, 6])],
    "index pairs": lambda x: x[:, [1, 2], [3, 4]],
    "index select": lambda x: x.index_select(1, torch.tensor([5, 5, 0])),
    "gather": lambda x: x.gather(1, (x > 0).long()),
    "masked fill": lambda x: x.masked_fill(x > 1, 0.0),
    "chosen by a mask": lambda x: torch.index_put(x, (x[..., 0, 0] > 0,), table(5, 6)[:, :1]),
    "new tensors": lambda x: x + torch.zeros_like(x) + x.new_ones(x.shape) + torch.arange(14.0)[:, None, None],
    "triangle": lambda x: x.tril() + x.triu(1),
    "outer": lambda x: torch.outer(x[0, :, 0, 0], x[0, 0, :, 0]),
    "meshgrid": lambda x: torch.stack(torch.meshgrid(x[0, :, 0, 0], x[0, 0, :, 0], indexing="ij")),
    "grid of one axis": lambda x: (x[:, :, None] * x[:, None]).flatten(1, 2),
    "split attention": lambda x: F.scaled_dot_product_attention(*(x.transpose(1, 2),) * 3),
    "attention of a few": lambda x: F.scaled_dot_product_attention(x[:, :2].transpose(1, 2), *(x.transpose(1, 2),) * 2),
    "attention of others": lambda x: F.scaled_dot_product_attention(x.transpose(1, 2), *(table(2, 5, 3, 6),) * 2),
    "causal": lambda x: F.scaled_dot_product_attention(x.transpose(1, 2), *(table(2, 5, 14, 6),) * 2, is_causal=True),
}  # fmt: skip


class Call(nn.Module):
    """An operator after one that costs something: what costs nothing and is wanted whole is never split."""

    def __init__(self, function: Function):
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, ...]:
        return self.function(torch.einsum("abcd,d->abcd", x, torch.full((6,), 1.5)))


@pytest.mark.parametrize("name", OPERATORS)
def test_split_operator_equals_the_whole_one(name: str) -> None:
    module = Call(OPERATORS[name]).eval()
    x = torch.randn(2, 14, 5, 6, generator=torch.Generator().manual_seed(3))
    found = module(x)
    expected = [found] if isinstance(found, torch.Tensor) else list(found)
    inference = infer(capture(module, (x,), {}), rulebook())
    model = Captured(module, (x,), {}, expected, inference)
    (given,) = (node for node in inference.axes if node.op == "placeholder" and node.meta["val"].shape == x.shape)
    for axis in inference.axes[given][0]:
        units = tuple((atom,) for atom in dict.fromkeys(atoms(axis)) if atom.size > 1)
        for chosen in {units, *((unit,) for unit in units)}:
            for ranks in (2, 3, 8):
                worst, _ = run_split(model, Plan(ulysses=ranks), chosen)
                assert worst <= 2e-5, f"{ranks} ranks over {chosen}: {worst}"
