"""Prints what a shell needs to complete commands, flags and their values."""

from __future__ import annotations

import click

from ..parsing.completing import completed

SHELLS = {
    "bash": 'eval "$(xdit-compile completion bash)", in ~/.bashrc',
    "zsh": 'eval "$(xdit-compile completion zsh)", in ~/.zshrc below compinit',
    "fish": "xdit-compile completion fish > ~/.config/fish/completions/xdit-compile.fish",
}
"""How each shell is given its script."""
_HELP = "Print the script with which a shell completes commands, flags and values.\n\n\b\n" + "\n".join(
    f"{shell}: {use}" for shell, use in SHELLS.items()
)


@click.command(help=_HELP)
@click.argument("shell", type=click.Choice(tuple(SHELLS)))
@click.pass_context
def completion(ctx: click.Context, shell: str) -> None:
    """Print the script for one shell."""
    click.echo(completed(ctx.find_root().command, f"{shell}_source"))
