"""What decides which program a call of a module gives, as plain data that is equal in every process where all is equal.

The counterpart of `xdit_compile.capture.state.signature`, which compares by identity and so within one process alone.
Classes and functions stand as the names under which they are found again; what their code says is for `sources` to
tell. None, numbers and strings stand for themselves, everything else is an object whose tag says what it is.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from xdit_compile.capture.state.in_place import HELD, own_class
from xdit_compile.capture.state.signature import AROUND, HOOKS, TORCH_STATE
from xdit_compile.weights.released import Released

from .portable_values import ADDRESSES, Describing, is_ours
from .unportable import Unportable

CALLED = ("forward", "__call__")
"""Methods whose own code counts besides the name of their class, since others are put in their place."""
GLOBAL_HOOKS = ("_global_forward_pre_hooks", "_global_forward_hooks")
PARAMETRIZED = "torch.nn.utils.parametrize"
"""Makes classes whose attributes are computed; by what, stands in the children of the module."""
ATTENTION = ("diffusers.models.attention_dispatch", "_AttentionBackendRegistry", "_active_backend")
"""Where diffusers keeps which attention processors take that were told of none."""


def describe_module(module: nn.Module, absent: str = "meta", kind: str | None = None) -> dict[str, Any]:
    """Describe a module, with all that is in it and hangs on it, by the paths of its modules.

    Counted are: classes, the order of children, training mode; of parameters and buffers shape, dtype, kind of device,
    strides where they are not contiguous, and which are the same tensor; hooks; a replaced ``forward`` of all modules
    but the root; and whatever else hangs on a module, tensors by their values. Not counted are values of weights, what
    stands around the forward of the root or in its place, and where a model was loaded from.

    Args:
        absent: the kind of device where weights would be that were released, or are yet to be read.
        kind: that where all of them will be; None for where they are.

    Returns:
        Dicts, lists, strings and numbers. Tensors and objects that are there twice count as such.

    Raises:
        Unportable: something that another process would not find again, named with its module and attribute.
    """
    describing = _Modules(absent, kind)
    with _understood(describing):
        return {"modules": describing.tree(module), "global hooks": describing.global_hooks()}


def describe_call(args: tuple, kwargs: dict[str, Any], kind: str | None = None) -> dict[str, Any]:
    """Describe a call without its module: the containers of its arguments, their leaves, and what is set around it.

    Of tensors shape, dtype and kind of device count; programs take all inputs contiguous, whatever strides they come
    with. All other leaves count by value.

    Args:
        args, kwargs: of the call.
        kind: of the device where all tensors will be; None for where they are.

    Raises:
        Unportable: an argument that another process would not find again.
    """
    leaves, spec = pytree.tree_flatten((args, kwargs))
    describing = _Modules()
    with _understood(describing):
        return {
            "containers": _containers(describing, spec),
            "leaves": [_leaf(describing, number, leaf, kind) for number, leaf in enumerate(leaves)],
            "around": _around(),
        }


def describe_value(value: Any, where: str) -> Any:
    """Describe one value, as those that hang on modules are.

    Args:
        where: what the value is, for the message of an error.

    Raises:
        Unportable: another process would not find it again.
    """
    describing = _Modules()
    with _understood(describing):
        return describing.attribute("", where, value)


class _understood:
    """Has whatever goes wrong inside, in code of whatever is looked at, end as an `Unportable` that says where."""

    def __init__(self, describing: Describing):
        self._describing = describing

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, RecursionError):
            raise Unportable(f"{self._describing.where()} is nested too deeply") from None
        if isinstance(error, Exception) and not isinstance(error, Unportable):
            said = f"{type(error).__name__}: {error}"
            raise Unportable(f"{self._describing.where()} cannot be looked at: {said}") from error


class _Modules(Describing):
    """Describes modules, and what hangs on them as `Describing` does."""

    def __init__(self, absent: str = "meta", kind: str | None = None) -> None:
        super().__init__()
        self._absent, self._kind = absent, kind
        self._paths: dict[int, str] = {}
        self._weights: dict[int, str] = {}
        self._roots: list[nn.Module] = []
        self._module_classes: dict[type, Any] = {}

    def tree(self, root: nn.Module) -> dict[str, Any]:
        """Each module of a tree by its path; paths of a second tree begin with a number of it."""
        start = f"{len(self._roots)}/" if self._roots else ""
        self._roots.append(root)
        entered = list(self._enter(root, start))
        return {path: self._module(path, module, path == "") for path, module in entered}

    def global_hooks(self) -> list[Any]:
        """The hooks that run around every module."""
        found = [(name, vars(nn.modules.module).get(name) or {}) for name in GLOBAL_HOOKS]
        return [self.attribute("", name, list(hooks.values())) for name, hooks in found if hooks]

    def module(self, module: nn.Module) -> Any:
        if id(module) in self._paths:
            return {"module": self._paths[id(module)]}
        place = self.leave()
        described = {"module": self.tree(module)}
        self.go_back(place)
        return described

    def weight(self, tensor: torch.Tensor) -> str | None:
        return self._weights.get(id(tensor))

    def known_module(self, value: Any) -> bool:
        return id(value) in self._paths

    def _enter(self, root: nn.Module, start: str) -> Iterator[tuple[str, nn.Module]]:
        """All modules of a tree, each once, by their paths; from then on they are known by these, as weights are."""
        pending = [(start, root)]
        while pending:
            path, module = pending.pop()
            if id(module) in self._paths:
                continue
            self._paths[id(module)] = path
            yield path, module
            for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
                if tensor is not None:
                    self._weights.setdefault(id(tensor), _joined(path, name))
            children = [(_joined(path, name), child) for name, child in module._modules.items() if child is not None]
            pending += reversed(children)

    def _module(self, path: str, module: nn.Module, root: bool) -> dict[str, Any]:
        state = vars(module)
        described: dict[str, Any] = {"class": self._module_class(path, own_class(module)), "training": module.training}
        if module._modules:
            described["children"] = [self._child(path, name, child) for name, child in module._modules.items()]
        for holder in ("_parameters", "_buffers"):
            if state[holder]:
                described[holder] = [self._weight(path, name, tensor) for name, tensor in state[holder].items()]
        for hooks in HOOKS:
            if state[hooks]:
                described[hooks] = [self._hook(path, state, hooks, key) for key in state[hooks]]
        attributes = {**state, **getattr(state.get(HELD), "found", {})}
        described["attributes"] = {
            name: self.attribute(path, name, value)
            for name, value in attributes.items()
            if value is not None and name not in TORCH_STATE and name not in ADDRESSES and name != HELD
            and not (root and name in AROUND) and not (is_ours(value) and hasattr(own_class(module), name))
        }  # fmt: skip
        return described

    def _module_class(self, path: str, kind: type) -> Any:
        """A class's name, and what code its methods that are called have: decorated and replaced ones have others."""
        if kind not in self._module_classes:
            self.at(path, "the class")
            codes = {name: codes_of(kind, name) for name in CALLED}
            named = kind.__base__ if kind.__module__ == PARAMETRIZED and kind.__base__ is not None else kind
            self._module_classes[kind] = [
                self.class_name(named),
                *(["parametrized"] if named is not kind else []),
                codes,
            ]
        return self._module_classes[kind]

    def _child(self, path: str, name: str, child: nn.Module | None) -> Any:
        if child is None:
            return [name, None]
        known = self._paths[id(child)]
        return name if known == _joined(path, name) else [name, known]

    def _weight(self, path: str, name: str, tensor: torch.Tensor | None) -> Any:
        if tensor is None:
            return [name, None]
        if (first := self._weights[id(tensor)]) != _joined(path, name):
            return [name, {"same as": first}]
        if isinstance(tensor, Released):
            return [name, list(tensor.shape), str(tensor.dtype), self._absent]
        self.at(path, name)
        shape, dtype, kind, *strides = self.form(tensor)
        form = [shape, dtype, self._kind or kind, *strides]
        return [name, *form, *self.subclass(tensor, plain=(torch.Tensor, nn.Parameter))]

    def _hook(self, path: str, state: dict[str, Any], hooks: str, key: int) -> Any:
        flags = [key in state.get(f"{hooks}_with_kwargs", ()), key in state.get(f"{hooks}_always_called", ())]
        place = list(state[hooks]).index(key)
        return [self.attribute(path, f"{hooks}[{place}]", state[hooks][key]), *flags]


