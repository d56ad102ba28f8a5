"""Prints what a shell needs to complete commands, flags and their values."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from xdit_compile.errors import UsageError

SHELLS = {
    "bash": 'eval "$(xdit-compile completion bash)", in ~/.bashrc',
    "zsh": 'eval "$(xdit-compile completion zsh)", in ~/.zshrc below compinit',
    "fish": "xdit-compile completion fish > ~/.config/fish/completions/xdit-compile.fish",
}
"""How each shell is given its script."""
PROGRAM = "xdit-compile"
VARIABLE = "_XDIT_COMPILE_COMPLETE"
"""What the script sets to ask for completions, by click's rule for the name."""
_HELP = "Print the script with which a shell completes commands, flags and values.\n\n\b\n" + "\n".join(
    f"{shell}: {use}" for shell, use in SHELLS.items()
)


@click.command(help=_HELP)
@click.argument("shell", type=click.Choice(tuple(SHELLS)))
@click.pass_context
def completion(ctx: click.Context, shell: str) -> None:
    """Print the script for one shell."""
    kind = get_completion_class(shell)
    if kind is None:
        raise UsageError(f"nothing is known of how {shell} completes; choose one of {', '.join(SHELLS)}")
    made = kind(ctx.find_root().command, {}, PROGRAM, VARIABLE)
    click.echo(made.source_template % made.source_vars())
