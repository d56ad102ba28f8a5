"""What a shell asks for when TAB is pressed, and the script with which it asks.

click's own completion, and what it leaves out: flags written with ``-``, values behind ``=``, further values of one
flag, and lines that are wrong so far, of which nothing may be said.
"""

from __future__ import annotations

import click
from click.shell_completion import BashComplete, CompletionItem, FishComplete, ShellComplete, ZshComplete

from xdit_compile.errors import UsageError, XditCompileError
from xdit_compile.plan.nearest import did_you_mean

PROGRAM = "xdit-compile"
VARIABLE = "_XDIT_COMPILE_COMPLETE"
"""What the script sets to ask for completions, by click's rule for the name."""


class _Completing(ShellComplete):
    takes_apart = False
    """Whether the shell takes what stands behind ``=`` for a word."""

    def get_completions(self, args: list[str], incomplete: str) -> list[CompletionItem[str]]:
        args, sought = [_known(word) for word in args], _known(incomplete)
        try:
            items = super().get_completions(args.copy(), sought)
            if not items and not sought.startswith("-") and (flag := self._of_several(args)) is not None:
                items = super().get_completions([*args, flag], sought)
        except (click.ClickException, XditCompileError):
            return []
        flag, equals, _ = incomplete.partition("=")
        if not flag.startswith("--"):
            return items
        if equals:
            before = "" if self.takes_apart else flag + equals
            return [_renamed(item, before + item.value) if item.type == "plain" else item for item in items]
        return [_renamed(item, "--" + item.value[2:].replace("_", "-")) if "-" in flag[2:] else item for item in items]

    def _of_several(self, args: list[str]) -> str | None:
        """The flag that the next word is a further value of."""
        command, names = self.cli, [word for word in args if word.startswith("-")]
        for word in args:
            if isinstance(command, click.Group):
                command = command.commands.get(word, command)
        several = {name for param in command.params if param.multiple for name in param.opts}
        return names[-1] if names and names[-1] in several else None


class _Bash(_Completing, BashComplete):
    takes_apart = True

    def get_completion_args(self) -> tuple[list[str], str]:
        """What bash takes apart at ``=`` is one word."""
        args, incomplete = super().get_completion_args()
        words: list[str] = []
        for word in [*args, incomplete]:
            if words and (word == "=" or words[-1].endswith("=")):
                words[-1] += word
            else:
                words.append(word)
        return words[:-1], words[-1]


class _Zsh(_Completing, ZshComplete):
    source_template = ZshComplete.source_template.replace("_path_files", "compset -P '--*='; _path_files")


class _Fish(_Completing, FishComplete):
    source_template = FishComplete.source_template.replace('string split ","', 'string split --max 1 ","').replace(
        "__fish_complete_path $metadata[2]",
        "__fish_complete_path $metadata[2] | string replace --regex -- '^' "
        "(string match --regex -- '^--[^=]+=' (commandline -t); or echo '')",
    )


SHELLS: dict[str, type[ShellComplete]] = {"bash": _Bash, "zsh": _Zsh, "fish": _Fish}


def completed(cli: click.Command, asked: str) -> str:
    """The answer to a shell: what may stand where the cursor is, or the script that asks.

    Args:
        cli: the program.
        asked: such as ``bash_complete`` or ``bash_source``.

    Raises:
        UsageError: nothing is known of the shell.
    """
    shell, _, what = asked.partition("_")
    if shell not in SHELLS or what not in ("complete", "source"):
        near = did_you_mean(shell, SHELLS) or f"; choose one of {', '.join(SHELLS)}"
        raise UsageError(f"nothing is known of how {shell} completes{near}")
    made = SHELLS[shell](cli, {}, PROGRAM, VARIABLE)
    return made.source() if what == "source" else made.complete()


def _known(word: str) -> str:
    """A flag as it is known, and what is no flag as it is."""
    flag, equals, value = word.partition("=")
    return f"--{flag[2:].replace('-', '_')}{equals}{value}" if word.startswith("--") else word


def _renamed(item: CompletionItem[str], value: str) -> CompletionItem[str]:
    return CompletionItem(value, item.type, item.help)