def codes_of(kind: type, name: str) -> list[str]:
    """Which code a method of a class has, and what it wraps: module, name and line of each."""
    method = inspect.getattr_static(kind, name, None)
    codes: list[str] = []
    while method is not None and len(codes) < 16:
        method = getattr(method, "__func__", method)
        if (code := getattr(method, "__code__", None)) is not None:
            codes.append(f"{method.__globals__.get('__name__')}:{code.co_qualname}:{code.co_firstlineno}")
        method = getattr(method, "__wrapped__", None)
    return codes


def _joined(path: str, name: str) -> str:
    return f"{path}.{name}" if path and not path.endswith("/") else f"{path}{name}"


def _containers(describing: Describing, spec: pytree.TreeSpec) -> Any:
    if spec.is_leaf():
        return None
    described = [describing.class_name(spec.type), describing.attribute("", "a container of the inputs", spec.context)]
    return [*described, *(_containers(describing, child) for child in spec.children())]


def _leaf(describing: Describing, number: int, leaf: Any, kind: str | None) -> Any:
    describing.at("", f"input {number}")
    if not isinstance(leaf, torch.Tensor):
        return describing.attribute("", f"input {number}", leaf)
    form = [list(leaf.shape), str(leaf.dtype), kind or leaf.device.type]
    return {"input": form if leaf.layout == torch.strided else [*form, str(leaf.layout)]}


def _around() -> dict[str, Any]:
    accelerator = torch.accelerator.current_accelerator()
    kinds = sorted({"cpu", "cuda", *([accelerator.type] if accelerator is not None else [])})
    casts = [[kind, str(torch.get_autocast_dtype(kind))] for kind in kinds if torch.is_autocast_enabled(kind)]
    registry = getattr(sys.modules.get(ATTENTION[0]), ATTENTION[1], None)
    return {
        "autocast": casts,
        "inference mode": torch.is_inference_mode_enabled(),
        "grad mode": torch.is_grad_enabled(),
        "default device": torch.get_default_device().type,
        "attention": str(getattr(registry, ATTENTION[2], None)),
    }
