"""From a module and example inputs to a program that was seen to agree with it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from torch.utils import _pytree as pytree

from xdit_compile.capture.state.attributes import Entries, described, keep, place_of_change
from xdit_compile.capture.state.containers import Outcome, observed
from xdit_compile.capture.state.module_snapshot import given_back, preserved, same_random_numbers
from xdit_compile.capture.state.signature import Fingerprint, changes, fingerprint, kept
from xdit_compile.errors import CaptureError, NoRoomError, StateError
from xdit_compile.ir.peak_memory import ran_out
from xdit_compile.ir.precision import full_precision
from xdit_compile.ir.program import Program
from xdit_compile.ir.results import Template, tensors_of

from .by_modules import by_modules
from .by_values import by_values
from .decompose import DataDependence
from .interpret import run_outcome
from .outline import outline
from .tracing import Flat, Trace, by_dynamo, by_export

CaptureMethod = Callable[[Flat], Trace]

CAPTURE_METHODS: tuple[tuple[str, CaptureMethod], ...] = (
    ("values", by_values),
    ("export", by_export),
    ("dynamo", by_dynamo),
    ("modules", by_modules),
)
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
DATA_DEPENDENT = (
    DataDependence,
    GuardOnDataDependentSymNode,
    DataDependentOutputException,
    DynamicOutputShapeException,
)


@torch.no_grad()
def capture(
    module: nn.Module,
    args: tuple,
    kwargs: dict,
    *,
    check: bool = True,
    run: bool = True,
    forward: Callable[..., Any] | None = None,
    watched: Callable[[], AbstractContextManager[Any]] = nullcontext,
    methods: tuple[tuple[str, CaptureMethod], ...] = CAPTURE_METHODS,
) -> Program:
    """Record what a module computes of its inputs as a functional ATen program.

    The module runs once as it is, which fills its caches and gives the numbers to compare with. Then several methods
    are tried in turn; the first whose program agrees is taken. On the meta device nothing is run or compared;
    inputs that are not there (masks, lengths) keep their values for the module's code to read.

    Args:
        module: any module in evaluation mode; it is left as it was found.
        args, kwargs: example inputs. Tensors may stand in any nest of containers known to pytree; everything that is no
            tensor is baked in.
        check: compare the program with the module.
        run: without it the module is traced alone, which takes no memory for what it computes, and nothing is compared.
        forward: what to call instead of ``module.forward``.
        watched: around the module's own run; where it does not run, around what traces it.
        methods: names and functions of the ways to record it that are tried.

    Raises:
        CaptureError: with the reason of each method; the module is as it was then.
        NoRoomError: there is no memory to run the module.
        StateError: the module keeps something from call to call.
    """
    _refuse_training(module)
    flat = Flat(module, forward or module.forward, args, kwargs)
    try:
        with same_random_numbers(), given_back(module, *flat.objects):
            return _first_that_agrees(flat, methods, check, run, watched)
    except Exception as error:
        if not ran_out(error):
            raise
    raise NoRoomError("there is no memory to run the module whole: use a smaller size, or more ranks")


def _refuse_training(module: nn.Module) -> None:
    """See to it that no module computes otherwise because it is in training mode."""
    for child in module.modules():
        drops = isinstance(child, nn.modules.dropout._DropoutNd) and child.p > 0
        counts = isinstance(child, nn.modules.batchnorm._NormBase) and child.track_running_stats
        if child.training and (drops or counts):
            raise CaptureError(
                f"the module is in training mode, as is a {type(child).__name__} in it: call .eval() first"
            )


def _first_that_agrees(
    flat: Flat, methods: tuple[tuple[str, CaptureMethod], ...], check: bool, run: bool,
    watched: Callable[[], AbstractContextManager[Any]],
) -> Program:  # fmt: skip
    module = flat.module
    tensors = [*flat.tensors(), *module.parameters(), *module.buffers()]
    weightless = not run or any(tensor.is_meta for tensor in tensors)
    flat.runs, expected = not weightless, None
    if flat.runs:
        with full_precision(), watched():
            expected = _own_outcome(flat)
        flat.seen.outcome = Template.of(expected)
    reasons: list[str] = []
    about_data = False
    for how, method in methods:
        if how == "dynamo" and (weightless or about_data):
            continue
        try:
            with preserved(module), nullcontext() if flat.runs else watched():
                program = _captured_by(flat, how, method)
            if check and not weightless:
                with full_precision():
                    compare(run_outcome(program, module, *flat.own_inputs()), expected)
            return program
        except Exception as error:
            if ran_out(error):
                raise
            about_data = about_data or _is_about_data(error)
            reasons.append(f"{how}: {first_line(error)}")
    raise CaptureError(
        f"this module could not be captured ({'; '.join(reasons)}); run it whole with Plan(fallback='unsplit')"
    )


def _own_outcome(flat: Flat) -> Outcome:
    """What the module does; where that left something behind, a second call must find and leave it so.

    Raises:
        StateError: the module keeps something that changes from call to call.
    """
    state_before, objects_before = kept(fingerprint(flat.module)), _described(flat.objects)
    result = _once(flat)
    if objects_before != (after := _described(flat.objects)):
        change = place_of_change(objects_before, after)
        raise CaptureError(f"the module changes an object that it is given{change and ' in ' + change}, as a cache")
    left = kept(fingerprint(flat.module))
    if left != state_before:
        again = _once(flat)
        if changed := changes(left, fingerprint(flat.module)):
            raise StateError(changed, "in every call")
        if differs(again, result):
            raise StateError(
                changes(state_before, left), "in the first call, so that a second one gives another result"
            )
        if changed := _changed_by_inputs(flat, left):
            raise StateError(changed, "with the inputs, for others to read")
    return result


def _described(objects: Sequence[Any]) -> Entries:
    found = Entries((type(each).__name__, described(each, {})) for each in objects)
    keep(found)
    return found


def _once(flat: Flat) -> Outcome:
    with same_random_numbers():
        return observed(flat.call, *flat.own_inputs())


def _changed_by_inputs(flat: Flat, left: Fingerprint) -> dict[tuple[str, str], str]:
    """What a module leaves behind otherwise when it is called with other values, in which it may show no fault."""
    args, kwargs = pytree.tree_map_only(torch.Tensor, _faded, flat.own_inputs())
    with given_back(flat.module, always=True), same_random_numbers(), suppress(Exception):
        flat.call(*args, **kwargs)
        return changes(left, fingerprint(flat.module))
    return {}


def _faded(tensor: torch.Tensor) -> torch.Tensor:
    return tensor * 0.875 if tensor.is_floating_point() else tensor


def _captured_by(flat: Flat, how: str, method: CaptureMethod) -> Program:
    trace = method(flat)
    root, inputs = outline(trace)
    used = {spec.target for spec in inputs if spec.kind == "constant"}
    constants = {name: value for name, value in trace.constants.items() if name in used}
    outcome = flat.seen.outcome
    if outcome is None:
        raise CaptureError("the module's result was not seen")
    recorded = len(pytree.tree_leaves(root.graph.output_node().args))
    if recorded != outcome.count:
        raise CaptureError(f"the module returned {outcome.count} tensors, and {recorded} while it was recorded")
    return Program(root, inputs, constants, flat.in_spec, outcome, trace.guards, how, trace.kept)


def _is_about_data(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, DATA_DEPENDENT):
            return True
        error = error.__cause__ or error.__context__
    return False


def compare(actual: Any, expected: Any) -> None:
    """Compare two results of a module, tensor by tensor.

    Raises:
        CaptureError: where they differ by more than rounding, relative to the greatest expected value.
    """
    for position, (one, other) in enumerate(zip(tensors_of(actual), tensors_of(expected), strict=True)):
        if one.shape != other.shape or one.dtype != other.dtype:
            raise CaptureError(
                f"output {position} is {one.dtype}{tuple(one.shape)} instead of {other.dtype}{tuple(other.shape)}"
            )
        difference = relative_difference(one, other)
        if not difference <= TOLERANCE.get(other.dtype, 0.0):
            raise CaptureError(f"output {position} differs from the module's own by {difference:.1e}")


def differs(actual: Any, expected: Any) -> bool:
    """Whether two results of a module differ by more than rounding."""
    try:
        compare(actual, expected)
    except CaptureError:
        return True
    return False


def relative_difference(one: torch.Tensor, other: torch.Tensor) -> float:
    """Greatest difference of two tensors relative to the greatest finite value of the second.

    Equal infinities and NaNs agree.
    """
    if one.numel() == 0:
        return 0.0
    wide = torch.complex128 if other.is_complex() else torch.float64
    one, other = one.to(wide), other.to(wide)
    same = (one == other) | (one.isnan() & other.isnan())
    difference = torch.where(same, 0, one - other).abs().max().item()
    scale = torch.where(other.isfinite(), other, 0).abs().max().item()
    return difference / scale if scale else (0.0 if difference == 0 else math.inf)


def first_line(error: BaseException) -> str:
    """What an exception says, on one line of bearable length."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {text}"[:300]
