"""Options of a backend: how they are written, what is told of a wrong one, and that they count for what is kept."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import commands
import pytest
import torch
from torch import fx

import xdit_compile
from xdit_compile import Plan
from xdit_compile.backends.forms import form_of
from xdit_compile.backends.registry import backend_of
from xdit_compile.cli.options.request import Request
from xdit_compile.errors import PlanError, UsageError
from xdit_compile.plan.backend_options import inductor_settings, parsed
from xdit_compile.runtime.stored.keeper import APART


class Gated(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ops.aten.mul.Tensor(torch.ops.aten.sigmoid.default(x), x)


@pytest.mark.parametrize(
    "text",
    [
        "max_autotune=true,triton.cudagraphs=False, max_fusion_size = 8,cpp.min_chunk_size=none",
        '{"max_autotune": true, "triton": {"cudagraphs": false}, "max_fusion_size": 8, "cpp.min_chunk_size": null}',
    ],
)
def test_both_ways_to_write_them(text: str) -> None:
    wanted = {"max_autotune": True, "triton.cudagraphs": False, "max_fusion_size": 8, "cpp.min_chunk_size": None}
    assert parsed(text) == wanted
    plan = Plan(backend_options=parsed(text))
    assert plan.options == wanted and hash(plan) == hash(Plan(backend_options=wanted))
    assert Request.from_json(Request(plan=plan).to_json()).plan == plan


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"max_autotun": True}, "inductor has no setting 'max_autotun'; did you mean max_autotune"),
        ({"cudagraphs": False}, "inductor has no setting 'cudagraphs'; did you mean triton.cudagraphs"),
        ({"max_autotune": 1}, "max_autotune=1 must be true or false"),
        ({"max_autotune": [True]}, "backend_options['max_autotune'] must be true, false, none, a number or text"),
        ("max_autotune", "backend_options='max_autotune' must be a mapping"),
    ],
)
def test_a_wrong_one_is_named_with_what_was_meant(options: object, expected: str) -> None:
    with pytest.raises(PlanError) as error:
        Plan(backend_options=options).check()
    assert expected in str(error.value)


def test_all_that_is_read_of_the_source_are_settings_that_take_their_defaults() -> None:
    from torch._inductor import config

    known, aliases = inductor_settings(), {"force_disable_caches"}
    real = {
        name: entry.default for name, entry in config._config.items() if not name.rpartition(".")[2].startswith("_")
    }
    assert set(real) - set(known) - {"TYPE_CHECKING"} == set() and len(known) > 400 and aliases <= set(known)
    plain = (bool, int, float, str, type(None))
    assert [
        name for name in real if isinstance(real[name], plain) and name in known and not known[name].takes(real[name])
    ] == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("max_autotun=true", "inductor has no setting 'max_autotun'; did you mean max_autotune"),
        ("max_autotune", "'max_autotune' has no value; write NAME=VALUE,NAME=VALUE or a JSON object"),
        ('{"max_autotune"', "no JSON"),
        ("max_autotune=true,max_autotune=false", "max_autotune is there twice"),
    ],
)
def test_the_command_refuses_them_in_one_line(text: str, expected: str, tmp_path: Path) -> None:
    done = commands.run("generate", "--backend_options", text, cwd=tmp_path)
    assert expected in commands.one_error(done, exit_code=2) and commands.files(tmp_path) == set()


def test_the_flag_and_the_plan_are_one() -> None:
    with pytest.raises(UsageError, match="is there twice"):
        parsed("a=1,a=2")
    with mock.patch.object(
        torch._inductor, "standalone_compile", wraps=torch._inductor.standalone_compile
    ) as compiling:
        module = xdit_compile.parallelize(
            Gated().eval(), Plan(backend="inductor", backend_options=parsed("epilogue_fusion=false"))
        )
        x = torch.randn(3, 5)
        torch.testing.assert_close(module(x), torch.sigmoid(x) * x)
    assert compiling.call_args.kwargs["options"]["config_patches"]["epilogue_fusion"] is False


def test_code_and_calls_are_kept_apart_by_them() -> None:
    structure, forms = fx.symbolic_trace(Gated()), (form_of(torch.randn(3, 5)),)
    plans = [Plan(), Plan(backend_options={"epilogue_fusion": False}), Plan(backend_options={"epilogue_fusion": True})]
    names = {backend_of(plan).codes.name(structure, forms) for plan in plans}
    assert len(names) == 3 and None not in names
    assert len({plan.compiled_how for plan in plans}) == 3
    assert "backend_options" not in APART
