"""`create_app`: the HTTP application over an engine client and a tokenizer."""

import time

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

from ..core.request import SeedSource
from ..scheduler.client import EngineClient
from . import openai_routes, ops_routes
from .errors import install_handlers
from .metrics import Metrics
from .middleware import Gate
from .settings import ServerSettings, Service
from .text import Tokenizer
from .traffic_log import TrafficLog


def create_app(client: EngineClient, tokenizer: Tokenizer, settings: ServerSettings) -> FastAPI:
    """The application; `app.state.service` is the `Service` that its routes work with."""
    metrics = Metrics(client, settings.served_model_names[0], settings.metrics_prefix)
    seeds = SeedSource(settings.seed)
    service = Service(client, tokenizer, settings, metrics, created=int(time.time()), seeds=seeds)
    if settings.distill_log is not None:
        service.traffic_log = TrafficLog(settings.distill_log, settings.distill_log_share)
    metrics.open_requests.set_function(lambda: float(service.open_requests))
    app = FastAPI(title="Quire", description="OpenAI-style LLM inference", redirect_slashes=False)
    app.state.service = service
    install_handlers(app, metrics.failed)
    app.include_router(openai_routes.router)
    app.include_router(ops_routes.router)
    app.add_middleware(Gate, service=service)
    if settings.cors_origins:  # outside the gate: a browser asks for leave without a key, and must see refusals
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["Retry-After"],
        )
    return app
