"""The nodes in the form that every ComfyUI knows."""

from .form import as_mapped
from .nodes import nodes_of
from .server import Servers

_NODES = nodes_of(Servers())
NODE_CLASS_MAPPINGS = {node.id: as_mapped(node) for node in _NODES}
NODE_DISPLAY_NAME_MAPPINGS = {node.id: node.title for node in _NODES}
