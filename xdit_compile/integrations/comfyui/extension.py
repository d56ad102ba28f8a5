"""The nodes in the form of ``comfy_api.latest``, which ComfyUI has since 0.3.50."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import ComfyExtension, io

from .form import CATEGORY, Input, Node
from .nodes import nodes_of
from .server import Servers

_KINDS = {
    "STRING": io.String, "INT": io.Int, "FLOAT": io.Float, "COMBO": io.Combo, "IMAGE": io.Image, "MASK": io.Mask,
    "LATENT": io.Latent,
}  # fmt: skip


class Extension(ComfyExtension):
    """All nodes of this folder."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """The classes, which share one server."""
        return [as_extended(node) for node in nodes_of(Servers())]


async def comfy_entrypoint() -> Extension:
    """What ComfyUI calls once."""
    return Extension()


def as_extended(node: Node) -> type[io.ComfyNode]:
    """A node as a class for ``ComfyExtension.get_node_list``."""

    def define_schema(_: type) -> io.Schema:
        return io.Schema(
            node_id=node.id, display_name=node.title, category=CATEGORY, description=node.about,
            inputs=[_input(each) for each in node.inputs],
            outputs=[_kind(each.kind).Output(display_name=each.name, tooltip=each.about) for each in node.outputs],
        )  # fmt: skip

    def execute(_: type, **inputs: Any) -> io.NodeOutput:
        return io.NodeOutput(*node.run(**inputs))

    def fingerprint_inputs(_: type, **inputs: Any) -> Any:
        assert node.stamp is not None
        return node.stamp(**inputs)

    members = {
        "define_schema": classmethod(define_schema), "execute": classmethod(execute), "__module__": __name__,
        **({"fingerprint_inputs": classmethod(fingerprint_inputs)} if node.stamp else {}),
    }  # fmt: skip
    return type(node.id, (io.ComfyNode,), members)


def _input(said: Input) -> Any:
    return _kind(said.kind).Input(said.name, optional=said.optional, tooltip=said.about, **said.options)


def _kind(name: str) -> Any:
    return _KINDS.get(name) or io.Custom(name)
