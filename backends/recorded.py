"""Replays all that one rank runs as one CUDA graph, in place of launching its kernels one by one.

A graph reads and writes memory at the addresses that it was recorded with. So inputs that come from another place in
each call are copied into buffers of its own before a replay, while weights, which stay where they are, are read there;
and what leaves is a copy, as the next replay writes over the results of the last one. Inductor would record each
structure by itself, and as one of them serves many blocks, copy each block's weights in every call.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import fx
from torch.utils import _pytree as pytree

from xdit_compile.errors import one_line
from xdit_compile.ir.precision import products
from xdit_compile.kernels.collectives.registration import ordered_ops

from .sites import Compile, Sites

MOST_RECORDINGS = 4
"""So often inputs may turn out to move before a form of a call is run without a graph."""
KEPT_MODULE = "xdit_compile::kept_module"
logger = logging.getLogger("xdit_compile")


class Recorder(Protocol):
    """Makes recordings of what a device does."""

    device: str
    """The type of device that it records."""

    def record(self, run: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        """What ``run`` returns, and what has the device do the same again, from and to the same memory.

        Nothing of it has to be computed before the first replay.

        Raises:
            RuntimeError: something of it cannot be recorded.
        """


class CudaGraphs:
    """Recordings of a CUDA device, which share their memory: they run one after the other, and results are copied."""

    device = "cuda"

    def __init__(self) -> None:
        self._pool: Any = None

    def record(self, run: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        """What ``run`` returns, and its graph's replay; other threads may use the device meanwhile."""
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            made = run()
        return made, graph.replay


class Recording:
    """One graph.

    Args:
        replay: runs it.
        made: where it leaves its results.
        places: the addresses of inputs that it reads where they were; None for those that it has a buffer for.
        buffers: of the others, in one dim each.
    """

    def __init__(
        self, replay: Callable[[], None], made: Any, places: tuple[int | None, ...],
        buffers: tuple[torch.Tensor | None, ...],
    ):  # fmt: skip
        self._replay, self._made, self.places, self._buffers = replay, made, places, buffers

    def reads(self, addresses: tuple[int, ...]) -> bool:
        """Whether all that it reads in place is at these addresses."""
        return all(place is None or place == now for place, now in zip(self.places, addresses, strict=True))

    def run(self, tensors: tuple[torch.Tensor, ...]) -> Any:
        """Its results for these inputs, in memory of their own."""
        for buffer, tensor in zip(self._buffers, tensors, strict=True):
            if buffer is not None:
                buffer.copy_(_in_a_row(tensor))
        self._replay()
        return pytree.tree_map_only(torch.Tensor, torch.clone, self._made)


class RecordedSites(Sites):
    """A root whose calls are recorded, each form of them after two that ran as ever.

    The first call compiles, and the second shows which inputs stay where they were. What cannot be recorded runs as
    ever, and one line says why.

    Args:
        recorder: makes recordings.
    """

    def __init__(self, root: fx.GraphModule, compile_structure: Compile, recorder: Recorder):
        super().__init__(root, compile_structure)
        self._recorder, self._why_not = recorder, unrecordable(root)
        self._recordings: dict[Any, Recording] = {}
        self._seen: dict[Any, tuple[tuple[int, ...], int, int]] = {}
        if self._why_not:
            self._tell(self._why_not)

    def __call__(self, *tensors: torch.Tensor) -> Any:
        """What the root computes; results are no memory that a later call writes to."""
        if self._why_not or self.meanwhile is not None:
            return super().__call__(*tensors)
        if other := next((each for each in tensors if each.device.type != self._recorder.device), None):
            return self._give_up(f"an input is on {other.device}", tensors)
        form = (*products(), *[tensor.stride() for tensor in tensors])
        addresses = tuple(tensor.data_ptr() for tensor in tensors)
        recording = self._recordings.get(form)
        if recording is None or not recording.reads(addresses):
            recording = self._next(form, addresses, tensors)
        return super().__call__(*tensors) if recording is None else recording.run(tensors)

    def _next(
        self, form: Any, addresses: tuple[int, ...], tensors: tuple[torch.Tensor, ...]
    ) -> Recording | None:  # fmt: skip
        """A recording that fits this call; None where it runs as ever."""
        before, calls, made = self._seen.get(form, (addresses, 0, 0))
        self._seen[form] = (addresses, calls + 1, made)
        if calls < 2:
            return None
        if made >= MOST_RECORDINGS:
            self._why_not = "weights or inputs lie elsewhere again and again, as where models are offloaded"
            self._tell(self._why_not)
            return None
        last = self._recordings.pop(form, None)
        known = before if last is None else last.places
        places = tuple(now if now == place else None for now, place in zip(addresses, known, strict=True))
        buffers = tuple(
            None if place is not None else _in_a_row(tensor).clone()
            for place, tensor in zip(places, tensors, strict=True)
        )
        given = [
            tensor if buffer is None else buffer.as_strided(tensor.shape, tensor.stride())
            for tensor, buffer in zip(tensors, buffers, strict=True)
        ]
        try:
            results, replay = self._recorder.record(lambda: super(RecordedSites, self).__call__(*given))
        except RuntimeError as error:
            self._why_not = f"it cannot be recorded: {one_line(error)}"
            self._tell(self._why_not)
            return None
        self._seen[form] = (addresses, calls + 1, made + 1)
        self._recordings[form] = Recording(replay, results, places, buffers)
        return self._recordings[form]

    def _give_up(self, why: str, tensors: tuple[torch.Tensor, ...]) -> Any:
        self._why_not = why
        self._tell(why)
        return super().__call__(*tensors)

    def _tell(self, why: str) -> None:
        logger.warning("CUDA graphs were asked for, and kernels are launched one by one: %s", why)


def _in_a_row(tensor: torch.Tensor) -> torch.Tensor:
    """The memory from a tensor's first element to its last, whatever its strides: some may be 0, or leave gaps."""
    extent = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.as_strided((extent if tensor.numel() else 0,), (1,))


def unrecordable(root: fx.GraphModule) -> str:
    """Why what a root calls cannot be recorded; empty where nothing is seen that could not.

    A replay repeats what the device did. What the host decides anew in each call is not in it.
    """
    ordered = set(ordered_ops())
    for module in root.modules():
        for node in module.graph.nodes if isinstance(module, fx.GraphModule) else ():
            if node.target in ordered:
                return f"{node.target} reaches other ranks, or draws numbers"
            if isinstance(node.target, torch._ops.OpOverload) and node.target.name() == KEPT_MODULE:
                return "a module is kept as it is, whose code the host runs"
    return ""
