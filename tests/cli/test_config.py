"""Where a flag's value may come from besides the command line: the environment and a file, and which of them counts."""

from __future__ import annotations

import os
import pty
import re
import select
import shutil
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from typing import Any

import click
import pytest
from commands import clean_environment

from xdit_compile.cache.folder import VARIABLE as CACHE
from xdit_compile.cli.main import cli, main
from xdit_compile.cli.parsing.choices import Choices
from xdit_compile.cli.parsing.config import PREFIX, in_toml, key_of, variable_of
from xdit_compile.cli.parsing.groups import GENERAL, GROUPS, SEEN_ELSEWHERE, Command, options_of
from xdit_compile.compiler import CHECK
from xdit_compile.plan.log_level import VARIABLE as LOG
from xdit_compile.plan.nearest import nearest
from xdit_compile.reports.dump import VARIABLE as DUMP
from xdit_compile.serving.run import KEY_VARIABLE

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "command-line.md").read_text()
OF_NO_GROUP = {"config", "debug", "force", "no_run", "print_config", "quiet", "timeout", "verbose"}
COMMANDS = [command for command in cli.commands.values() if isinstance(command, Command)]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def effective(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    """What ``--print_config`` prints of a command, read again."""
    assert main([*arguments, "--print_config"]) == 0, capsys.readouterr().err
    return tomllib.loads(capsys.readouterr().out)


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    return captured.err


# ------------------------------------------------------------------------------------------------ precedence


def test_the_command_line_counts_before_the_environment_and_that_before_a_file(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    Path("run.toml").write_text("height = 1\nwidth = 1\nseed = 1\n")
    monkeypatch.setenv("XDIT_COMPILE_HEIGHT", "2")
    monkeypatch.setenv("XDIT_COMPILE_WIDTH", "2")
    assert main("generate --config run.toml --height 3 --print_config".split()) == 0
    printed = capsys.readouterr().out
    assert re.search(r"^height = 3 +# command line$", printed, re.MULTILINE)
    assert re.search(r"^width = 2 +# XDIT_COMPILE_WIDTH$", printed, re.MULTILINE)
    assert re.search(r"^seed = 1 +# run.toml$", printed, re.MULTILINE)
    assert re.search(r"^fps = 8 +# default$", printed, re.MULTILINE)
    assert re.search(r"^# num_frames = +# default: not set$", printed, re.MULTILINE)


@pytest.mark.parametrize("command", [command.name for command in COMMANDS])
def test_what_is_printed_is_read_again(command: str, capsys: pytest.CaptureFixture[str]):
    first = effective(capsys, command)
    Path("again.toml").write_text("\n".join(f"{name} = {in_toml(value)}" for name, value in first.items()))
    assert effective(capsys, command, "--config", "again.toml") == first


def test_every_flag_has_a_variable_of_its_own_and_none_of_the_compilers(capsys: pytest.CaptureFixture[str]):
    seen_elsewhere = {CACHE, CHECK, DUMP, LOG, KEY_VARIABLE}
    assert {PREFIX + name for name in SEEN_ELSEWHERE} == seen_elsewhere
    for command in COMMANDS:
        variables = [variable_of(flag) for flag in options_of(command)]
        assert len(set(variables)) == len(variables)
        assert not set(variables) & seen_elsewhere
        assert all(flag.envvar == variable_of(flag) or flag.name == "print_config" for flag in options_of(command))


def test_values_of_every_kind_come_from_the_environment(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    given = {
        "USE_PARALLEL_VAE": "yes",
        "USE_RESOLUTION_BINNING": "0",
        "PROMPT": "a red circle\na blue star",
        "DTYPE": "FP16",
        "GUIDANCE_SCALE": "2.5",
        "CONFIG": "run.yaml",
    }
    Path("run.yaml").write_text("mesh_order: [cfg, data]\nattn_layer_num_for_pp: [10, 9]\nno_cache: true\n")
    for name, value in given.items():
        monkeypatch.setenv(PREFIX + name, value)
    found = effective(capsys, "generate", "--no-no-cache")
    assert found["use_parallel_vae"] is True and found["use_resolution_binning"] is False
    assert found["prompt"] == ["a red circle", "a blue star"]
    assert (found["dtype"], found["guidance_scale"]) == ("float16", 2.5)
    assert (found["mesh_order"], found["attn_layer_num_for_pp"]) == ("cfg,data", "10,9")
    assert found["no_cache"] is False


def test_what_excludes_another_counts_where_it_is_nearer(capsys: pytest.CaptureFixture[str]):
    Path("run.toml").write_text("cache_dir = 'kept'\n")
    assert "cache_dir" not in effective(capsys, *"generate --config run.toml --no_cache".split())
    assert "exclude each other" in refusal(capsys, *"generate --cache_dir kept --no_cache".split())


def test_a_file_serves_several_commands(capsys: pytest.CaptureFixture[str]):
    Path("run.toml").write_text("ulysses_degree = 2\nseed = 7\n[build]\nsize = ['64x64', '128x64']\n")
    assert effective(capsys, "generate", "--config", "run.toml")["seed"] == 7
    built = effective(capsys, "build", "--config", "run.toml")
    assert (built["ulysses_degree"], built["size"]) == (2, ["64x64", "128x64"])


def test_debug_from_the_environment_shows_where_it_failed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("XDIT_COMPILE_DEBUG", "1")
    assert main("generate --output nowhere/a.png".split()) == 2
    assert "Traceback" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("a.toml", "hieght = 2", "--config a.toml: no flag is called hieght; did you mean height?"),
        ("a.yaml", "ulysses: 2", "no flag is called ulysses; did you mean ulysses_degree?"),
        ("a.toml", "use_teacache = true", "use_teacache is xDiT's: nothing here caches steps"),
        ("a.toml", "[build]\nsizes = '1x1'", "no flag is called sizes; did you mean size?"),
        ("a.toml", "[generate]\nsize = '1x1'", "no flag is called size"),
        ("a.toml", "height = 2.5", "'2.5' is not a valid integer (from a.toml)"),
        ("a.toml", "height = true", "height = True must be a text or a number"),
        ("a.toml", "no_cache = 'maybe'", "no_cache = 'maybe' must be true or false"),
        ("a.toml", "backend = 'tvm'", "--backend tvm is unknown; choose one of auto, inductor"),
        ("a.toml", "height = x", "--config a.toml is broken: Invalid value (at line 1, column 10)"),
        ("a.yaml", "height: [1", "--config a.yaml is broken: while parsing a flow sequence"),
        ("a.yaml", "generate: [1]", "--config a.yaml: generate is a command; give it a table of its flags"),
        ("a.yaml", "- height", "must hold keys and values, such as ulysses_degree: 2"),
        ("a.json", "{}", "--config a.json must end in one of .toml, .yaml, .yml"),
        ("b.toml", None, "--config b.toml does not exist"),
    ],
)
def test_a_wrong_file_is_refused_by_what_is_wrong(
    name: str, text: str | None, expected: str, capsys: pytest.CaptureFixture[str]
):
    if text is not None:
        Path(name).write_text(text)
    assert expected in refusal(capsys, "generate", "--config", name)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("generate --ulyses 2", "No such option '--ulyses'; did you mean --ulysses_degree? (see"),
        ("generate --steps 2", "did you mean --num_inference_steps"),
        ("generate --guidance 2", "did you mean --guidance_scale?"),
        ("evaluate --prompt x", "'--prompt'; it is a flag of generate, explain, build, tune"),
        ("cache list --cach_dir x", "did you mean --cache_dir?"),
        ("--height 2", "it is a flag of generate, serve, evaluate, explain, build, tune: write the command first"),
        ("genrate", "No such command 'genrate'. Did you mean 'generate'?"),
        ("cache unpack a --digest x --device tpu", "'tpu' is unknown; choose one of auto, cpu, cuda"),
        ("completion csh", "'csh' is not one of 'bash', 'zsh', 'fish'"),
    ],
)
def test_what_is_unknown_is_refused_with_what_is_near(
    arguments: str, expected: str, capsys: pytest.CaptureFixture[str]
):
    assert expected in refusal(capsys, *arguments.split())


