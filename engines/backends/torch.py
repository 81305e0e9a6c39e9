"""The torch backend: a component's own modules, run as they are, by the room `export`."""

from .registry import register_in_memory

register_in_memory("torch")
