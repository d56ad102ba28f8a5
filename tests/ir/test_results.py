"""Results of every make: tensors are found in a fixed order, and replaced without the class that made the result."""

from __future__ import annotations

import collections
import dataclasses
import gc
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from diffusers.utils import BaseOutput
from torch import Tensor, nn

from xdit_compile.capture.capture import CAPTURE_METHODS, capture
from xdit_compile.capture.interpret import run_program
from xdit_compile.errors import CaptureError
from xdit_compile.ir.results import Template, replaced, tensors_of

X, Y = torch.arange(3.0), torch.arange(4.0) + 10


@dataclasses.dataclass
class Output(BaseOutput):
    """One field needs a value and is often None."""

    sample: Tensor
    flags: list[bool] | None
    note: str = "made"


@dataclasses.dataclass(frozen=True)
class Frozen:
    first: Tensor
    second: Any


@dataclasses.dataclass(slots=True)
class Slots:
    first: Tensor
    second: Any = None


class Derived:
    """Reads numbers of its tensors when it is made."""

    def __init__(self, tensor: Tensor, *, name: str):
        self.tensor, self.name, self.greatest = tensor, name, tensor.max().item()

    def __repr__(self) -> str:
        return str({**vars(self), "itself": None})


class Named(list):
    """A list that wants a name, which is an attribute."""

    def __init__(self, name: str, entries: Any):
        super().__init__(entries)
        self.name = name


class Sizes(tuple):
    """A tuple with a tensor beside its items."""

    beside: Tensor


Pair = collections.namedtuple("Pair", "first second")


def sizes() -> Sizes:
    made = Sizes((X, 1))
    made.beside = Y
    return made


def default() -> collections.defaultdict:
    return collections.defaultdict(list, x=X, y=[Y])


RESULTS: dict[str, tuple[Callable[[], Any], Callable[[Any], list[Any]]]] = {
    "tensor": (lambda: X, lambda r: [r]),
    "tuple": (lambda: (X, None, [Y, "text"]), lambda r: [r[0], r[2][0]]),
    "named tuple": (lambda: Pair(X, {"y": Y}), lambda r: [r.first, r.second["y"]]),
    "structseq": (lambda: torch.max(torch.stack([X, X]), 0), lambda r: [r.values, r.indices]),
    "tuple with attributes": (sizes, lambda r: [r[0], r.beside]),
    "ordered dict": (lambda: collections.OrderedDict(y=Y, x=X), lambda r: [r["y"], r["x"]]),
    "default dict": (default, lambda r: [r["x"], r["y"][0]]),
    "deque": (lambda: collections.deque([X, Y], maxlen=2), lambda r: [r[0], r[1]]),
    "list of a class": (lambda: Named("a", [X, Y]), lambda r: [r[0], r[1]]),
    "output": (lambda: Output(X, None), lambda r: [r.sample]),
    "output as a dict": (lambda: Output(X, None), lambda r: [r["sample"]]),
    "output of a dict": (lambda: Output({"x": X}, None, None), lambda r: [r["x"], r.sample["x"]]),
    "nested outputs": (lambda: Output(Output(X, [True]), [Y]), lambda r: [r.sample.sample, r["flags"][0]]),
    "frozen dataclass": (lambda: Frozen(X, Frozen(Y, 1)), lambda r: [r.first, r.second.first]),
    "slots": (lambda: Slots(X, (Y,)), lambda r: [r.first, r.second[0]]),
    "object": (lambda: [Derived(X, name="d")], lambda r: [r[0].tensor]),
    "the same tensor twice": (lambda: {"a": X, "b": Derived(X, name="d")}, lambda r: [r["a"], r["b"].tensor]),
}  # fmt: skip


def plain(value: Any) -> str:
    """Everything that a result is, as text; values of tensors are those of `X` and `Y`."""
    attributes = vars(value) if hasattr(value, "__dict__") and not isinstance(value, Tensor) else None
    return repr([type(value), attributes, value])


@pytest.mark.parametrize("name", RESULTS)
def test_tensors_are_found_and_replaced_in_the_very_object(name: str) -> None:
    make, read = RESULTS[name]
    result = make()
    found = tensors_of(result)
    assert list(map(id, found)) == list(map(id, read(result)))
    after = replaced(result, Tensor, lambda tensor: -tensor)
    assert after is result or isinstance(result, tuple | Tensor)
    assert type(after) is type(result)
    assert all(torch.equal(new, -old) for new, old in zip(read(after), found, strict=True))


