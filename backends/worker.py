"""Compiles structures in a process of its own, while those who want them go on without.

Graphs go there as plain data, on its standard input; code comes back by way of the store.
"""

from __future__ import annotations

import atexit
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import fx

from xdit_compile.cache.graphs import graph_from_plain, graph_to_plain
from xdit_compile.cache.store import Store
from xdit_compile.ir.precision import products, set_products
from xdit_compile.kernels import (  # noqa: F401 - they register the ops that graphs call
    attention,
    collectives,
    draws,
    gather_parameter,
    linears,
    merge_lse,
    norm_rope,
    put_rows,
    ring,
    scale_shift,
    stale_rows,
)  # fmt: skip

from .codes import CodeFiles, Codes
from .forms import Forms, form_from_plain, form_to_plain


class Worker:
    """A process that compiles, and is gone then.

    Args:
        jobs: structures with the forms of their arguments and the names that their code is wanted under.
        options: of inductor's configuration.
        folder: of the store.
    """

    def __init__(
        self, jobs: Sequence[tuple[fx.GraphModule, Forms, str]], options: Mapping[str, Any], folder: Path
    ):  # fmt: skip
        described = [[graph_to_plain(graph)[0], list(map(form_to_plain, forms)), name] for graph, forms, name in jobs]
        asked = {
            "jobs": described, "options": dict(options), "precisions": products(), "folder": str(folder),
            "threads": torch.get_num_threads(),
        }  # fmt: skip
        self._said = tempfile.TemporaryFile()  # noqa: SIM115 - read when the process has ended
        self._process = subprocess.Popen(
            [sys.executable, "-m", "xdit_compile.backends.worker"],
            stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=self._said,
        )  # fmt: skip
        atexit.register(self.stop)
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(asked).encode())
        self._process.stdin.close()

    @property
    def done(self) -> bool:
        """Whether it has ended, well or not."""
        return self._process.poll() is not None

    @property
    def failure(self) -> str:
        """The last line of what it said where it did not end well; empty else."""
        if not self._process.poll():
            return ""
        self._said.seek(0)
        lines = self._said.read().decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else f"exit code {self._process.returncode}"

    def stop(self) -> None:
        """End it, whatever it is doing."""
        atexit.unregister(self.stop)
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        self._said.close()


def work(asked: dict[str, Any]) -> None:
    """Compile what was asked for, and put it into the store."""
    torch.set_num_threads(asked["threads"])
    set_products(asked["precisions"])
    here = torch.accelerator.current_accelerator() or torch.device("cpu")
    codes = Codes(lambda: asked["options"], CodeFiles(Store(Path(asked["folder"]))))
    for graph, forms, name in asked["jobs"]:
        codes.compile(name, graph_from_plain(graph, {}, here), tuple(form_from_plain(form, here) for form in forms))


if __name__ == "__main__":
    work(json.load(sys.stdin))
