"""fewstep: Stable Diffusion checkpoints as engines for one machine, run in few steps with little latency."""

from typing import TYPE_CHECKING

from .errors import FewstepError
from .version import __version__

if TYPE_CHECKING:
    from .runtime import Cascade, Pipeline, Result, load
    from .schedules import load_schedules
    from .serving import Server

__all__ = ["Cascade", "FewstepError", "Pipeline", "Result", "Server", "__version__", "load", "load_schedules"]


def __getattr__(name: str) -> object:
    """Load the runtime when it is first asked for, so that `import fewstep` costs next to nothing."""
    if name in {"Cascade", "Pipeline", "Result", "load"}:
        from . import runtime

        return getattr(runtime, name)
    if name == "load_schedules":
        from .schedules import load_schedules

        return load_schedules
    if name == "Server":
        from .serving import Server

        return Server
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """What can be asked for, loaded or not, so that a shell completes it."""
    return sorted({*__all__, *globals()} - {"TYPE_CHECKING"})
