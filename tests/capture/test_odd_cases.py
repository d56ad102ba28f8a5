"""Odd cases of operators, each with every dim of its input split over ranks that do not divide it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from splitting import Captured, run_split
from torch import nn

from tests.axes.test_rules import Call, Function, table
from xdit_compile.capture.capture import capture
from xdit_compile.ir.axes import atoms
from xdit_compile.passes.axes.infer import infer
from xdit_compile.passes.rules.registry import rulebook
from xdit_compile.plan import Plan

SDPA = F.scaled_dot_product_attention


def diagonals(x: torch.Tensor, size: int) -> torch.Tensor:
    """A view written to, and its diagonal after that."""
    x[:size, :size] = 7
    x[:size, :size].fill_diagonal_(0)
    return x


ODD: dict[str, Function] = {
    "last by list": lambda x: x[:, [-1]] * 2,
    "last two by list": lambda x: x[:, [-2, -1]] * 2,
    "around the end by list": lambda x: x[:, [-1, 0, 1]] * 2,
    "bits": lambda x: x.view(torch.int32) >> 20,
    "narrow bits": lambda x: (x.view(torch.int16) & 255).float(),
    "var of a dim": lambda x: torch.var(x, 1, True) + x.std(1, False),
    "var of all": lambda x: x * torch.var(x, False) + x.std(),
    "var kept": lambda x: x - x.var(1, unbiased=False, keepdim=True),
    "var mean": lambda x: torch.stack(torch.var_mean(x, 1, correction=0)),
    "take along": lambda x: torch.take_along_dim(x, (x[:, :1] > 0).long(), 1),
    "mean of large halves": lambda x: ((x.half() + 3e4).mean(1).float() / 3e4).round(),
    "frexp": lambda x: torch.frexp(x).mantissa * torch.frexp(x).exponent,
    "layer norm's mean": lambda x: torch.native_layer_norm(x, (6,), None, None, 1e-5)[1] + x,
    "scaled addmm": lambda x: torch.addmm(table(14), table(3, 14), x[0, :, :, 0] @ table(5, 14), beta=0.5, alpha=2),
    "addmm contracted": lambda x: torch.addmm(table(5), table(3, 14), x[0, :, :, 0], beta=0.5),
    "einsum broadcast": lambda x: torch.einsum("bthc,bshc->bths", x[:1], x) ,
    "einsum three": lambda x: torch.einsum("bthc,hd,bshc->btsd", x, table(5, 3), x),
    "einsum diagonal": lambda x: torch.einsum("btt->bt", x[:, :5, :, 0]),
    "einsum implicit": lambda x: torch.einsum("bthc,cd", x, table(6, 4)),
    "conv unbatched": lambda x: F.conv2d(x[0], table(14, 14, 3, 3), padding=1),
    "conv unbatched 1d": lambda x: F.conv1d(x[0, 0], table(5, 5, 3), padding=1),
    "conv over a grid": lambda x: F.conv1d(x.flatten(2), table(4, 14, 3), table(4), padding=1),
    "conv over a join": lambda x: F.conv2d(torch.cat([x, x * 2], 2), table(4, 14, 3, 3), padding=1),
    "nearest by scale": lambda x: F.interpolate(x.transpose(1, 2), scale_factor=(1.3, 1.3)),
    "nearest by nearly two": lambda x: F.interpolate(x, scale_factor=2.02),
    "nearest by two": lambda x: F.interpolate(x, scale_factor=(2.0, 3.0)),
    "bilinear": lambda x: F.interpolate(x, scale_factor=2.0, mode="bilinear"),
    "dilated pool": lambda x: F.max_pool2d(x, (1, 2), dilation=(1, 2)),
    "unbatched pool": lambda x: F.avg_pool2d(x[0], 1),
    "sum of a scalar": lambda x: x + x.sum().sum(0),
    "nothing joined": lambda x: torch.cat([x[:, :0], x[:, 3:4]], 1) + torch.cat([x[:, :0], x[:, :0]], 1).sum(),
    "pad negative": lambda x: F.pad(x, (-1, 2, 1, -2, -3, -1)),
    "pad negative and split": lambda x: F.pad(x, (0, 0, -1, 1, 2, 0), value=1.0),
    "slice negative": lambda x: x[:, -5:-2] + x[:, -4:-1],
    "slice step offset": lambda x: x[:, 1::2] * x[:, 0:13:2],
    "scatter step": lambda x: torch.slice_scatter(x, x[:, :7] * 3, 1, 1, 14, 2),
    "scatter short step": lambda x: torch.slice_scatter(x, x[:, :2] * 3, 1, 4, 8, 2),
    "scatter nothing": lambda x: torch.slice_scatter(x, x[:, :0], 1, 4, 4),
    "negative select": lambda x: torch.select_scatter(x, x[:, 0] * 3, -3, -2) + x.select(-3, -2).unsqueeze(-3),
    "repeat new": lambda x: x.repeat(3, 1, 2, 1, 1) + x.sum(),
    "repeat join": lambda x: torch.cat([x, x[:, :3]], 1).repeat(1, 2, 1, 1),
    "interleave all": lambda x: x.repeat_interleave(2) + 1,
    "expand lead": lambda x: x.expand(3, -1, -1, -1, -1) * 2,
    "roll all": lambda x: x.roll(3) + x.flip((0, 1)),
    "meshgrid xy": lambda x: torch.stack(torch.meshgrid(x[0, :, 0, 0], x[0, 0, :, 0], indexing="xy")),
    "index broadcast": lambda x: x[torch.tensor([[0], [1]]), torch.tensor([[3, 1, 4]])],
    "index apart": lambda x: x[torch.tensor([0, 1]), :, torch.tensor([3, 1])],
    "index scalar": lambda x: x[:, torch.tensor(3)],
    "as strided": lambda x: x.transpose(1, 2).contiguous().as_strided((2, 3), (5, 1)) + 1,
    "unfold": lambda x: x.unfold(1, 4, 2) + 1,
    "diagonal": lambda x: x.diagonal(0, 1, 2) * 2,
    "passed through": lambda x: (x, x[:, 1], x.sum(1), x),
    "unused results": lambda x: x.max(1)[1] + x.chunk(3, 1)[2].sum(1),
    "partial in a result": lambda x: (x.sum(1), x.sum(1) * 2, x.mean((1, 2))),
    "sum of int": lambda x: (x > 0).sum(1) + (x > 0).sum(),
    "tokens alone": lambda x: SDPA(x[0, :, 0], x[0, :, 1], x[0, :, 2]),
    "attention in 3d": lambda x: SDPA(x[0].transpose(0, 1), *(x[1].transpose(0, 1),) * 2),
    "mask of one key": lambda x: SDPA(*(x.transpose(1, 2),) * 3, attn_mask=table(14, 1)),
    "mask of 2d": lambda x: SDPA(*(x.transpose(1, 2),) * 3, attn_mask=table(14, 14) > 0),
    "mask of heads": lambda x: SDPA(*(x.transpose(1, 2),) * 3, attn_mask=table(1, 5, 14, 14)),
    "mask from data": lambda x: SDPA(
        *(x.transpose(1, 2),) * 3, attn_mask=x.mean(2)[:, None, None, :, 0] * x[:, None, :, 0, :1]
    ),
    "causal of few": lambda x: SDPA(x[:, :5].transpose(1, 2), *(x.transpose(1, 2),) * 2, is_causal=True),
    "causal of many": lambda x: SDPA(x.transpose(1, 2), *(x[:, :5].transpose(1, 2),) * 2, is_causal=True),
    "grouped": lambda x: SDPA(x.repeat_interleave(2, 2).transpose(1, 2), *(x.transpose(1, 2),) * 2, enable_gqa=True),
    "grouped mask": lambda x: SDPA(
        x.repeat_interleave(2, 2).transpose(1, 2), *(x.transpose(1, 2),) * 2, attn_mask=table(10, 14, 14),
        enable_gqa=True,
    ),
    "grouped causal": lambda x: SDPA(
        x.repeat_interleave(2, 2).transpose(1, 2), *(x.transpose(1, 2),) * 2, is_causal=True,
        enable_gqa=True,
    ),
    "keys of one entry": lambda x: SDPA(x.transpose(1, 2), *(x[:1].transpose(1, 2),) * 2),
    "keys of one head": lambda x: SDPA(x.transpose(1, 2), *(x[:, :, :1].transpose(1, 2),) * 2),
    "narrow values": lambda x: SDPA(x.transpose(1, 2), x.transpose(1, 2), x[..., :2].transpose(1, 2)),
    "five dims": lambda x: SDPA(*(x[:, None].transpose(2, 3),) * 3),
    "scale": lambda x: SDPA(*(x.transpose(1, 2),) * 3, scale=0.3),
    "cumulative": lambda x: x.cumsum(1).cummax(1).values + x.logcumsumexp(2),
    "median": lambda x: x.median(1).values + x.aminmax(dim=1)[0],
    "norm": lambda x: x / x.norm(dim=1, keepdim=True) + torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True),
    "normalize": lambda x: F.normalize(x, dim=1) + F.cosine_similarity(x, x.flip(1), dim=1).unsqueeze(1),
    "scatter": lambda x: x.scatter(1, (x[:, :3] > 0).long(), 0.5),
    "index put": lambda x: torch.index_put(x, (torch.tensor([0]), torch.tensor([3])), table(5, 6)),
    "index add": lambda x: x.index_add(1, torch.tensor([1, 2]), x[:, :2]),
    "masked scatter": lambda x: x.masked_scatter(x > 0, x * 2),
    "tensordot": lambda x: torch.tensordot(x, table(14, 5, 3), dims=([1, 2], [0, 1])),
    "kron": lambda x: torch.kron(x[0, :, :, 0], table(2, 2)),
    "cdist": lambda x: torch.cdist(x[:, :, 0], x[:, :, 1]),
    "instance norm": lambda x: F.instance_norm(x) + F.batch_norm(x, table(14), table(14).abs()),
    "glu": lambda x: F.glu(x, -1) + F.prelu(x, table(14).abs())[..., :3],
    "complex product": lambda x: torch.fft.fft(x, dim=1).abs(),
    "matrix vector": lambda x: x @ table(6) + (table(14) @ x[:, :, 0]).sum(),
    "linear of one row": lambda x: F.linear(x[0, :, 0, 0], table(3, 14), table(3)),
    "bilinear form": lambda x: F.bilinear(x, x, table(3, 6, 6)),
    "polar": lambda x: torch.view_as_real(torch.polar(x.abs(), x)),
    "unsafe chunk": lambda x: torch.cat([*x.chunk(4, 1)][::-1], 1) + x.tensor_split((3, 9), 1)[1].sum(),
    "pixel": lambda x: F.pixel_unshuffle(F.pixel_shuffle(x[:, :12], 2), 2),
    "channel shuffle": lambda x: F.channel_shuffle(x, 7),
    "queries of one entry": lambda x: SDPA(x[:1].transpose(1, 2), *(x.transpose(1, 2),) * 2),
    "keys of lower rank": lambda x: SDPA(x.transpose(1, 2), *(x[0].transpose(0, 1),) * 2),
    "grouped mask of one entry": lambda x: SDPA(
        x.repeat_interleave(2, 2).transpose(1, 2), *(x.transpose(1, 2),) * 2, attn_mask=table(2, 1, 14, 14),
        enable_gqa=True,
    ),
    "unfold 2d": lambda x: F.unfold(x, 2),
    "adaptive pool": lambda x: F.adaptive_avg_pool2d(x, (1, 3)),
    "rot90": lambda x: torch.rot90(x, 1, (1, 2)),
    "outer product": lambda x: x[0, :, 0, 0].outer(x[0, :, 0, 0]).flatten(),
    "diag embed": lambda x: torch.diag_embed(x),
    "lerp": lambda x: torch.lerp(x, x.flip(1), x[:, :1]) + torch.addcmul(x, x[:, :1], x, value=0.5),
    "one hot": lambda x: F.one_hot((x > 0).long(), 3).float(),
    "diagonal of a view": lambda x: diagonals(x[0, :, :, 0] @ x[1, :, :, 0].T, 9),
    "diagonal that wraps": lambda x: (x[0, :, 0, :3] * 2).fill_diagonal_(5, wrap=True) + (x[0, :, 1, :3] * 2)
    .fill_diagonal_(5),
    "diagonal of a cube": lambda x: (x[:2, :2, :2, 0] * 2).fill_diagonal_(5),
    "bucketize": lambda x: torch.bucketize(x, table(4).sort().values) + torch.searchsorted(table(4).sort().values, x),
}  # fmt: skip


@pytest.mark.parametrize("name", ODD)
def test_odd_case_split_equals_the_whole_one(name: str) -> None:
    module = Call(ODD[name]).eval()
    x = torch.randn(2, 14, 5, 6, generator=torch.Generator().manual_seed(3))
    compare_every_split(module, x)


def compare_every_split(module: nn.Module, x: torch.Tensor) -> None:
    found = module(x)
    expected = [found] if isinstance(found, torch.Tensor) else list(found)
    inference = infer(capture(module, (x,), {}), rulebook())
    model = Captured(module, (x,), {}, expected, inference)
    (given,) = (node for node in inference.axes if node.op == "placeholder" and node.meta["val"].shape == x.shape)
    for axis in inference.axes[given][0]:
        units = tuple((atom,) for atom in dict.fromkeys(atoms(axis)) if atom.size > 1)
        for chosen in {units, *((unit,) for unit in units)}:
            for ranks in (2, 3, 8):
                for plan in (Plan(ulysses=ranks), Plan(ring=ranks)) if ranks < 8 else (Plan(ulysses=4, ring=2),):
                    worst, _ = run_split(model, plan, chosen)
                    assert worst <= 2e-5, f"{plan} over {chosen}: {worst}"


class Shifted(nn.Module):
    """A block that adds a table of its own to every token."""

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(1, tokens, 6))
        self.linear = nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.linear((x + self.table).sin().cos().tanh().sigmoid().exp().neg())


class Turned(nn.Module):
    """Equal blocks over a grid's rows and over its columns: tokens lie otherwise although as many are on each rank."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Shifted(16) for _ in range(4)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x.flatten(1, 2)).unflatten(1, (4, 4)).transpose(1, 2)
        return x


class Picking(nn.Module):
    """A block that looks up channels known beforehand."""

    def __init__(self, positions: list[int]) -> None:
        super().__init__()
        self.positions = positions
        self.linear = nn.Linear(2, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.linear(x[..., self.positions].sin().cos().tanh().sigmoid().exp().neg())


class Pickers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Picking([2 * k, 2 * k + 1]) for k in range(3)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x * 1.5
        for block in self.blocks:
            x = block(x)
        return x


@pytest.mark.parametrize("kind", [Turned, Pickers])
def test_equal_blocks_that_mean_different_things_are_not_one(kind: type[nn.Module]) -> None:
    torch.manual_seed(2)
    with torch.no_grad():
        compare_every_split(kind().eval(), torch.randn(2, 4, 4, 6))
