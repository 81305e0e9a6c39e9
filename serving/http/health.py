"""Health, metrics and the list of models."""

from __future__ import annotations

import asyncio
import logging
from concurrent.futures import Future

from starlette.requests import Request
from starlette.responses import Response

from ...errors import FewstepError, MissingError, UnavailableError
from ..model_folder import ModelFolder
from ..resident import ServedModel
from .errors import HttpError, json_response, no_model, shown
from .metrics import Metrics
from .service import Service
from .settings import Settings

log = logging.getLogger("fewstep.serving.http")


class StatusRoutes:
    def __init__(self, service: Service, settings: Settings, metrics: Metrics, *, created: int) -> None:
        self._service, self._settings, self._metrics, self._created = service, settings, metrics, created
        self._given = service.residents.names

    async def live(self, request: Request) -> Response:
        """The process answers."""
        return json_response({"status": "live"})

    async def ready(self, request: Request) -> Response:
        """Every size and bucket is warm, and the engine works: 200, else 503 with the state."""
        state = self._service.state
        return json_response({"status": state}, 200 if state == "ready" else 503)

    async def metrics(self, request: Request) -> Response:
        return Response(self._metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def models(self, request: Request) -> Response:
        return json_response({"object": "list", "data": [self._model(m) for m in self._names]})

    async def model(self, request: Request) -> Response:
        return json_response(self._model(self._asked(request)))

    async def load(self, request: Request) -> Response:
        """Load a model, those used least recently making room; answers when it is there."""
        name: str = request.path_params["model"]
        folder = self._service.folder
        if folder is None or name in self._settings.models or name in self._given:
            await self._done(self._service.residents.load(self._own(self._asked(request))))
            return json_response(self._model(name))
        self._service.residents.offer(await asyncio.to_thread(self._opened, folder, name))
        try:
            await self._done(self._service.residents.load(name))
        finally:
            self._service.residents.withdraw(name)  # unless it is there
        return json_response(self._model(name))

    async def unload(self, request: Request) -> Response:
        """Have a model finish what it has accepted and leave; answers when it is gone."""
        name = self._asked(request)
        await self._done(self._service.residents.unload(self._own(name)))
        answer = json_response(self._model(name))
        if self._own(name) not in self._given:
            self._service.residents.withdraw(name)
        return answer

    def _opened(self, folder: ModelFolder, name: str) -> ServedModel:
        """A model of the folder; its errors name no path."""
        try:
            return folder.open(name)
        except MissingError as error:
            raise no_model((*self._names, *folder.names)) from error
        except FewstepError as error:
            log.warning("the bundle %s: %s", name, error)
            message = f"the bundle {shown(name)} cannot be served ({type(error).__name__}); the log says why"
            raise HttpError(422, "invalid_bundle", message, param="model") from error

    async def _done(self, future: Future[None]) -> None:
        try:
            await asyncio.shield(asyncio.wrap_future(future))
        except UnavailableError:
            raise
        except FewstepError as error:
            raise UnavailableError("the model could not be loaded") from error

    @property
    def _names(self) -> tuple[str, ...]:
        return (*self._settings.models, *self._service.others)

    def _asked(self, request: Request) -> str:
        name: str = request.path_params["model"]
        if name not in self._names:
            raise no_model(self._names)
        return name

    def _own(self, name: str) -> str:
        """The service's name of a model that has others too."""
        return self._service.first if name in self._settings.models else name

    def _model(self, name: str) -> dict[str, object]:
        state = self._service.residents.state(self._own(name))
        return {"id": name, "object": "model", "created": self._created, "owned_by": "fewstep", "state": state}
