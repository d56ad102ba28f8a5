"""What verification lets pass: rounding, also where a module rounds to half the digits inside, and nothing else."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from xdit_compile.capture import capture
from xdit_compile.errors import VerificationError
from xdit_compile.verification import Difference, narrow_rounding, verify


class Narrow(nn.Module):
    """Attention in a dtype of its own, as some models of float32 have it."""

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.dtype = dtype
        self.qkv, self.out = nn.Linear(12, 36), nn.Linear(12, 12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = (part.unflatten(-1, (3, 4)).transpose(1, 2).to(self.dtype) for part in self.qkv(x).chunk(3, -1))
        found = nn.functional.scaled_dot_product_attention(*parts)
        return x + self.out(found.transpose(1, 2).flatten(2).float())


@pytest.mark.parametrize(("dtype", "least", "most"), [(torch.bfloat16, 1e-4, 2e-2), (torch.float32, 0.0, 0.0)])
def test_a_module_that_rounds_inside_may_round_otherwise(dtype, least, most):
    torch.manual_seed(0)
    module, x = Narrow(dtype).eval(), torch.randn(1, 9, 12)
    program = capture(module, (x,), {})
    expected = module(x).detach()
    asked = []

    def slack() -> Difference:
        asked.append(narrow_rounding(program, module, (x,), {}))
        return asked[-1]

    verify(expected * (1 + 1e-6), expected, slack)
    assert not asked
    scale = expected.abs().max()
    if most:
        verify(expected + least / 2 * scale, expected, slack)
        assert least <= asked[-1].greatest <= most
    else:
        with pytest.raises(VerificationError):
            verify(expected + 1e-4 * scale, expected, slack)
        assert asked == [Difference()]
    with pytest.raises(VerificationError, match="differs from the unsplit one by 5.0e-02"):
        verify(expected + 0.05 * scale, expected, slack)
