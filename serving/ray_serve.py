"""Beyond one machine: the service as a Ray Serve deployment, with replicas, autoscaling and one bundle for all.

Ray is the cluster: it places replicas, routes, restarts and scales them. A replica is a `Server` and the HTTP
application of `fewstep serve`, in a process of its own.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import errors
from ..bundle import MANIFEST, Bundle, read_bundle
from ..errors import ArgumentError, FewstepError, MismatchError, MissingExtraError, QueueFullError, UnavailableError
from ..runtime.arrays import UInt8
from ..runtime.library import open_bundle
from .server import Server

if TYPE_CHECKING:
    from ray.serve import Application


@dataclass(frozen=True, slots=True, kw_only=True)
class BundleReference:
    """A bundle for all replicas: a folder that every node can read, and its manifest's SHA-256.

    A replica that finds another bundle there does not start.
    """

    folder: str
    manifest_sha256: str

    @classmethod
    def of(cls, folder: str | os.PathLike[str]) -> BundleReference:
        place = open_bundle(folder).folder.resolve()
        return cls(folder=str(place), manifest_sha256=_digest(place))

    def read(self) -> Bundle:
        """The bundle, as it was when the reference was made; `MismatchError` when it is another."""
        bundle = read_bundle(self.folder)
        digest = _digest(bundle.folder)
        if digest != self.manifest_sha256:
            raise MismatchError(
                f"the bundle {bundle.name} has the manifest {digest[:12]}",
                expected=self.manifest_sha256[:12],
                remedy="Deploy again, or give every node the same bundle.",
            )
        return bundle


def _digest(folder: Path) -> str:
    return sha256((folder / MANIFEST).read_bytes()).hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class Replicas:
    """How many replicas there are and what each may take.

    least, most: autoscaling moves between them, so that each has about `target` requests in progress (accepted ones
    that wait for a slot count, so this is scaling on queue depth). ongoing: requests a replica is given at a time;
    queued: requests that wait for a replica, beyond which callers get `QueueFullError`. gpus, cpus: what each is
    given of a node; a replica of a GPU bundle has one GPU to itself.
    """

    least: int = 1
    most: int = 1
    target: float = 16.0
    ongoing: int = 64
    queued: int = 256
    gpus: float = 0.0
    cpus: float = 1.0
    upscale_delay_s: float = 5.0
    downscale_delay_s: float = 120.0

    def __post_init__(self) -> None:
        if not 1 <= self.least <= self.most:
            raise ArgumentError(f"{self.least} to {self.most} replicas", expected="at least 1, and most from least up")
        if not 0 < self.target <= self.ongoing:
            raise ArgumentError(f"a target of {self.target:g}", expected=f"above 0 and at most ongoing={self.ongoing}")

    def options(self) -> dict[str, Any]:
        """As Ray Serve's deployments take them."""
        scaling = {
            "min_replicas": self.least,
            "initial_replicas": self.least,
            "max_replicas": self.most,
            "target_ongoing_requests": self.target,
            "metrics_interval_s": min(10.0, self.upscale_delay_s / 2),
            "look_back_period_s": max(1.0, self.upscale_delay_s),
            "upscale_delay_s": self.upscale_delay_s,
            "downscale_delay_s": self.downscale_delay_s,
        }
        number: dict[str, Any] = (
            {"num_replicas": self.least} if self.least == self.most else {"autoscaling_config": scaling}
        )
        return {
            **number,
            "max_ongoing_requests": self.ongoing,
            "max_queued_requests": self.queued,
            "ray_actor_options": {"num_cpus": self.cpus, "num_gpus": self.gpus},
            "health_check_period_s": 2.0,
            "health_check_timeout_s": 30.0,
        }


@dataclass(slots=True)
class Answer:
    """What a replica says to a call, as data: images uint8 [B, H, W, 3] and seeds, or an error by its type's name."""

    images: UInt8 | None = None
    seeds: tuple[int, ...] = ()
    timings: dict[str, Any] = field(default_factory=dict)
    error: str | None = None
    words: tuple[str, str, str] = ("", "", "")

    def check(self) -> Answer:
        """Itself, or the error that it tells of."""
        if self.error is None:
            return self
        message, expected, remedy = self.words
        kind = getattr(errors, self.error, FewstepError)
        if kind is QueueFullError:
            raise QueueFullError(message, retry_after_s=1.0, remedy=remedy)
        try:
            raise kind(message, expected=expected, remedy=remedy)
        except TypeError:  # an error with more to it than words
            raise FewstepError(message, expected=expected, remedy=remedy) from None


