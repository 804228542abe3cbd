"""The studio: one local page that makes tokens visible. `launch` serves it; `mediatok studio` calls that.

Each tab is a file of its own (tab_image.py, tab_compare.py, tab_generate.py, tab_shapes.py, tab_speech.py,
tab_models.py); what they share is in studio_context.py, the handlers of the larger tabs in studio_image.py,
studio_generate.py, studio_shapes.py and studio_speech.py, the device and its queue in studio_worker.py.
"""

from __future__ import annotations

import argparse
import atexit
import os
import shutil
import sys
import tempfile
from pathlib import Path

import gradio as gr
from starlette.middleware import Middleware

from ..core.errors import InvalidInput, MediatokError
from . import studio_api, studio_shapes_api, tab_compare, tab_generate, tab_image, tab_models, tab_shapes, tab_speech
from .studio_context import Studio, html
from .studio_guard import Guard
from .studio_image import first_session
from .studio_models import CODEC, GENERATOR, TOKENIZER, Catalogue
from .studio_shapes import ShapeSession
from .studio_speech import SpeechSession
from .studio_style import page_style

LOCAL_HOSTS = ("127.0.0.1", "localhost", "::1")
HELP = Path(__file__).parent.parent / "docs" / "studio.md"
SESSION_SECONDS = 24 * 3600  # an open page; Gradio ends a closed one after an hour
CACHE_SECONDS = 2 * 3600  # files that a page shows or offers
MAX_QUEUE = 64  # events that wait over all users; the next one gets a message


