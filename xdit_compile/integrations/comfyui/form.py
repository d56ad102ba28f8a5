"""What a node is, said once: ComfyUI's classes of both forms are made of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

CATEGORY = "xdit_compile"
"""Where the nodes are in ComfyUI's menu."""
_NAMES = {"dynamic_prompts": "dynamicPrompts"}
"""Options that the older form calls by another name."""


@dataclasses.dataclass(frozen=True)
class Input:
    """What a node takes.

    Args:
        name: of the argument.
        kind: ComfyUI's type, such as ``INT`` or ``IMAGE``.
        about: shown when the mouse is over it.
        options: as ``io.Int.Input`` and its like take them: ``default``, ``min``, ``max``, ``options`` of a ``COMBO``.
        optional: whether it may be left unconnected.
    """

    name: str
    kind: str
    about: str
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    optional: bool = False


@dataclasses.dataclass(frozen=True)
class Output:
    """What a node gives.

    Args:
        kind: ComfyUI's type.
        name: shown at its socket.
        about: shown when the mouse is over it.
    """

    kind: str
    name: str
    about: str


@dataclasses.dataclass(frozen=True)
class Node:
    """A node.

    Args:
        id: under which workflows keep it.
        title: what users read.
        about: a sentence or two.
        run: takes the inputs by name, and gives a tuple of the outputs.
        stamp: takes the inputs by name too; the node runs again when it gives another value. None where inputs say all.
    """

    id: str
    title: str
    about: str
    inputs: Sequence[Input]
    outputs: Sequence[Output]
    run: Callable[..., tuple[Any, ...]]
    stamp: Callable[..., Any] | None = None


def as_mapped(node: Node) -> type:
    """A node as a class for ``NODE_CLASS_MAPPINGS``."""

    def input_types(_: type) -> dict[str, dict[str, tuple[Any, ...]]]:
        said: dict[str, dict[str, tuple[Any, ...]]] = {"required": {}, "optional": {}}
        for each in node.inputs:
            options = {_NAMES.get(name, name): value for name, value in each.options.items() if name != "options"}
            kind = each.options["options"] if each.kind == "COMBO" else each.kind
            said["optional" if each.optional else "required"][each.name] = (kind, {**options, "tooltip": each.about})
        return said

    def run(_: object, **inputs: Any) -> tuple[Any, ...]:
        return node.run(**inputs)

    def is_changed(_: type, **inputs: Any) -> Any:
        assert node.stamp is not None
        return node.stamp(**inputs)

    members = {
        "INPUT_TYPES": classmethod(input_types), "RETURN_TYPES": tuple(each.kind for each in node.outputs),
        "RETURN_NAMES": tuple(each.name for each in node.outputs), "FUNCTION": "run", "CATEGORY": CATEGORY,
        "OUTPUT_TOOLTIPS": tuple(each.about for each in node.outputs), "DESCRIPTION": node.about, "run": run,
        **({"IS_CHANGED": classmethod(is_changed)} if node.stamp else {}),
    }  # fmt: skip
    return type(node.id, (), members)
