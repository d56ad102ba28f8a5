"""What is counted of the code of a structure, and of all structures together. Imports no compiler."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One kernel of Triton's: registers of a thread, and bytes of memory beside them, where spills go.

    Where Triton made several configurations of it, those of the one that was compiled last.
    """

    name: str
    registers: int
    stack: int


@dataclasses.dataclass(frozen=True)
class Code:
    """What was generated for a graph: Triton kernels, their launches, products of matrices, bytes read and written.

    Args:
        flops: of products and attention.
        seconds: that kernels take at best, and ``floor`` those of one that did all of it and read every input whole.
    """

    kernels: tuple[Kernel, ...]
    launches: int
    products: int
    moved: int
    flops: int
    seconds: float
    floor: float

    @property
    def registers(self) -> int:
        """Of the kernel that has most."""
        return max((kernel.registers for kernel in self.kernels), default=0)

    @property
    def stack(self) -> int:
        """Of all kernels."""
        return sum(kernel.stack for kernel in self.kernels)


@dataclasses.dataclass(frozen=True)
class Counted:
    """A structure: the module of its first call, how often it is called, bytes of its inputs, and its code."""

    structure: str
    path: str
    calls: int
    inputs: int
    code: Code

    @property
    def title(self) -> str:
        """The module, or where it is none the structure."""
        return self.path or self.structure


@dataclasses.dataclass(frozen=True)
class Total:
    """All calls of some structures together; fields as those of `Code`."""

    calls: int
    launches: int
    products: int
    moved: int
    flops: int
    seconds: float
    floor: float

    @classmethod
    def of(cls, rows: Iterable[Counted]) -> Total:
        """Each structure as often as it is called."""
        rows = list(rows)
        launches, products, moved, flops = (
            sum(row.calls * getattr(row.code, name) for row in rows)
            for name in ("launches", "products", "moved", "flops")
        )
        seconds, floor = (sum(row.calls * getattr(row.code, name) for row in rows) for name in ("seconds", "floor"))
        return cls(sum(row.calls for row in rows), launches, products, moved, flops, seconds, floor)
