"""What stands in front of Gradio: upload limits, no fetching of other servers, headers that keep the page to itself."""

from __future__ import annotations

from urllib.parse import unquote

# Gradio can stream a remote URL through its file route. The studio shows local files only.
REMOTE_SCHEMES = ("http:", "https:", "ftp:", "file:", "data:", "//", "\\\\")
MULTIPART_OVERHEAD = 16 * 1024  # boundary, headers and form fields around one file
DRAINED_UPLOADS = 4  # how many times the limit is read and thrown away before the connection is cut

HEADERS = [
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (
        b"content-security-policy",
        # Gradio builds components from code strings, hence the two unsafe words; nothing may come from other hosts.
        b"default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; frame-ancestors 'self'; base-uri 'self'; "
        b"form-action 'self'; object-src 'none'",
    ),
]


class Guard:
    """ASGI middleware. Limits uploads to one file of `max_upload_bytes` a request and refuses remote URLs."""

    def __init__(self, app, max_upload_bytes: int):
        self.app = app
        self.max_upload_bytes = max_upload_bytes

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        path = unquote(unquote(scope["path"]))  # Gradio decodes once more than the server; see both layers
        if _asks_for_remote_file(path):
            await _refuse(send, 403, "The studio serves its own files only.")
            return
        if scope["method"] == "POST" and path.rstrip("/").endswith("/upload"):
            upload = _Upload(scope, receive, self.max_upload_bytes)
            if upload.declared_bytes > upload.max_bytes:
                await _drain(receive, DRAINED_UPLOADS * upload.max_bytes)
                await _refuse(send, 413, upload.too_large)
                return
            await self.app(scope, upload.receive, _with_headers(send, upload))
            return
        await self.app(scope, receive, _with_headers(send))


class _Upload:
    """Counts the bytes and the parts of a multipart body as they come in."""

    def __init__(self, scope, receive, max_upload_bytes: int):
        headers = {key.lower(): value for key, value in scope["headers"]}
        self._receive = receive
        self._boundary = b"--" + headers.get(b"content-type", b"").partition(b"boundary=")[2].strip(b'" ')
        self._tail = b"\r\n"
        self._num_bytes = 0
        self._num_parts = 0
        self.max_bytes = max_upload_bytes + MULTIPART_OVERHEAD
        self.too_large = f"The file is larger than this studio accepts ({max_upload_bytes / 2**20:g} MiB)."
        self.refusal: tuple[int, str] | None = None
        declared = headers.get(b"content-length", b"0")
        self.declared_bytes = int(declared) if declared.isdigit() else 0

    async def receive(self):
        message = await self._receive()
        if message["type"] != "http.request" or self.refusal:
            return message
        body = message.get("body", b"")
        self._num_bytes += len(body)
        window = self._tail + body
        marker = b"\r\n" + self._boundary + b"\r\n"
        self._num_parts += window.count(marker)
        self._tail = window[-(len(marker) - 1) :]
        if self._num_bytes > self.max_bytes:
            self.refusal = (413, self.too_large)
        elif self._num_parts > 1:
            self.refusal = (400, "Upload one file at a time.")
        if self.refusal:  # end the body here, so that Gradio stops reading and keeps nothing whole
            return {"type": "http.request", "body": b"", "more_body": False}
        return message


def _asks_for_remote_file(path: str) -> bool:
    _, found, target = path.partition("/file=")
    if not found:
        _, found, target = path.partition("/file/")
    if found:
        return target.strip().lower().startswith(REMOTE_SCHEMES)
    return "/proxy=" in path


def _with_headers(send, upload: _Upload | None = None):
    """Add our headers to the response; if the upload was refused, answer that instead."""
    replaced = False

    async def wrapped(message):
        nonlocal replaced
        if replaced:
            return
        if upload is not None and upload.refusal and message["type"] == "http.response.start":
            replaced = True
            await _refuse(send, *upload.refusal)
            return
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message.get("headers", []), *HEADERS]}
        await send(message)

    return wrapped


async def _drain(receive, limit_bytes: int) -> None:
    """Throw away a body that is refused anyway: a client that is cut off while it sends never reads the answer."""
    num_bytes, more = 0, True
    while more and num_bytes <= limit_bytes:
        message = await receive()
        num_bytes += len(message.get("body", b""))
        more = message.get("more_body", False)


async def _refuse(send, status: int, text: str) -> None:
    body = text.encode()
    headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": [*headers, *HEADERS]})
    await send({"type": "http.response.body", "body": body})
