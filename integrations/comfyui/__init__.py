"""Nodes for ComfyUI. A file in its `custom_nodes` that imports both names is all that it needs."""

from .nodes import NODE_CLASS_MAPPINGS as NODE_CLASS_MAPPINGS
from .nodes import NODE_DISPLAY_NAME_MAPPINGS as NODE_DISPLAY_NAME_MAPPINGS

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
