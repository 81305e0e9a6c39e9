"""What a person sees at the service's address: `/`, where to go and how to ask; `/docs`, what a request may hold.

Both are plain HTML without scripts, made from the settings and from the OpenAPI document.
"""

from __future__ import annotations

import hashlib
import json
from base64 import b64encode
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

POLICY = (
    "default-src 'none'; script-src {script}; style-src {style}; img-src blob:; media-src blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
STYLE = """
:root { color-scheme: light dark; }
* { box-sizing: border-box; }
body { margin: 0; padding: 1.6em; font: 16px/1.5 system-ui, sans-serif;
  color: light-dark(#1b1f24, #e9ebee); background: light-dark(#ffffff, #15181c); }
main { max-width: 62em; margin: 0 auto; }
h1 { font-size: 1.4em; margin: 0 0 .2em; } h2 { font-size: 1.1em; margin: 2em 0 .4em; } p { margin: .4em 0; }
a { color: light-dark(#1d56c9, #8ab4ff); } code, pre { font: .92em/1.5 ui-monospace, monospace; }
pre { padding: .8em 1em; border: 1px solid #8885; border-radius: .5em;
  background: light-dark(#f5f6f8, #1e2227); overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .92em; } caption { text-align: left; padding: .4em 0; }
th, td { text-align: left; vertical-align: top; padding: .3em .8em .3em 0; border-bottom: 1px solid #8885; }
.wide { overflow-x: auto; } ul { padding-left: 1.2em; }
"""
ASKED = {"prompt": "a red circle on a blue background", "seed": 7}


def page_headers(html: str) -> dict[str, str]:
    """Headers of a page that loads nothing: its own script and style run by their hashes, and nothing else does."""
    return {
        "Content-Security-Policy": POLICY.format(script=_hash(html, "script"), style=_hash(html, "style")),
        "Cache-Control": "no-cache",
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Permissions-Policy": "camera=(self), clipboard-write=(self), fullscreen=(self), microphone=(), geolocation=()",
        "Cross-Origin-Opener-Policy": "same-origin",
    }


def _hash(html: str, element: str) -> str:
    """What a content security policy calls the page's one inline element of this kind; `'none'` where there is none."""
    inner = html.partition(f"<{element}>")[2].partition(f"</{element}>")[0]
    return f"'sha256-{b64encode(hashlib.sha256(inner.encode()).digest()).decode()}'" if inner else "'none'"


def index_page(*, address: str, state: str, models: Sequence[str], guarded: bool, live: bool) -> str:
    """`/`: whether the service is ready, and how it is used. models: names, where everybody may know them."""
    key = "$FEWSTEP_TOKEN" if guarded else "unused"
    header = f" \\\n    -H 'authorization: Bearer '\"{key}\"" if guarded else ""
    curl = (
        f"curl -s {address}/v1/images/generations -H 'content-type: application/json'{header} \\\n"
        f"    -d '{json.dumps(ASKED)}' \\\n    | python3 -c 'import sys, json, base64\n"
        'sys.stdout.buffer.write(base64.b64decode(json.load(sys.stdin)["data"][0]["b64_json"]))\' > picture.png'
    )
    client = (
        "import base64, openai\n\n"
        f'client = openai.OpenAI(base_url="{address}/v1", api_key="{"..." if guarded else key}")\n'
        f'made = client.images.generate(model="{models[0] if models else "..."}", prompt="{ASKED["prompt"]}")\n'
        'open("picture.png", "wb").write(base64.b64decode(made.data[0].b64_json))'
    )
    page = '<li><a href="/live">/live</a>: draw, type and see pictures as you do</li>\n' if live else ""
    named = f"<p>Models: {', '.join(f'<code>{escape(m)}</code>' for m in models)}</p>\n" if models else ""
    return _page(
        "fewstep",
        f"""<h1>fewstep</h1>
<p>Pictures from few-step diffusion. The service is <b>{escape(state)}</b>.</p>
{named}<ul>
{page}<li><a href="/docs">/docs</a>: what a request may hold; <a href="/openapi.json">for programs</a></li>
<li><a href="/v1/models">/v1/models</a>, <a href="/health/ready">/health/ready</a>, <a href="/metrics">/metrics</a>\
{": with the token" if guarded else ""}</li>
</ul>
<h2>From a shell</h2>
<pre tabindex="0">{escape(curl)}</pre>
<h2>From Python, with OpenAI's client</h2>
<pre tabindex="0">{escape(client)}</pre>""",
    )


def docs_page(document: Mapping[str, Any]) -> str:
    """`/docs`: the OpenAPI document, for people."""
    schemas = document["components"]["schemas"]
    parts = [
        "<h1>fewstep: requests and answers</h1>",
        '<p>For programs: <a href="/openapi.json">/openapi.json</a>. An error is JSON like <code>{"error": {"message", '
        '"type", "param", "code"}}</code>, where <code>param</code> is the field that is wrong.</p>',
    ]
    for path, methods in document["paths"].items():
        for method, call in methods.items():
            parts.append(f"<h2><code>{method.upper()} {escape(path)}</code></h2>\n<p>{escape(call['summary'])}</p>")
            for media, content in call.get("requestBody", {}).get("content", {}).items():
                name = content["schema"]["$ref"].rpartition("/")[2]
                parts.append(_fields_table(schemas[name], f"{escape(media)}: fields", schemas))
            parts.append(_answers_table(call["responses"]))
    return _page("fewstep: requests and answers", "\n".join(parts))


def _fields_table(schema: Mapping[str, Any], caption: str, schemas: Mapping[str, Any]) -> str:
    required = schema.get("required", ())
    rows = [
        (f"<code>{escape(name)}</code>{' (needed)' if name in required else ''}", _kind(field, schemas), _words(field))
        for name, field in schema["properties"].items()
    ]
    return _table(caption, ("field", "what it is", ""), rows)


def _answers_table(responses: Mapping[str, Any]) -> str:
    rows = [(f"<code>{escape(status)}</code>", escape(answer["description"])) for status, answer in responses.items()]
    return _table("answers", ("status", "when"), rows)


def _kind(schema: Mapping[str, Any], schemas: Mapping[str, Any]) -> str:
    """A schema in a few words."""
    options = [s for s in schema.get("anyOf", ()) if s.get("type") != "null"]
    if options:
        return " or ".join(dict.fromkeys(_kind(s, schemas) for s in options))
    if "$ref" in schema:
        inner = schemas[schema["$ref"].rpartition("/")[2]]["properties"]
        return "object of " + ", ".join(f"<code>{escape(n)}</code>" for n in inner)
    if "enum" in schema:
        return ", ".join(f"<code>{escape(str(v))}</code>" for v in schema["enum"] if v is not None)
    if schema.get("format") == "binary":
        return "file"
    kind = escape(str(schema.get("type", "any")))
    low, high = schema.get("minimum", schema.get("exclusiveMinimum")), schema.get("maximum")
    if low is not None and high is not None:
        return f"{kind}, {low:g} to {high:g}" if abs(high) < 1e15 else f"{kind}, {low:g} and above"
    if "maxLength" in schema:
        return f"{kind}, at most {schema['maxLength']} characters"
    return kind


def _words(schema: Mapping[str, Any]) -> str:
    own = schema.get("description")
    return escape(own or next((s["description"] for s in schema.get("anyOf", ()) if "description" in s), ""))


def _table(caption: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f'<th scope="col">{h}</th>' if h else "<td></td>" for h in heads)
    body = "\n".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    table = f"<table><caption>{caption}</caption><tr>{head}</tr>\n{body}</table>"
    return f'<div class="wide" tabindex="0" role="group" aria-label="{caption}">{table}</div>'


def _page(title: str, body: str) -> str:
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""
