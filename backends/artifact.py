"""What inductor made of one structure, as bytes that another process can run.

Inductor gives back a pickle of the code that it generated, which names its kernels for the CPU by their C++ source and
compiles them wherever it is loaded. Here the libraries come with it. They are loaded from a folder of the process's own
(`BuildFolder`), into which the bytes that were handed over are written. For a card that is not there it is the machine
code of Triton's kernels that comes along (`CardCode`), and no library, which other processors might not run.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import importlib.util
import os
import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from .folders.build_folder import BuildFolder
from .folders.common_folder import headers_in
from .forms import Forms, fakes_of, give_dense
from .inductor_order import options_for, pin_order
from .target.card_code import CardCode, compiling_for, loading
from .target.cards import Card
from .target.pretend_card import on_current_card

Run = Callable[..., Any]
MakeKernel = Callable[[Any, list[str], str], Any]
ADDRESS = "_TORCHINDUCTOR_PYOBJECT_TENSOR_DATA_PTR"
"""The environment variable in which a library looks for the function that reads a tensor's address."""


@dataclasses.dataclass(frozen=True)
class Artifact:
    """Compiled code of one structure.

    Args:
        code: the pickle of what inductor generated.
        libraries: the shared library of each C++ kernel, by a digest of its source.
        card: what was compiled for a card that was not there; None where it was made for the machine that made it.
    """

    code: bytes
    libraries: Mapping[str, bytes]
    card: CardCode | None = None

    def packed(self) -> bytes:
        """All of it in one."""
        return pickle.dumps((self.code, dict(self.libraries), self.card))

    @classmethod
    def unpacked(cls, packed: bytes) -> Artifact:
        """The artifact of `packed`. Whoever calls this trusts the bytes: they are code."""
        return cls(*pickle.loads(packed))


@torch.no_grad()
def compiled(
    structure: fx.GraphModule, forms: Forms, options: Mapping[str, Any], folder: BuildFolder | None,
    card: Card | None = None,
) -> tuple[Run, Artifact | None]:  # fmt: skip
    """Compile a structure.

    Args:
        structure: a flat functional graph, which stays as it is.
        forms: of a call's arguments.
        options: of inductor's configuration.
        folder: where files are made; where inductor makes them for None, and then they are not read again.
        card: what it is compiled for, where that is not there.

    Returns:
        What computes the structure, or would on the card, and the same as bytes; None where inductor cannot say it in
        bytes, or not all of it, as where the structure holds tensors of its own, or a library is not there any more.
    """
    from torch._inductor import standalone_compile
    from torch._inductor.async_compile import AsyncCompile

    pin_order()
    structure = _copied(structure)
    give_dense(structure, forms)
    fakes = fakes_of(FakeTensorMode(shape_env=ShapeEnv()), forms)
    original, kernels = AsyncCompile.cpp_pybinding, {}

    def noted(compiler: Any, argtypes: list[str], source: str) -> Any:
        kernel = kernels[_digest(argtypes, source)] = original(compiler, argtypes, source)
        return kernel

    with ExitStack() as stack:
        code = None if card is None else stack.enter_context(compiling_for(card))
        stack.enter_context(headers_in(None) if folder is None else _compiling_in(folder))
        stack.enter_context(_kernels_by(noted))
        run: Any = standalone_compile(
            structure, fakes, dynamic_shapes="from_example_inputs",
            options={"config_patches": options_for(structure.graph, options)}, aot=True,
        )  # fmt: skip
        if (
            folder is None
            or structure.graph.find_nodes(op="get_attr")
            or getattr(_called(run), "serialize", None) is None
        ):
            return _called(run), None
        libraries = {} if code is not None else _libraries(kernels)
        if libraries is None:
            return _called(run), None
        artifact = Artifact(run.serialize(), libraries, code)
    return _called(run), artifact


def _libraries(kernels: Mapping[str, Any]) -> dict[str, bytes] | None:
    """The shared libraries of kernels; None where one was loaded from the folder of a process that is gone."""
    try:
        return {name: Path(_loaded(kernel).__self__.__file__).read_bytes() for name, kernel in kernels.items()}
    except FileNotFoundError:
        return None


@contextmanager
def _compiling_in(folder: BuildFolder) -> Iterator[None]:
    with headers_in(folder.path), folder.current():
        yield


def _copied(structure: fx.GraphModule) -> fx.GraphModule:
    """The same graph without annotations of types, which inductor cannot describe where they are strings."""
    copied = fx.GraphModule(structure, copy.deepcopy(structure.graph))
    for node in copied.graph.nodes:
        node.type = None
    return copied


def loaded(artifact: Artifact, folder: BuildFolder) -> Run:
    """What computes the structure that an artifact was made of."""
    from torch._inductor.async_compile import AsyncCompile
    from torch._inductor.standalone_compile import AOTCompiledArtifact

    original, card = AsyncCompile.cpp_pybinding, artifact.card

    def found(compiler: Any, argtypes: list[str], source: str) -> Any:
        if card is not None:
            return original(compiler, argtypes, source)
        return _kernel(_digest(argtypes, source), artifact.libraries, folder)

    with ExitStack() as stack:
        path = stack.enter_context(folder.current())
        stack.enter_context(_kernels_by(found))
        stack.enter_context(on_current_card() if torch.cuda.is_available() else nullcontext())
        stack.enter_context(nullcontext() if card is None else loading(card, path))
        return _called(AOTCompiledArtifact.deserialize(artifact.code))


def _called(artifact: Any) -> Run:
    """The innermost function that takes what the structure takes."""
    run: Run = artifact.inner_fn.compiled_fn
    return run


@contextmanager
def _kernels_by(make: MakeKernel) -> Iterator[None]:
    """Have generated code get its C++ kernels from a function of its compiler, their argument types and source."""
    from torch._inductor.async_compile import AsyncCompile

    with mock.patch.object(AsyncCompile, "cpp_pybinding", make):
        yield


def _loaded(kernel: Any) -> Any:
    """A kernel that may still be on its way from a worker."""
    return kernel.result() if hasattr(kernel, "result") else kernel


def _digest(argtypes: Sequence[str], source: str) -> str:
    return hashlib.sha256("\0".join([*argtypes, source]).encode()).hexdigest()


def _kernel(name: str, libraries: Mapping[str, bytes], folder: BuildFolder) -> Any:
    """The function of a library, loaded from a file that is gone again."""
    path = folder.path / f"{name[:32]}-{os.urandom(4).hex()}.so"
    guards: Any = torch._C._dynamo.guards
    os.environ[ADDRESS] = str(guards._torchinductor_pyobject_tensor_data_ptr)
    try:
        path.write_bytes(libraries[name])
        spec = importlib.util.spec_from_file_location(f"{name}.kernel", path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        path.unlink(missing_ok=True)
    return module.kernel