def test_a_wrong_variable_is_named_and_one_that_nothing_reads_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("XDIT_COMPILE_HEIGHT", "tall")
    assert "'tall' is not a valid integer (from XDIT_COMPILE_HEIGHT)" in refusal(capsys, "generate")
    monkeypatch.setenv("XDIT_COMPILE_ULISES_DEGREE", "2")
    monkeypatch.setenv("XDIT_COMPILE_HEIGHT", "64")
    assert main(["generate", "--print_config"]) == 0
    assert capsys.readouterr().err == (
        "xdit-compile: warning: nothing reads XDIT_COMPILE_ULISES_DEGREE; did you mean XDIT_COMPILE_ULYSSES_DEGREE?\n"
    )
    monkeypatch.setenv(LOG, "error")
    assert main(["generate", "--print_config"]) == 0
    assert capsys.readouterr().err == ""


def test_the_nearest_names_come_first():
    names = ["height", "width", "num_inference_steps", "warmup_steps", "use_parallel_vae"]
    assert nearest("hieght", names) == ["height"]
    assert nearest("steps", names) == ["num_inference_steps", "warmup_steps"]
    assert nearest("vae_parallel", names) == ["use_parallel_vae"]
    assert nearest("colour", names) == []


# ------------------------------------------------------------------------------------------------ help and completion


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_every_flag_stands_in_a_group_with_a_word_of_help(command: click.Command, capsys: pytest.CaptureFixture[str]):
    general = {flag.name for flag in options_of(command) if getattr(flag, "group", GENERAL) == GENERAL}
    assert general <= OF_NO_GROUP
    assert [flag.name for flag in options_of(command) if not flag.help] == []
    assert main([str(command.name), "--help"]) == 0
    headings = re.findall(r"^(\w+):$", capsys.readouterr().out, re.MULTILINE)
    assert headings == [group for group in GROUPS if group in headings] and headings[-1] == GENERAL


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["generate", "--ul"], {"--ulysses_degree"}),
        (["generate", "--backend", "in"], {"inductor"}),
        (["generate", "--dtype", ""], {"auto", "float32", "bfloat16", "float16"}),
        (["evaluate", "--features", "s"], {"scenes"}),
        (["completion", ""], {"bash", "zsh", "fish"}),
        (["comp"], {"completion"}),
    ],
)
def test_the_shell_completes_flags_and_their_values(words: list[str], expected: set[str]):
    code = "from xdit_compile.cli.main import main; main()"
    environment = {
        **clean_environment(),
        "_XDIT_COMPILE_COMPLETE": "bash_complete",
        "COMP_WORDS": " ".join(["xdit-compile", *words]),
        "COMP_CWORD": str(len(words)),
    }
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert {line.partition(",")[2] for line in done.stdout.splitlines()} == expected


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_script_for_each_shell_is_printed(shell: str, capsys: pytest.CaptureFixture[str]):
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert f"_XDIT_COMPILE_COMPLETE={shell}_complete" in script
    if shell == "bash":
        assert subprocess.run(["bash", "-n"], input=script, text=True, timeout=60).returncode == 0


