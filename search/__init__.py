"""Finding a schedule for one's own model on its own engine: Align Your Steps as a method, and what came after it."""

from .search import search_schedules
from .settings import METHODS
from .transfer import check_schedules

__all__ = ["METHODS", "check_schedules", "search_schedules"]
