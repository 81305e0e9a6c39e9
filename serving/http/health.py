"""Health, metrics and the list of models."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from .errors import HttpError, json_response
from .metrics import Metrics
from .service import Service
from .settings import Settings


class StatusRoutes:
    def __init__(self, service: Service, settings: Settings, metrics: Metrics, *, created: int) -> None:
        self._service, self._settings, self._metrics, self._created = service, settings, metrics, created

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
        return json_response({"object": "list", "data": [self._model(m) for m in self._settings.models]})

    async def model(self, request: Request) -> Response:
        name = request.path_params["model"]
        if name not in self._settings.models:
            raise HttpError(404, "model_not_found", "there is no model of that name here")
        return json_response(self._model(name))

    def _model(self, name: str) -> dict[str, object]:
        return {"id": name, "object": "model", "created": self._created, "owned_by": "fewstep"}
