"""Compiles a small graph with inductor and compares what comes out: ``python -m``, for `running.inductor`."""

from __future__ import annotations

import time

import torch
from torch import fx

from xdit_compile.backends.inductor import Inductor


class Small(torch.nn.Module):
    """A product, and what is fused behind it."""

    def forward(self, x: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor]:
        """The sine of the product of ``x [4, 8]`` and ``w [8, 8]``, of one dtype."""
        return (torch.ops.aten.sin.default(torch.ops.aten.mm.default(x, w)),)


def main() -> None:
    """Print where it was compiled and how long that took.

    Raises:
        AssertionError: another result than without inductor.
    """
    kind = torch.accelerator.current_accelerator(check_available=True)
    device = torch.device("cpu") if kind is None else kind
    graph = fx.Graph()
    graph.output(graph.call_module("small", (graph.placeholder("x"), graph.placeholder("w"))))
    root = fx.GraphModule({"small": fx.symbolic_trace(Small())}, graph)
    x, w = torch.randn(4, 8, device=device), torch.randn(8, 8, device=device)
    begun = time.perf_counter()
    with torch.no_grad():
        (made,) = Inductor().compile(root)(x, w)
        torch.testing.assert_close(made, root(x, w)[0], atol=1e-4, rtol=1e-4)
    print(f"on {device.type} in {time.perf_counter() - begun:.1f} s, with the result that it has without")


if __name__ == "__main__":
    main()