class Replica:
    """One process of the deployment: a server on a bundle. Methods are called through Ray's handles."""

    def __init__(self, reference: BundleReference, server: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
        from .http import Metrics, Service

        self._bundle = reference.read()
        self._settings = dict(settings)
        self._metrics = Metrics()
        instance = Server(self._bundle, observer=self._metrics, **server)
        self._service = Service(lambda: instance)
        self._service.start()
        self._service.wait(60)

    def __serve_build_asgi_app__(self) -> Any:
        """The application of `fewstep serve`, live sessions included, on this replica's server."""
        from .http import Settings, make_app
        from .live.socket import add_live

        settings = Settings(**{"model": self._bundle.name, **self._settings})
        routes = add_live(self._service, settings, self._metrics)
        return make_app(self._service, settings, metrics=self._metrics, routes=routes)

    async def generate(self, prompt: str, options: Mapping[str, Any]) -> Answer:
        """Images of one request; options as `Server.submit`'s."""
        try:
            result = await self._service.server.submit(prompt, **options)
        except FewstepError as error:
            return Answer(error=type(error).__name__, words=(error.found, error.expected, error.remedy))
        return Answer(images=result.images, seeds=result.seeds, timings=dict(result.timings))

    async def figures(self) -> dict[str, Any]:
        """The server's figures, and which process this is."""
        return {"pid": os.getpid(), **dataclasses.asdict(self._service.server.stats())}

    def check_health(self) -> None:
        """Called by Ray: a replica whose engine has failed is replaced."""
        if not self._service.server.ready:
            raise UnavailableError(f"the server is {self._service.server.state}")


def make_deployment(
    bundle: str | os.PathLike[str] | BundleReference,
    *,
    replicas: Replicas | None = None,
    server: Mapping[str, Any] | None = None,
    settings: Mapping[str, Any] | None = None,
    name: str = "fewstep",
) -> Application:
    """A Ray Serve application for `ray.serve.run`, or, in a module of its own, for `serve run module:app`.

    server: keyword arguments of `Server` (sizes, most_slots, backend, ...); settings: of the HTTP application's
    `Settings` (token, hosts, limits). Beyond loopback give a token: Ray's proxies do not ask for one.
    """
    try:
        from ray import serve
    except ModuleNotFoundError as error:
        raise MissingExtraError("ray", "ray", purpose="a deployment on Ray Serve") from error
    reference = bundle if isinstance(bundle, BundleReference) else BundleReference.of(bundle)
    options = (replicas or Replicas()).options()
    deployed = serve.deployment(name=name, **options)(serve.ingress()(Replica))
    application: Application = deployed.bind(reference, dict(server or {}), dict(settings or {}))
    return application


class Deployed:
    """A deployment as Python callers see it. `handle`: what `ray.serve.run` returned."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle

    def submit(self, prompt: str, **options: Any) -> Pending:
        """Ask for images; options as `Server.submit`'s, pictures as uint8 arrays."""
        for key, value in options.items():
            if key == "image" and value is not None and not isinstance(value, np.ndarray):
                raise ArgumentError(f"the image is {type(value).__name__}", expected="uint8 [H, W, 3]")
        return Pending(self._handle.generate.remote(prompt, options))

    def generate(self, prompt: str, *, timeout_s: float | None = None, **options: Any) -> Answer:
        """Ask and wait."""
        return self.submit(prompt, **options).result(timeout_s)

    def figures(self) -> dict[str, Any]:
        """Those of one replica, whichever answers."""
        return dict(self._handle.figures.remote().result(timeout_s=30))


class Pending:
    """An answer that is on its way."""

    def __init__(self, response: Any) -> None:
        self._response = response

    @property
    def done(self) -> bool:
        """Whether `result` will not wait."""
        try:
            self._response.result(timeout_s=0)
        except TimeoutError:
            return False
        except Exception:  # how it ended is for `result` to say
            return True
        return True

    def result(self, timeout_s: float | None = None) -> Answer:
        """The answer. Raises what went wrong with the request, `UnavailableError` when its replica died, and
        `QueueFullError` when too many requests wait for replicas."""
        from ray.exceptions import RayActorError
        from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, ReplicaUnavailableError

        try:
            answer: Answer = self._response.result(timeout_s=timeout_s)
        except BackPressureError as error:
            raise QueueFullError(
                "too many requests wait for a replica", retry_after_s=1.0, remedy="Try again later."
            ) from error
        except (RayActorError, ReplicaUnavailableError, DeploymentUnavailableError) as error:
            raise UnavailableError("the replica died before it answered", remedy="Ask again.") from error
        return answer.check()