TYPED = {
    "ge": "generate",
    "generate --sch": "--scheduler",
    "generate --ulysses-d": "--ulysses-degree",
    "generate --compile-mode max-autotune-no": "max-autotune-no-cudagraphs",
    "generate --backend=in": "--backend=inductor",
    "generate --without norm_rope,pa": "norm_rope,pack_heads",
    """generate --prompt "it's \\"red" --set a=7 --dtype b""": "bfloat16",
    "generate --config pi": "picture.png",
    "generate --image picture.png ot": "other one.png",
    "generate --image=ot": "--image=other one.png",
}
"""What is typed, and its last word after TAB."""


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_real_shell_completes(folder: Path, shell: str):
    """fish is asked by its own command for what TAB would do; the others are typed at on a terminal."""
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    command = folder / "bin" / "xdit-compile"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -P -m xdit_compile "$@"\n')
    command.chmod(0o755)
    for name in ("picture.png", "other one.png"):
        (folder / name).touch()
    environment = clean_environment() | {"PATH": f"{command.parent}:{os.environ['PATH']}", "HOME": str(folder)}
    lines = [f"xdit-compile {line}" for line in TYPED]
    completed = asked_of_fish(lines, environment) if shell == "fish" else typed_at(shell, lines, environment)
    assert dict(zip(TYPED, completed, strict=True)) == TYPED


