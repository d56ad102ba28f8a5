"""Stands in for a parameter whose values are elsewhere: its shape can be read, its values neither read nor written."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from xdit_compile.errors import UsageError

SETTABLE = ("requires_grad", "grad")
WRITERS = ("__set__", "__setitem__", "__delitem__", "__delete__")
PLAIN = (bool, int, float, str, torch.dtype, torch.device, torch.layout, torch.memory_format, torch.UntypedStorage)


class Released(nn.Parameter):
    """A parameter on the meta device that refuses every use of its values, in one line that says what to do.

    What can be asked for are shape, dtype, device, strides and the like; ``detach()`` and ``.data`` give another one
    that refuses as well. Made by `released`. What every call asks for is answered without going through torch.
    """

    origin: str
    _shape: torch.Size
    _dtype: torch.dtype
    is_meta = True
    device = torch.device("meta")
    shape = property(operator.attrgetter("_shape"))
    dtype = property(operator.attrgetter("_dtype"))

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        attribute = getattr(getattr(func, "__self__", None), "__name__", "")
        mine = next((leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Released)), None)
        if name in WRITERS and (mine is not args[0] or attribute not in SETTABLE):
            raise refusal(mine)
        try:
            with torch._C.DisableTorchFunctionSubclass():
                result = func(*args, **(kwargs or {}))
        except Exception as error:
            raise refusal(mine) from error
        if name == "requires_grad_":
            return mine
        if mine is not None and (name == "detach" or (name == "__get__" and attribute == "data")):
            return released(result, mine.origin)
        if name in (*WRITERS, "empty_like") or (result is None and name == "__get__") or _is_plain(result):
            return result
        raise refusal(mine)

    def __deepcopy__(self, memo: dict) -> Any:
        raise refusal(self)

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise refusal(self)

    def __repr__(self) -> str:  # type: ignore[override]
        with torch._C.DisableTorchFunctionSubclass():
            return f"Released({self.origin!r}, {tuple(self.shape)}, {self.dtype})"


def released(like: torch.Tensor, origin: str) -> Released:
    """A stand-in for a parameter.

    Args:
        like: its shape, dtype and ``requires_grad`` are taken.
        origin: the name that the parameter had in its module then.
    """
    with torch.inference_mode(False), torch.no_grad():
        empty = torch.empty_like(like.detach(), device="meta")
        made: Released = torch.Tensor._make_subclass(Released, empty, like.requires_grad)  # type: ignore[assignment]
    made.origin = origin
    made._shape, made._dtype = empty.shape, empty.dtype
    return made


def refusal(parameter: Released | None = None) -> UsageError:
    """What is said to whom asks for values that are not there."""
    name = "a parameter" if parameter is None else parameter.origin
    return UsageError(
        f"the values of {name} are not in the module (ranks hold slices, or they are read when they are needed): "
        "call xdit_compile.restore(pipe) on all ranks first and parallelize it again afterwards, or parallelize a "
        "loaded pipeline with Plan(keep_weights=True)"
    )


class Refusals:
    """Makes modules that hold released parameters refuse as wholes, before they have changed or written any.

    Without it ``load_state_dict``, ``half`` or ``to`` would change what comes first in the module, and fail in the
    middle.
    """

    def __init__(self) -> None:
        self._undo: dict[nn.Module, list[Callable[[], Any]]] = {}

    def put_on(self, root: nn.Module) -> None:
        """Have every module of a tree refuse that holds released parameters, itself or further inside."""
        for module in root.modules():
            if module not in self._undo and first_released(module) is not None:
                hooks = (
                    module.register_state_dict_pre_hook(_refuse_state),
                    module.register_load_state_dict_pre_hook(_refuse_state),
                )
                vars(module)["_apply"] = functools.partial(_apply, module)
                self._undo[module] = [*(hook.remove for hook in hooks), _taking_off(module)]

    def take_off(self) -> None:
        """Let all of them do what they did before."""
        for undo in self._undo.values():
            for step in undo:
                step()
        self._undo.clear()


def _apply(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Called in place of ``module._apply``, by which modules change devices and dtypes."""
    refuse_released(module)
    return type(module)._apply(module, *args, **kwargs)


def _taking_off(module: nn.Module) -> Callable[[], Any]:
    return lambda: vars(module).pop("_apply", None)


def _refuse_state(module: nn.Module, *_: Any, **__: Any) -> None:
    refuse_released(module)


def refuse_released(module: nn.Module) -> None:
    """See to it that all parameters of a module are there.

    Raises:
        UsageError: naming the first that was released.
    """
    if (found := first_released(module)) is not None:
        raise refusal(found)


def first_released(module: nn.Module) -> Released | None:
    """A parameter of a module that was released, or None."""
    return next((each for each in module.parameters() if isinstance(each, Released)), None)


def _is_plain(result: Any) -> bool:
    if isinstance(result, tuple) and not hasattr(result, "_fields"):
        return all(type(item) is int for item in result)
    return isinstance(result, PLAIN)
