"""Values and tensors as plain data: what is read again is what was written, of the same type."""

from __future__ import annotations

import enum
import json
import operator
from typing import Any

import numpy as np
import pytest
import torch

from xdit_compile.cache.graphs import restored, stored
from xdit_compile.cache.programs import packed, unpacked
from xdit_compile.cache.unportable import Unportable
from xdit_compile.cache.values import from_plain, path_of, to_plain


class Colour(enum.Enum):
    RED = "r"


class Rights(enum.Flag):
    READ = 1
    WRITE = 2


class Text(str):
    pass


VALUES = [
    None, True, 3, -(10**30), "text \udc80 ä", 0.1, -0.0, float("inf"), complex(float("-inf"), -0.0), b"\0\xff", ...,
    [1, (2, [3.0])], (), (True, 1), torch.Size([2, 3]), {}, {(1, None): "a", 2: {"tuple": [1]}, "x": 1.5, b"k": ()},
    slice(None, 3, -1), torch.float8_e5m2, torch.strided, torch.channels_last, torch.device("cpu"), Colour.RED,
    Rights.WRITE,
]  # fmt: skip


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_values_come_back_of_the_same_type(value: Any) -> None:
    text = json.dumps(to_plain(value), allow_nan=False)
    found = from_plain(json.loads(text))
    assert found == value and repr(found) == repr(value) and type(found) is type(value)


def test_a_value_that_is_no_number_and_the_device_of_this_rank() -> None:
    assert repr(from_plain(to_plain([float("nan")]))) == "[nan]"
    described = to_plain((torch.device("cuda:3"), torch.device("cpu")))
    assert "3" not in json.dumps(described)
    assert from_plain(described, torch.device("cuda:1")) == (torch.device("cuda:1"), torch.device("cpu"))
    assert from_plain(described) == (torch.device("cuda"), torch.device("cpu"))


def in_a_function() -> Any:
    class Inner(enum.Enum):
        ONE = 1

    return Inner.ONE


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (np.float64(1), r"np.float64\(1.0\) of the type numpy.float64 is no value that plain data can say"),
        ([{"a": Text("a")}], "'a' of the type .*Text is no value"),
        ({1, 2}, "of the type builtins.set"),
        (operator.add, "<built-in function add> of the type"),
        (torch.ones(3), "a torch.Tensor is no value"),
        (Rights.READ | Rights.WRITE, "no single member of its class"),
        (in_a_function(), "is not found by the name 'in_a_function.<locals>.Inner'"),
    ],
)
def test_other_values_are_refused(value: Any, words: str) -> None:
    with pytest.raises(Unportable, match=words):
        to_plain(value)


@pytest.mark.parametrize(
    ("described", "words"),
    [
        ({"enum": [path_of(Colour), "BLUE"]}, "has no member BLUE"),
        ({"enum": ["os:system", "a"]}, "os:system is no class"),
        ({"enum": ["no_such_module:A", "a"]}, "no_such_module:A is not there"),
        ({"dtype": "float5"}, "no dtype float5"),
        ({"pickle": ""}, "no value of the tag 'pickle'"),
        ({"a": 1, "b": 2}, "an object of the tags"),
    ],
)
def test_descriptions_of_nothing_are_refused(described: Any, words: str) -> None:
    with pytest.raises(Unportable, match=words):
        from_plain(described)


GRID = torch.arange(12.0).reshape(3, 4)
TENSORS = {
    "contiguous": GRID, "transposed": GRID.t(), "with gaps": GRID[:, ::2], "expanded": GRID[:, :1].expand(3, 5),
    "windows": GRID.reshape(-1).unfold(0, 5, 2), "scalar": torch.tensor(2), "empty": GRID[:, :0],
    "conjugate": torch.tensor([1 + 2j, 3j]).conj(), "complex128": torch.ones(2, dtype=torch.complex128),
    "float8": GRID.to(torch.float8_e4m3fn), "bool": GRID > 5, "bfloat16": GRID.bfloat16(),
    "uint16": GRID.to(torch.uint16), "meta": GRID.to("meta"),
}  # fmt: skip


def test_tensors_come_back_as_they_lay_in_memory() -> None:
    written = {name: stored(tensor) for name, tensor in TENSORS.items()}
    forms = {name: form for name, (form, _) in written.items()}
    back, values = unpacked(packed(forms, {name: each for name, (_, each) in written.items() if each is not None}))
    for name, tensor in TENSORS.items():
        made = restored(back[name], values.get(name))
        assert (made.shape, made.stride(), made.dtype) == (tensor.shape, tensor.stride(), tensor.dtype), name
        assert made.device == tensor.device
        assert tensor.is_meta or torch.equal(made, tensor), name


def test_tensors_that_share_memory_are_packed_each_by_itself() -> None:
    _, found = unpacked(packed(None, {"whole": GRID, "turned": GRID.t(), "row": GRID[1]}))
    assert torch.equal(found["turned"], GRID.t()) and torch.equal(found["row"], GRID[1])
    found["whole"].zero_()
    assert torch.equal(found["row"], GRID[1])


def test_values_that_are_missing_and_other_bytes_are_told() -> None:
    form, values = stored(GRID)
    for wrong in (None, values[1:], values.int()):
        with pytest.raises(Unportable, match=r"a tensor of shape \[3, 4\] are not all there"):
            restored(form, wrong)
    data = packed({"a": 1}, {"x": GRID})
    for broken in (b"", data[:20], data[:-1], b"\xff" * 40):
        with pytest.raises(Unportable, match="are no packed program"):
            unpacked(broken)
