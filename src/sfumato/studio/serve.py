"""The studio's server: this machine only, nothing fetched, nothing told to anybody."""

from __future__ import annotations

import os
import socket
import threading
import webbrowser
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sfumato.errors import BadInput
from sfumato.files import held

from .jobs import Jobs
from .room import Studio

if TYPE_CHECKING:
    import uvicorn

HOST = "127.0.0.1"
NAMES = (HOST, "localhost")
"""What this machine calls itself."""
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self'; worker-src 'self' blob:; frame-src 'self'; "
    "object-src 'none'; base-uri 'self'; form-action 'self'"
)
"""What the browser may load: what comes from the studio itself."""
ALONE = (
    "sandbox allow-scripts; default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
)
"""A report's page: neither the studio nor the network is in its reach."""


def app_of(studio: Studio) -> Any:
    """The whole application: tabs, files of jobs, and reports."""
    quieten()
    import gradio as gr
    from fastapi import FastAPI
    from fastapi.responses import FileResponse, Response

    from .app import blocks, theme

    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)

    def sent(root: Path | None, path: str) -> Response:
        file = None if root is None else (root / path).resolve()
        hidden = any(part.startswith(".") for part in Path(path).parts)
        if file is None or hidden or not file.is_relative_to(root.resolve()) or not file.is_file():
            return Response(status_code=404)
        if file.suffix not in (".png", ".html", ".json"):
            return Response(status_code=404)
        policy = ALONE if file.suffix == ".html" else "sandbox; default-src 'none'"
        return FileResponse(file, headers={"Content-Security-Policy": policy, "X-Content-Type-Options": "nosniff"})

    @app.get("/runs/{path:path}")
    def runs(path: str) -> Response:
        return sent(studio.root, path)

    @app.get("/reports/{name}/{path:path}")
    def reports(name: str, path: str) -> Response:
        return sent(studio.pages.get(name), path)

    beside = files("sfumato.studio")
    style, script = (beside.joinpath(name).read_text(encoding="utf-8") for name in ("style.css", "page.js"))
    gr.mount_gradio_app(
        app, blocks(studio), path="/", server_name=HOST, footer_links=[], max_file_size=studio.largest, ssr_mode=False,
        pwa=False, mcp_server=False, enable_monitoring=False, show_error=False, theme=theme(), css=style,
        head=f"<script>{script}</script>",
    )  # fmt: skip
    return Guard(app)


class Guard:
    """Answers only who asks this machine by its own name, and from the studio's own page."""

    def __init__(self, app: Callable[..., Awaitable[None]]):
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] not in ("http", "websocket"):
            return await self.app(scope, receive, send)
        headers = {k.decode("latin-1").lower(): v.decode("latin-1") for k, v in scope["headers"]}
        host, origin = headers.get("host", ""), headers.get("origin")
        # another site that this browser looks at may not ask in its name, nor under a name that leads here
        if host.partition(":")[0] not in NAMES or origin not in (None, f"http://{host}"):
            await send({"type": "http.response.start", "status": 403, "headers": []})
            return await send({"type": "http.response.body", "body": b"the studio answers its own page only"})

        async def guarded(message: Any) -> None:
            if message["type"] == "http.response.start":
                said = list(message.get("headers", []))
                if not any(name.lower() == b"content-security-policy" for name, _ in said):
                    said.append((b"content-security-policy", POLICY.encode()))
                said += [(b"referrer-policy", b"no-referrer"), (b"cross-origin-opener-policy", b"same-origin")]
                message = {**message, "headers": said}
            await send(message)

        await self.app(scope, receive, guarded)


def quieten() -> None:
    """Before gradio is imported: no telemetry, no version checks, no hub.

    Raises:
        BadInput: gradio is not installed.
    """
    os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    try:
        import gradio  # noqa: F401
    except ImportError as error:
        raise BadInput("the studio needs gradio: pip install 'sfumato[studio]'") from error


@contextmanager
def serving(
    root: Path, ledger: Path | None = None, port: int = 7860, largest: int = 8_000_000_000
) -> Iterator[tuple[str, uvicorn.Server, Studio]]:
    """A studio that answers while the block lasts: its address, its server, and what it works with.

    Args:
        root: folder of all that is made; one studio at a time.
        ledger: folder of the ledger's results; None: of those that come with the package.
        port: 0 for any that is free.
        largest: bytes of a file that is sent.

    Raises:
        BadInput: no gradio; the port is taken; another studio works in the folder.
    """
    quieten()
    import uvicorn

    # gradio keeps what is sent in a folder of its own, which goes with the studio's
    with held(root), bound(port) as listening:
        os.environ["GRADIO_TEMP_DIR"] = str((root / ".gradio").resolve())
        jobs = Jobs(root.resolve())
        studio = Studio(root.resolve(), ledger, largest, jobs)
        config = uvicorn.Config(app_of(studio), log_level="error", ws="none", timeout_graceful_shutdown=1)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        try:
            yield f"http://{HOST}:{listening.getsockname()[1]}/", server, studio
        finally:
            jobs.close()
            server.should_exit = True
            thread.join(10)


@contextmanager
def bound(port: int) -> Iterator[socket.socket]:
    """A socket that listens on this machine only; `BadInput` where that cannot be."""
    made = socket.socket()
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind((HOST, port))
        made.listen(64)
    except (OSError, OverflowError) as error:
        made.close()
        why = getattr(error, "strerror", None) or str(error)
        raise BadInput(f"cannot listen on {HOST}:{port} ({why}): choose another --port, or 0 for any") from error
    try:
        yield made
    finally:
        made.close()


def serve(root: Path, ledger: Path | None, port: int, largest: int, browse: bool) -> None:
    """Serve until interrupted."""
    with serving(root, ledger, port, largest) as (url, _, studio):
        print(f"studio: {url} (stop it with Ctrl-C); everything it makes is in {studio.root}", flush=True)
        if browse:
            webbrowser.open(url)
        threading.Event().wait()
