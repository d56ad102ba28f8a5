"""Compiled code of structures, by all that it was compiled of: nothing is compiled twice, in no process."""

from __future__ import annotations

import dataclasses
import logging
import weakref
from collections.abc import Callable, Mapping
from typing import Any

from torch import fx

from xdit_compile.cache.graphs import canonical
from xdit_compile.cache.store import Store
from xdit_compile.cache.unportable import Unportable
from xdit_compile.cache.values import digest_of
from xdit_compile.errors import one_line
from xdit_compile.ir.precision import products

from .artifact import Artifact, compiled, loaded
from .folders.build_folder import BuildFolder
from .folders.common_folder import VectorInstructions
from .forms import Forms, TensorForm
from .target.cards import Card

Run = Callable[..., Any]
logger = logging.getLogger("xdit_compile")
NO_MATTER = ("compile_threads",)
"""Options that change nothing of what is generated."""


class CodeFiles:
    """The entries of a store that are compiled code."""

    KIND = "code"

    def __init__(self, store: Store):
        self._store = store

    def read(self, name: str) -> bytes | None:
        """What was written under a name; None where nothing was, or not that."""
        entry = self._store.read(self.KIND, name)
        return None if entry is None else entry.body

    def write(self, name: str, about: Mapping[str, Any], body: bytes) -> bool:
        """Keep bytes under a name; False where that cannot be."""
        return self._store.write(self.KIND, name, about, body)


@dataclasses.dataclass
class Counts:
    """Where the code of structures came from."""

    loaded: int = 0
    compiled: int = 0


class Codes:
    """Compiles structures, or finds what was made of them.

    Args:
        options: of inductor's configuration.
        store: where code outlives the process; None where it does not.
        card: what is compiled for, where that is not there: nothing of it runs.

    Attributes:
        environment: digest of whatever else generated code depends on, set before code is looked for.
        instructions: which of them code for processors may use.
    """

    def __init__(
        self,
        options: Callable[[], Mapping[str, Any]],
        store: CodeFiles | None = None,
        card: Card | None = None,
    ):
        self._options, self.store, self.environment, self.card = options, store, "", card
        self.folder = BuildFolder()
        self.instructions = VectorInstructions()
        self._runs: weakref.WeakValueDictionary[str, Run] = weakref.WeakValueDictionary()
        self.counts = Counts()

    @property
    def options(self) -> dict[str, Any]:
        """Of inductor's configuration."""
        return dict(self._options())

    def name(self, structure: fx.GraphModule, forms: Forms) -> str | None:
        """What code for arguments of these forms is kept under; None where a structure cannot be described."""
        try:
            _, graph = canonical(structure)
        except Unportable:
            return None
        options = {name: str(value) for name, value in self._options().items() if name not in NO_MATTER}
        return digest_of([graph, list(map(_said, forms)), products(), options, self.environment])

    def known(self, name: str | None) -> Run | None:
        """Code that this process has, or finds in the store; for a card that is not there, it is enough to find it."""
        if name is not None and self.card is not None and self.bytes_of(name) is not None:
            return _would_run
        if name is None or (run := self._runs.get(name)) is not None:
            return None if name is None else run
        packed = self.bytes_of(name)
        if packed is None:
            return None
        try:
            return self.load(name, packed)
        except Exception as error:  # whatever became of what it needs
            logger.warning("compiled code of the cache cannot be loaded, and is made anew: %s", one_line(error))
            return None

    def bytes_of(self, name: str) -> bytes | None:
        """Code as the store has it."""
        return None if self.store is None else self.store.read(name)

    def load(self, name: str, packed: bytes) -> Run:
        """Code from its bytes, which are trusted."""
        self.instructions.wait()
        run = self._runs[name] = loaded(Artifact.unpacked(packed), self.folder)
        self.counts.loaded += 1
        return run

    def take(self, name: str, structure: fx.GraphModule, forms: Forms, packed: bytes) -> Run:
        """Code that another process made, which is kept here as well."""
        if self.store is not None:
            self.store.write(name, {"for": self._about(structure, forms)}, packed)
        return self.load(name, packed)

    def compile(self, name: str | None, structure: fx.GraphModule, forms: Forms) -> tuple[Run, bytes | None]:
        """Compile a structure for arguments of these forms, and keep it.

        Returns:
            What computes it, and its bytes where the store did not take them.
        """
        self.instructions.wait()
        folder = None if self.store is None else self.folder
        run, artifact = compiled(structure, forms, self._options(), folder, self.card)
        self.counts.compiled += 1
        packed = None if artifact is None else artifact.packed()
        if name is not None:
            self._runs[name] = run
            if packed is not None and self.store is not None:
                written = self.store.write(name, {"for": self._about(structure, forms)}, packed)
                return run, None if written else packed
        return run, packed

    def _about(self, structure: fx.GraphModule, forms: Forms) -> str:
        calls = sum(node.op == "call_function" for node in structure.graph.nodes)
        shape = next((form.shape for form in forms if isinstance(form, TensorForm)), ())
        card = "" if self.card is None else f", for {self.card.target}"
        return f"{calls} operators on {'x'.join(map(str, shape))}{card}"

    def run_of(self, structure: fx.GraphModule, forms: Forms) -> Run:
        """What computes a structure, compiled if need be."""
        name = self.name(structure, forms)
        return self.known(name) or self.compile(name, structure, forms)[0]


def _would_run(*args: Any) -> Any:
    """Stands for code that only a card can run."""
    raise NotImplementedError("this code was compiled for a card that is not there")


def _said(form: Any) -> Any:
    """A form of an argument on whatever device of its kind."""
    if isinstance(form, TensorForm):
        return [form.shape, form.stride, str(form.dtype), form.device.type]
    return repr(form)