def launch(
    host: str = "127.0.0.1",
    port: int = 7860,
    auth: str | tuple[str, str] | None = None,
    no_auth: bool = False,
    public: bool = False,
    models_dir: str | Path | None = None,
    max_upload_mb: int = 64,
    prevent_thread_lock: bool = False,
    device: str | None = None,
) -> gr.Blocks:
    """Serve the studio until it is interrupted.

    Args:
        host, port: where to listen. Anything but this machine needs `auth` or an explicit `no_auth`.
        auth: "user:password", or the pair.
        no_auth: serve other machines without a password.
        public: hide the Models tab, whose text field reaches folders and the network.
        models_dir: folder of model folders to offer beside the shipped ones.
        max_upload_mb: largest upload, in MiB.
        prevent_thread_lock: return at once; call `close()` on the result to stop.
        device: "cpu", "cuda" ...; default the accelerator if there is one.

    Raises:
        InvalidInput: an unsafe or impossible combination of arguments.
        ModelNotFound: no model to start with.
    """
    credentials = check_access(host, auth, no_auth)
    if not 0 < port < 65536 or not 0 < max_upload_mb <= 4096:
        raise InvalidInput(f"port={port} or max_upload_mb={max_upload_mb} is out of range")
    catalogue = Catalogue(models_dir, device := device or default_device())
    folder = Path(tempfile.mkdtemp(prefix="mediatok-studio-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    # Gradio copies everything it serves into this folder; ours has nobody else's files in it.
    os.environ["GRADIO_TEMP_DIR"] = str(folder / "served")
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    if not prevent_thread_lock:
        # Gradio may serve files of the working directory: stand in an empty one.
        (folder / "empty").mkdir()
        os.chdir(folder / "empty")
    (folder / "sessions").mkdir()
    page = build(Studio(catalogue, folder / "sessions", public, device))
    page.queue(max_size=MAX_QUEUE, default_concurrency_limit=16)
    limit = max_upload_mb * 2**20
    try:
        page.launch(
            server_name=host, server_port=port, auth=credentials, share=False, show_error=False, quiet=True,
            max_file_size=limit, strict_cors=True, ssr_mode=False, enable_monitoring=False, run_history=False,
            footer_links=[], pwa=False, state_session_capacity=1000, **page_style(),
            app_kwargs={"middleware": [Middleware(Guard, max_upload_bytes=limit)]}, prevent_thread_lock=True,
        )  # fmt: skip
    except OSError as error:
        raise InvalidInput(f"cannot listen on {host}:{port}: {error}. Choose another --port.") from error
    print(f"mediatok studio: http://{host if host != '0.0.0.0' else '127.0.0.1'}:{port}", flush=True)
    if not prevent_thread_lock:
        page.block_thread()
    return page


def build(studio: Studio) -> gr.Blocks:
    """Assemble the page."""
    prototype = first_session(studio)
    with gr.Blocks(
        title="mediatok studio", analytics_enabled=False, delete_cache=(600, CACHE_SECONDS), fill_width=True
    ) as page:
        session = gr.State(prototype, time_to_live=SESSION_SECONDS, delete_callback=lambda value: value.close())
        shape_session, speech_session = (
            gr.State(kind(studio.folder), time_to_live=SESSION_SECONDS, delete_callback=lambda value: value.close())
            for kind in (ShapeSession, SpeechSession)
        )
        title = html(studio.title(), elem_id="title")
        with gr.Tabs(elem_id="tabs") as tabs:
            with gr.Tab("Image", id="image"):
                image = tab_image.build(studio, session, prototype, title)
            with gr.Tab("Compare", id="compare"):
                compare = tab_compare.build(studio, session, prototype, title)
            pickers = dict.fromkeys([image.model, *compare.models], TOKENIZER)
            generate = None
            if prototype.gallery is not None:
                with gr.Tab("Generate", id="generate"):
                    generate = tab_generate.build(studio, session, prototype, title)
                pickers[generate.model] = GENERATOR
            with gr.Tab("3D", id="shapes") as shapes_tab:
                shapes = tab_shapes.build(studio, shape_session, title)
            shapes.open_with(shapes_tab.select)
            with gr.Tab("Speech", id="speech", visible=has_codec(studio)) as speech_tab:
                speech = tab_speech.build(studio, speech_session, title)
            speech.open_with(speech_tab.select)
            if not studio.public:
                with gr.Tab("Models", id="models") as models_tab:
                    models = tab_models.build(studio, pickers | shapes.models | speech.models, title)
                models.refresh(models_tab.select)
            with gr.Tab("Help", id="help"), gr.Column(elem_classes="mt-help"):
                gr.Markdown(help_text(), elem_id="help")
        hidden = {"show_progress": "hidden", "api_visibility": "private"}
        compare.start(image.to_compare.click(lambda: gr.Tabs(selected="compare"), None, tabs, **hidden))
        if generate is not None:
            image.start(generate.to_image.click(lambda: gr.Tabs(selected="image"), None, tabs, **hidden))
        if not studio.public:  # a codec may be loaded by name
            models.table.change(lambda: gr.Tab(visible=has_codec(studio)), None, speech_tab, **hidden)
        # Setting the states once is what makes Gradio count their time.
        states = [session, shape_session, speech_session]
        page.load(
            lambda *values: (*values, studio.title(), gr.Tab(visible=has_codec(studio))), states,
            [*states, title, speech_tab], **hidden,
        )  # fmt: skip
        studio_api.build(studio)
        studio_shapes_api.build(studio, studio_api.raises, studio_api.Endpoints(studio).new_folder)
    return page


def has_codec(studio: Studio) -> bool:
    """Whether there is anything for the Speech tab to begin with."""
    return bool(studio.catalogue.choices(CODEC))


def help_text() -> str:
    """docs/studio.md, for the Help tab."""
    try:
        return HELP.read_text()
    except OSError:
        return "The guide to the studio is docs/studio.md in the source."


def check_access(host: str, auth: str | tuple[str, str] | None, no_auth: bool) -> tuple[str, str] | None:
    """User and password, or None. Refuses to serve other machines by accident without a password."""
    if isinstance(auth, str):
        user, colon, password = auth.partition(":")
        if not (user and colon and password):
            raise InvalidInput("--auth takes user:password")
        auth = (user, password)
    if auth is None and not no_auth and host not in LOCAL_HOSTS:
        raise InvalidInput(
            f"--host {host} lets other machines in: give --auth user:password, or --no-auth if that is what you want"
        )
    return auth


def default_device() -> str:
    """The accelerator if there is one."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def main(arguments: list[str] | None = None) -> int:
    """`python -m mediatok.app.studio`."""
    parser = argparse.ArgumentParser(prog="mediatok studio", description="Serve the studio, a local web page.")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=7860)
    parser.add_argument("--auth", metavar="USER:PASSWORD")
    parser.add_argument("--no-auth", action="store_true", help="serve other machines without a password")
    parser.add_argument("--public", action="store_true", help="hide the Models tab")
    parser.add_argument("--models", metavar="DIR", help="folder of model folders to offer")
    parser.add_argument("--max-upload-mb", type=int, default=64)
    parser.add_argument("--device")
    options = parser.parse_args(arguments)
    try:
        launch(
            options.host, options.port, options.auth, options.no_auth, options.public, options.models,
            options.max_upload_mb, device=options.device,
        )  # fmt: skip
    except MediatokError as error:
        print(f"mediatok studio: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
