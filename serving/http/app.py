"""The application: routes on a service, with their limits."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import BaseRoute, Route

from ...errors import FewstepError
from .errors import HttpError, json_response, respond
from .guard import Guard
from .health import StatusRoutes
from .images import ImageRoutes
from .metrics import Metrics
from .openapi import openapi_document
from .pages import docs_page, index_page, page_headers
from .service import Service
from .settings import Settings


def make_app(
    service: Service, settings: Settings, *, metrics: Metrics | None = None, routes: Sequence[BaseRoute] = ()
) -> Starlette:
    """The ASGI application. `service` is started and closed with it; `routes` come before its own.

    `metrics` should be the observer of the service's server.
    """
    metrics = metrics or Metrics()
    metrics.watch(service)
    images = ImageRoutes(service, settings)
    status = StatusRoutes(service, settings, metrics, created=int(time.time()))

    def document() -> dict[str, Any]:
        sizes = dict.fromkeys(s for n in (service.first, *service.others) for s in service.sizes(n))
        return openapi_document(settings, list(sizes))

    async def described(request: Request) -> Response:
        return json_response(document())

    async def docs(request: Request) -> Response:
        return _html(docs_page(document()))

    async def index(request: Request) -> Response:
        guarded = not settings.callers.everybody
        address = f"{request.url.scheme}://{request.headers.get('host', 'localhost')}"
        live = any(getattr(r, "path", None) == "/live" for r in routes)
        models = () if guarded else (*settings.models, *service.others)
        return _html(index_page(address=address, state=service.state, models=models, guarded=guarded, live=live))

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        service.start()
        try:
            yield
        finally:
            service.close()

    return Starlette(
        routes=[
            *routes,
            Route("/v1/images/generations", images.generate, methods=["POST"]),
            Route("/v1/images/edits", images.edit, methods=["POST"]),
            Route("/v1/models", status.models, methods=["GET"]),
            Route("/v1/models/{model}", status.model, methods=["GET"]),
            Route("/v1/models/{model}/load", status.load, methods=["POST"]),
            Route("/v1/models/{model}/unload", status.unload, methods=["POST"]),
            Route("/health/live", status.live, methods=["GET"]),
            Route("/health/ready", status.ready, methods=["GET"]),
            Route("/metrics", status.metrics, methods=["GET"]),
            Route("/openapi.json", described, methods=["GET"]),
            Route("/docs", docs, methods=["GET"]),
            Route("/", index, methods=["GET"]),
        ],
        middleware=[Middleware(Guard, settings=settings, metrics=metrics)],
        exception_handlers={FewstepError: _refuse, HttpError: _refuse, HTTPException: _refuse_plain},  # type: ignore[dict-item]
        lifespan=lifespan,
    )


def _html(html: str) -> HTMLResponse:
    return HTMLResponse(html, headers=page_headers(html))


# Starlette runs handlers that are not coroutines in a thread each, forty at most: a cost just when there is no time.
async def _refuse(request: Request, error: Exception) -> Response:
    return respond(error)


async def _refuse_plain(request: Request, error: HTTPException) -> Response:
    """404 and 405, in the same words as everything else."""
    code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "refused")
    headers = {k.lower(): v for k, v in (error.headers or {}).items()}
    return respond(HttpError(error.status_code, code, error.detail, headers=headers))
