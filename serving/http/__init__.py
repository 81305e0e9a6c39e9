"""The HTTP face of a server. Only here are starlette, uvicorn, msgspec and prometheus-client imported."""

from .app import make_app
from .metrics import Metrics
from .service import Service
from .settings import Settings

__all__ = ["Metrics", "Service", "Settings", "make_app"]