def asked_of_fish(lines: list[str], environment: dict[str, str]) -> list[str]:
    """What fish puts into the place of the last word of each line, one completion a line."""
    asks = "xdit-compile completion fish | source; for line in $argv; complete -C $line; echo; end"
    done = subprocess.run(
        ["fish", "--no-config", "-c", asks, *lines], env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.stderr == ""
    return [re.sub(r"\t.*", "", answer) for answer in done.stdout.removesuffix("\n\n").split("\n\n")]


def typed_at(shell: str, lines: list[str], environment: dict[str, str]) -> list[str]:
    """The last word of each line after TAB, on a terminal: ``print_last`` is typed in front of the line for it."""
    quiet = {"bash": ["--norc", "--noprofile"], "zsh": ["-f"]}[shell]
    ready = {"bash": "", "zsh": "autoload -Uz compinit; compinit -u -D; "}[shell]
    ready += f'eval "$(xdit-compile completion {shell})"; '
    ready += """print_last() { for last; do :; done; printf '<<%s>>\\n' "$last"; }; printf '<<%s>>\\n' ready"""
    master, slave = pty.openpty()
    process = subprocess.Popen(
        [shell, *quiet, "-i"],
        stdin=slave, stdout=slave, stderr=slave, start_new_session=True, env=environment | {"TERM": "dumb"},
    )  # fmt: skip
    os.close(slave)
    try:
        assert said(master, f"{ready}\n") == "ready"
        return [said(master, f"{line}\t\x01print_last \n") for line in lines]
    finally:
        process.kill()
        process.wait()
        os.close(master)


def said(terminal: int, keys: str, limit_s: float = 20) -> str:
    """What a shell prints between angles after some keys."""
    os.write(terminal, keys.encode())
    end, shown = time.monotonic() + limit_s, ""
    while (found := re.search(r"<<((?!%s).*)>>\r?\n", shown)) is None:
        assert select.select([terminal], [], [], max(end - time.monotonic(), 0))[0], shown
        shown += os.read(terminal, 65536).decode(errors="replace")
    return found[1]


def test_nothing_is_said_to_a_shell_of_a_line_that_is_wrong():
    environment = clean_environment() | {"_XDIT_COMPILE_COMPLETE": "bash_complete", "COMP_CWORD": "4"}
    environment["COMP_WORDS"] = "xdit-compile generate --no_such_flag 1 --backend in"
    done = subprocess.run(
        [sys.executable, "-m", "xdit_compile"], env=environment, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_choices_are_listed_and_taken_in_any_spelling():
    kind = Choices(("auto", "float16"), {"fp16": "float16"})
    assert [kind.convert(text, None, None) for text in ("Auto", "FP16", "int3")] == ["auto", "float16", "int3"]
    with pytest.raises(click.BadParameter, match="'int3' is unknown; choose one of auto, float16"):
        Choices(("auto", "float16"), strict=True).convert("int3", None, None)


# ------------------------------------------------------------------------------------------------ the page


@pytest.mark.parametrize("language", ["toml", "yaml"])
def test_the_files_of_the_page_are_read(language: str, capsys: pytest.CaptureFixture[str]):
    (text,) = re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    Path(f"run.{language}").write_text(text)
    for command in ("generate", "build", "explain"):
        assert effective(capsys, command, "--config", f"run.{language}")["ulysses_degree"] == 2


def test_the_page_names_every_flag_under_its_group():
    tables = dict(re.findall(r"^### (\w+)\n(.*?)(?=^#|\Z)", PAGE, re.MULTILINE | re.DOTALL))
    for command in COMMANDS:
        for flag in options_of(command):
            assert f"`--{key_of(flag)}`" in tables[getattr(flag, "group", GENERAL)], (command.name, flag.name)
