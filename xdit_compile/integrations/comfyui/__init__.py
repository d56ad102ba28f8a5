"""Nodes for ComfyUI, which loads this folder as it is: link or copy it into ``custom_nodes/``.

Where ComfyUI has ``comfy_api.latest`` it finds ``comfy_entrypoint`` here, else ``NODE_CLASS_MAPPINGS``.
"""

try:
    from .extension import comfy_entrypoint

    __all__ = ["comfy_entrypoint"]
except ImportError:
    from .mappings import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS

    __all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
