"""fewstep: Stable Diffusion checkpoints as engines for one machine, run in few steps with little latency."""

from typing import TYPE_CHECKING

from .errors import FewstepError
from .version import __version__

if TYPE_CHECKING:
    from .runtime import Pipeline, Result, load
    from .serving import Server

__all__ = ["FewstepError", "Pipeline", "Result", "Server", "__version__", "load"]


def __getattr__(name: str) -> object:
    """Load the runtime when it is first asked for, so that `import fewstep` costs next to nothing."""
    if name in {"Pipeline", "Result", "load"}:
        from . import runtime

        return getattr(runtime, name)
    if name == "Server":
        from .serving import Server

        return Server
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
