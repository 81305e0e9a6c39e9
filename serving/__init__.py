"""Serving a pipeline to many callers: slots under load, in a process (`Server`) and over HTTP (`serving.http`)."""

from .observe import Observer, ServerStats
from .resident import Residents, ServedModel
from .server import Server
from .ticket import Ticket

__all__ = ["Observer", "Residents", "ServedModel", "Server", "ServerStats", "Ticket"]