@pytest.mark.parametrize("name", RESULTS)
def test_a_template_gives_every_call_a_result_of_its_own(name: str) -> None:
    make, read = RESULTS[name]
    before = make()
    template = Template.of(before)
    found = tensors_of(before)
    assert template.count == len(found) and tensors_of(template.form) == []
    first, second = (template.filled([tensor * k for tensor in found]) for k in (1, 2))
    assert plain(first) == plain(before) and type(second) is type(before)
    assert all(torch.equal(new, 2 * old) for new, old in zip(read(second), read(before), strict=True))
    assert all(torch.equal(new, old) for new, old in zip(read(first), read(before), strict=True))
    assert list(map(id, tensors_of(before))) == list(map(id, found))
    if isinstance(before, BaseOutput):
        assert plain(pickle.loads(pickle.dumps(first))) == plain(before)


def test_what_does_not_change_stays_the_same_object() -> None:
    inner = (1, [2])
    result = {"inner": inner, "x": X, "sizes": X.shape}
    assert replaced(result, Tensor, torch.neg)["inner"] is inner and type(result["sizes"]) is torch.Size
    template = Template.of([[], {"a": []}, X])
    first, second = template.filled([X]), template.filled([X])
    first[0].append(1)
    first[1]["a"].append(1)
    assert second[:2] == [[], {"a": []}] == template.filled([X])[:2]


def test_containers_keep_what_their_classes_know() -> None:
    template = Template.of((default(), collections.deque([X, Y], maxlen=2)))
    made, queue = template.filled([X, Y, X, Y])
    assert made["new"] == [] and queue.maxlen == 2


def test_objects_that_refer_to_themselves_or_stand_twice_keep_that() -> None:
    one = Derived(X, name="d")
    one.itself = one
    made = Template.of([one, one]).filled([Y])
    assert made[0] is made[1] is made[0].itself and made[0].tensor is Y and one.tensor is X


def test_modules_and_classes_are_not_looked_into() -> None:
    module = nn.Linear(2, 2)
    result = [X, module, Derived, module.forward]
    assert len(tensors_of(result)) == 1
    assert Template.of(result).filled([Y])[1:] == result[1:]


def test_a_template_keeps_no_tensor_of_the_first_call() -> None:
    tensors = [torch.zeros(3) for _ in range(2)]
    gone = [weakref.ref(tensor) for tensor in tensors]
    template = Template.of(Output(Derived(tensors[0], name="d"), [{"deep": (tensors[1],)}]))
    tensors.clear()
    gc.collect()
    assert template.count == 2 and [ref() for ref in gone] == [None, None]


def test_tensors_in_a_set_are_refused() -> None:
    with pytest.raises(CaptureError, match="in a set"):
        Template.of([{X}])


class Encoder(nn.Module):
    """Returns what an autoencoder returns, and some fields that are None."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Any:
        parameters = self.linear(x)
        return AutoencoderKLOutput(latent_dist=DiagonalGaussianDistribution(parameters)), Output(x + 1, None)


@pytest.mark.parametrize("how", [name for name, _ in CAPTURE_METHODS])
def test_every_way_of_capture_returns_objects_with_their_tensors(how: str) -> None:
    module, x = Encoder().eval(), torch.randn(2, 4)
    program = capture(module, (x,), {}, methods=tuple(method for method in CAPTURE_METHODS if method[0] == how))
    for given in (x, x + 1):
        with torch.no_grad():
            (expected, other), (found, second) = module(given), run_program(program, module, (given,), {})
        mine, own = vars(found.latent_dist), vars(expected.latent_dist)
        assert type(found.latent_dist) is DiagonalGaussianDistribution and mine.keys() == own.keys()
        assert mine["deterministic"] is False
        for name in mine.keys() - {"deterministic"}:
            torch.testing.assert_close(mine[name], own[name])
        samples = [r.latent_dist.sample(torch.Generator().manual_seed(0)) for r in (expected, found)]
        torch.testing.assert_close(*samples)
        assert second.flags is None and list(second) == list(other)
        torch.testing.assert_close(second["sample"], other.sample)
