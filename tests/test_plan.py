"""Plans: every problem at once, and none where there is none."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xdit_compile import Plan
from xdit_compile.errors import PlanError, UsageError
from xdit_compile.plan.methods import METHODS

TURNED = ("ring", "tensor", "data", "cfg", "pipefusion", "distrifusion", "ulysses")


def test_the_default_plan_fits_one_process():
    assert Plan().check(1) == Plan()
    assert Plan().world_size == 1


def test_a_link_is_bytes_per_second_and_no_use_to_a_plan_without_the_pass():
    assert Plan(link="25GB/s").hiding_link == 25e9 and Plan(link="1.5 GiB/s").hiding_link == 1.5 * 2**30
    assert Plan().hiding_link is Plan(link="25GB/s", without=("hide_exchanges",)).hiding_link is None
    with pytest.raises(PlanError, match="link='25GB/s' begins exchanges early, and backend='nexfort' is not known"):
        Plan(link="25GB/s", backend="nexfort").check()


@given(st.integers(1, 64), st.integers(1, 64), st.integers(1, 4096))
def test_degrees_must_multiply_to_the_world(ulysses: int, ring: int, world: int):
    plan = Plan(ulysses=ulysses, ring=ring)
    problems = plan.problems(world)
    assert bool(problems) == (ulysses * ring != world)
    if problems:
        needed = ulysses * ring
        assert f"needs {needed} process" in problems[0] and f"start {needed} (--nproc {needed}, or" in problems[0]


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("ulysses", -1, "ulysses=-1 must be"),
        ("ulysses", 0, "ulysses=0 must be"),
        ("ring", 2.0, "ring=2.0 must be"),
        ("ring", True, "ring=True must be"),
        ("ring", "2", "ring='2' must be"),
        ("backend", "tvm", "backend='tvm' is unknown; choose one of auto, inductor, nexfort, eager"),
        ("attention", "magic", "attention='magic' is unknown; choose one of auto"),
        ("fallback", "hope", "fallback='hope' is unknown"),
        ("cfg", 0, "cfg=0 must be"),
        ("data", -2, "data=-2 must be"),
        ("tensor", 1.5, "tensor=1.5 must be"),
        ("split_scheme", "columns", "split_scheme='columns' is unknown; choose one of all, heads, ffn"),
        ("mesh_order", ("ring", "ulysses"), "mesh_order=('ring', 'ulysses') must name each of data, cfg"),
        ("verify", 1, "verify=1 must be True or False"),
        ("link", "fast", "link='fast' must be bytes per second of one rank, such as '450GB/s' or '25GB/s'"),
        ("link", "400Gb/s", "link='400Gb/s' must be bytes per second"),
        ("link", "0GB/s", "link='0GB/s' must be bytes per second"),
        ("link", 25e9, "link=25000000000.0 must be bytes per second"),
        ("timeout_s", 0, "timeout_s=0 must be a positive"),
        ("timeout_s", float("nan"), "timeout_s=nan must be a positive"),
        ("timeout_s", float("inf"), "timeout_s=inf must be a positive"),
    ],
)
def test_each_bad_value_is_named(field: str, value: object, expected: str):
    with pytest.raises(PlanError, match="^" + re.escape(expected)):
        Plan(**{field: value}).check()


def test_the_tables_of_methods_say_what_the_methods_say():
    readme, advice = (Path(__file__).parents[1] / name for name in ("README.md", "docs/plans.md"))
    for method in METHODS:
        assert f"| {' | '.join(method.row)} |" in readme.read_text()
        assert f"| {' | '.join(method.advice)} |" in advice.read_text()
        assert f"{method.name}: {method.help}"[:60] in (Plan.__doc__ or "")


def test_a_method_without_a_place_stands_where_another_would():
    assert Plan(mesh_order=TURNED).dimensions[:3] == ("ring", "allgather", "tensor")
    assert Plan(cfg=2, allgather=3).check(6)
    with pytest.raises(PlanError, match="allgather=2 shares the tokens, as ring=2 would; take one of them"):
        Plan(allgather=2, ring=2).check()


def test_every_problem_is_listed_at_once_on_one_line():
    bad = Plan(ulysses=-1, ring=0, backend="tvm", attention="magic", fallback="hope", timeout_s=-3)
    with pytest.raises(PlanError) as caught:
        bad.check(8)
    message = str(caught.value)
    assert "\n" not in message
    assert [clause.split("=")[0].strip() for clause in message.split("; ") if "=" in clause] == [
        "ring",
        "ulysses",
        "backend",
        "attention",
        "fallback",
        "timeout_s",
    ]


def test_a_plan_is_frozen_and_can_be_hashed():
    plan = Plan(ulysses=2)
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.ulysses = 4  # type: ignore[misc]
    assert {plan, Plan(ulysses=2), Plan(ulysses=2, ring=2)} == {plan, Plan(ulysses=2, ring=2)}


def test_plan_problems_are_usage_errors():
    assert issubclass(PlanError, UsageError)
    assert PlanError("x").exit_code == 2
