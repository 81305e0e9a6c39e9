"""The page at `/live` as one document, of the files in `page/`: nothing is built, and nothing else is fetched."""

from __future__ import annotations

from functools import cache
from importlib.resources import files

SCRIPTS = ("connection.js", "settings.js", "drawing.js", "gallery.js")
"""In their order: each may use what stands before it at once, and what comes after it later."""
BEGINNING = "\n'use strict';\nconst $ = id => document.getElementById(id);\n"


@cache
def live_page() -> str:
    """The page's HTML, with its style and its scripts within."""
    folder = files(__package__).joinpath("page")

    def read(name: str) -> str:
        return folder.joinpath(name).read_text(encoding="utf-8")

    script = BEGINNING + "".join(map(read, SCRIPTS))
    return (
        read("page.html")
        .replace("<style></style>", f"<style>\n{read('page.css')}</style>", 1)
        .replace("<script></script>", f"<script>{script}</script>", 1)
    )
