"""Real time: sessions that turn a stream of inputs into a stream of frames, and the page and socket they serve."""

from .frames import Frame, LiveStats
from .session import LiveSession
from .settings import LiveSettings
from .unchanged import UnchangedFilter

__all__ = ["Frame", "LiveSession", "LiveSettings", "LiveStats", "UnchangedFilter"]
