"""Every flag of xDiT 0.7.0 is taken, or refused by its name with what does the same here."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from xdit_compile.cli.main import cli, main
from xdit_compile.cli.options.request import plan_from_flags
from xdit_compile.cli.parsing.groups import options_of
from xdit_compile.cli.parsing.xdit_flags import REFUSED, SAME, XDIT_ATTENTIONS, in_our_words
from xdit_compile.plan.plan import ATTENTIONS

ROOT = Path(__file__).parents[2]
XDIT = [line.lstrip("-").replace("-", "_") for line in (ROOT / "tests/data/xdit_flags.txt").read_text().split()]
PREFIX = "no_"
"""Listed among the flags: what ``--no-`` in front of one does."""
GENERATE = cli.commands["generate"]
OURS = {name.lstrip("-"): flag for flag in options_of(GENERATE) for name in (*flag.opts, *flag.secondary_opts)}


def test_there_are_106_and_each_is_taken_or_refused():
    assert len(XDIT) == 106
    assert set(XDIT) - {PREFIX} <= {*OURS, *REFUSED}
    assert not {*OURS} & {*REFUSED}
    assert {*REFUSED, *SAME} <= {*XDIT}


@pytest.mark.parametrize("name", [name for name in XDIT if name in OURS])
def test_what_is_taken_is_parsed(name: str, capsys: pytest.CaptureFixture[str]):
    kind = OURS[name].type.name
    values = [] if OURS[name].is_flag else [{"integer": "2", "float": "2.5"}.get(kind, "x")]
    assert main(["generate", f"--{name}", *values, "--print_config"]) == 0
    shown = next(line for line in capsys.readouterr().out.splitlines() if line.endswith("# command line"))
    assert shown.startswith(OURS[name].opts[0].lstrip("-"))


@pytest.mark.parametrize("name", [name for name in XDIT if name in REFUSED])
def test_what_is_refused_is_refused_by_its_name(name: str, capsys: pytest.CaptureFixture[str]):
    assert main(["generate", f"--{name.replace('_', '-')}", "1"]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"xdit-compile: error: --{name} is xDiT's: ") and said.count("\n") == 1
    assert len(REFUSED[name].split()) > 6


@pytest.mark.parametrize("why", sorted(set(REFUSED.values())))
def test_what_a_refusal_advises_is_there(why: str):
    flags = {name for command in cli.commands.values() for flag in options_of(command) for name in flag.opts}
    advised = {word.strip(",;:.()") for word in why.split() if word.startswith("--")}
    assert advised <= flags
    assert advised or "nothing here" in why or "folder" in why


def test_no_in_front_of_a_flag_turns_it_off(capsys: pytest.CaptureFixture[str]):
    assert main("generate --enable_tiling --no-enable_tiling --print_config".split()) == 0
    assert "enable_tiling = false" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("--attention_backend FLASH_3", 'attention = "flash_attn_3"'),
        ("--attention_backend SDPA", 'attention = "sdpa"'),
        ("--split_scheme row", 'split_scheme = "all"'),
        ("--vae_parallel_size 2", "vae_parallel_degree = 2"),
        ("--img_file_path a.png", 'image = ["a.png"]'),
        ("--prompt 'a cat' b --attn_layer_num_for_pp 10 9 --seed 3", 'attn_layer_num_for_pp = "10,9"'),
        ("--prompt 'a cat' b --attn_layer_num_for_pp 10 9 --seed 3", 'prompt = ["a cat", "b"]'),
        ("--prompt='a cat' b --seed 3", 'prompt = ["a cat", "b"]'),
    ],
)
def test_xdit_s_words_become_ours(arguments: str, expected: str, capsys: pytest.CaptureFixture[str]):
    assert main(["generate", *shlex.split(arguments), "--print_config"]) == 0
    assert expected in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "field", "value"),
    [
        ("--use_torch_compile", "backend", "inductor"),
        ("--use_torch_compile --backend inductor", "backend", "inductor"),
        ("--use_onediff", "backend", "nexfort"),
        ("--use_cuda_graph", "compile_mode", "reduce-overhead"),
        ("--vae_parallel_size 0", "vae_degree", None),
        ("--dit_parallel_size 2 --ulysses_degree 2", "ulysses", 2),
    ],
)
def test_xdit_s_switches_stand_for_values(arguments: str, field: str, value: object):
    group = cli.make_context("xdit-compile", ["generate"])
    flags = GENERATE.make_context("generate", arguments.split(), parent=group).params
    assert getattr(plan_from_flags(**in_our_words(flags)), field) == value


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            "--use_torch_compile --backend eager",
            "--use_torch_compile is --backend inductor, and --backend eager is asked for",
        ),
        (
            "--use_torch_compile --use_onediff",
            "--use_onediff is --backend nexfort, and --backend inductor is asked for",
        ),
        ("--dit_parallel_size 3 --ulysses_degree 2", "--dit_parallel_size 3: the degrees make 2 ranks"),
    ],
)
def test_words_that_contradict_are_refused(arguments: str, expected: str, capsys: pytest.CaptureFixture[str]):
    assert main(["generate", *arguments.split()]) == 2
    assert expected in capsys.readouterr().err


def test_attention_providers_have_xdit_s_names_too():
    assert set(XDIT_ATTENTIONS.values()) <= {*ATTENTIONS}
