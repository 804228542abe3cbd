"""Endpoints with stable names and plain types, for `gradio_client` and other programs.

    from gradio_client import Client, handle_file
    studio = Client("http://127.0.0.1:7860")
    path, numbers = studio.predict(handle_file("photo.jpg"), "titok-tiny", api_name="/encode_image")

They pass through the same device lock, limits and readers as the page.
"""

from __future__ import annotations

import functools
import shutil
import tempfile
import time
from contextlib import suppress
from html import escape
from pathlib import Path

import gradio as gr

from .. import Tokens, write_image
from ..core.errors import InvalidInput, MediatokError
from ..core.generator import image_seeds
from . import studio_actions as actions
from . import studio_speech_api
from .studio_code import picture_name, safe_stem
from .studio_context import Studio, picture_input, report_bug, sentence
from .studio_generation import make_pictures
from .studio_models import GENERATOR
from .studio_worker import Job

KEPT_SECONDS = 600  # Gradio copies an answer's file at once; ours may go then


def raises(handler):
    """Turn every exception into one with a message for the caller, without a traceback."""

    @functools.wraps(handler)
    def wrapped(*args):
        try:
            return handler(*args)
        except MediatokError as error:
            raise gr.Error(escape(sentence(error)), print_exception=False) from None
        except Exception:
            raise gr.Error(escape(report_bug()), print_exception=False) from None

    return wrapped


def build(studio: Studio) -> None:
    """Add the endpoints. They need components for their types; these are not on the page."""
    api = Endpoints(studio)
    models = [source for _, source in studio.catalogue.choices()]
    default = studio.catalogue.default_source()
    with gr.Group(visible=False):
        picture, tokens_file, out_file, out_json = (
            picture_input(label="picture"),
            gr.File(label="tokens"),
            gr.File(),
            gr.JSON(),
        )
        tokenizer = gr.Textbox(default, label="tokenizer", info=", ".join(models))
        other = gr.Textbox(models[-1], label="other")
        num_tokens, target_psnr = gr.Number(None, label="num_tokens", precision=0), gr.Number(None, label="target_psnr")
        max_bytes, tile = gr.Number(None, label="max_bytes", precision=0), gr.Checkbox(False, label="tile")
        decoding = gr.JSON({}, label="decoding")
        trigger = gr.Button()
    options = [num_tokens, target_psnr, max_bytes, tile]
    trigger.click(
        raises(api.encode_image), [picture, tokenizer, *options], [out_file, out_json], api_name="encode_image"
    )
    trigger.click(
        raises(api.decode_tokens), [tokens_file, tokenizer, decoding], [out_file, out_json], api_name="decode_tokens"
    )
    trigger.click(
        raises(api.compare), [picture, tokenizer, other, num_tokens, max_bytes], [out_json], api_name="compare"
    )
    trigger.click(raises(api.models), None, [out_json], api_name="models")
    generators = [source for _, source in studio.catalogue.choices(GENERATOR)]
    if generators:
        with gr.Group(visible=False):
            generator = gr.Textbox(
                studio.catalogue.default_source(GENERATOR), label="generator", info=", ".join(generators)
            )
            labels, seed = gr.JSON([None], label="labels"), gr.Number(None, label="seed", precision=0)
            steps, guidance = gr.Number(None, label="steps", precision=0), gr.Number(None, label="guidance")
            out_files = gr.File(file_count="multiple")
        trigger.click(
            raises(api.generate), [generator, labels, seed, steps, guidance], [out_files, out_json],
            api_name="generate",
        )  # fmt: skip
    studio_speech_api.build(studio, raises, api.new_folder)


class Endpoints:
    """The functions behind the endpoints."""

    def __init__(self, studio: Studio):
        self.studio = studio

    def encode_image(self, picture, tokenizer, num_tokens=None, target_psnr=None, max_bytes=None, tile=False):
        """Encode a picture, by at most one of num_tokens, target_psnr (dB), max_bytes. Returns .mtok and numbers."""
        if picture is None:
            raise InvalidInput("Give a picture.")
        given = {"tokens": num_tokens, "quality": target_psnr, "bytes": max_bytes}
        given = {kind: amount for kind, amount in given.items() if amount is not None}
        if len(given) > 1:
            raise InvalidInput("Give at most one of num_tokens, target_psnr and max_bytes.")
        result = self._encode(picture, tokenizer, *next(iter(given.items()), ("all", 0)), bool(tile))
        if result.tokens is None:
            raise InvalidInput(f"{result.model_name} has continuous latents, so there is no .mtok file.")
        path = self.new_folder() / f"{safe_stem(picture)}.mtok"
        result.tokens.save(path)
        return str(path), facts(result)

    def decode_tokens(self, tokens_file, tokenizer="", decoding=None):
        """Decode a .mtok file with the given tokenizer, or the one that it names. Returns the PNG and its numbers.

        decoding: how, by name and value, for tokenizers that can decode in several ways, as {"steps": 10, "seed": 3}.
        """
        if not isinstance(decoding or {}, dict):
            raise InvalidInput('Give decoding as names with values, as {"steps": 10}.')
        if tokens_file is None:
            raise InvalidInput("Give a .mtok file.")
        tokens = Tokens.load(tokens_file)
        source = tokenizer or self.studio.catalogue.source_of(tokens.tokenizer)
        model, job = self.studio.catalogue.get(source), Job()
        model.checked_decoding(**(decoding or {}))
        with self.studio.device.hold(job):
            result = actions.decode_tokens(model, source, tokens, Path(tokens_file).name, job, decoding=decoding)
        path = self.new_folder() / f"{safe_stem(tokens_file)}.png"
        write_image(result.image, path)
        return str(path), facts(result)

    def compare(self, picture, tokenizer, other, num_tokens=None, max_bytes=None):
        """Numbers of two tokenizers on one picture, at num_tokens or equal bytes; at full length with neither."""
        if picture is None:
            raise InvalidInput("Give a picture.")
        if num_tokens is not None and max_bytes is not None:
            raise InvalidInput("Give num_tokens or max_bytes, not both.")
        sources, kind, amounts = (tokenizer, other), "tokens", [num_tokens] * 2
        if max_bytes is not None:
            models = [self.studio.catalogue.get(source) for source in sources]
            amounts = [budget.amount for budget in actions.equal_bytes(models, picture, max_bytes)]
        elif num_tokens is None:
            kind = "all"
        pairs = zip(sources, amounts, strict=True)
        return [facts(self._encode(picture, source, kind, amount)) for source, amount in pairs]

    def generate(self, generator, labels, seed=None, steps=None, guidance=None):
        """Make a picture for each of `labels`: class names, numbers or null; or prompts. Returns PNG files and numbers.

        seed: of the first picture, the others count on; drawn when null. steps, guidance: null for the model's own.
        """
        if not isinstance(labels, list):
            raise InvalidInput('Give labels as a list, as ["flags", 3, null], or prompts, as ["a red apple"].')
        seed = image_seeds(seed, 1)[0]
        model, job = self.studio.catalogue.get(generator, GENERATOR), Job()
        with self.studio.device.hold(job):
            gallery = make_pictures(model, generator, labels, seed, steps, guidance, job)
        folder = self.new_folder()
        paths = [folder / picture_name(gallery, picture) for picture in gallery.pictures]
        for picture, path in zip(gallery.pictures, paths, strict=True):
            write_image(picture.image, path)
        return [str(path) for path in paths], {
            "generator": gallery.model_name, "labels": [gallery.label(picture) for picture in gallery.pictures],
            "seeds": [picture.recipe.seed for picture in gallery.pictures], "steps": gallery.steps,
            "guidance": gallery.guidance, "seconds": round(gallery.seconds, 4), "device": gallery.device,
        }  # fmt: skip

    def models(self):
        """Every model that this studio knows: name, status, licence, parameters, loaded or not."""
        loaded = self.studio.catalogue.shelf.loaded()
        return [
            {
                "name": row.label, "tokenizer": row.source, "status": row.status, "licence": row.licence,
                "parameters": row.parameters, "description": row.description,
                "bytes_in_memory": loaded.get(row.source, 0),
            }
            for row in self.studio.catalogue.rows()
        ]  # fmt: skip

    def _encode(self, picture, source: str, kind: str, amount, tile: bool = False) -> actions.Result:
        model, job = self.studio.catalogue.get(source), Job()
        budget = actions.Budget("tokens", model.max_tokens) if kind == "all" else actions.Budget(kind, amount)
        with self.studio.device.hold(job):
            return actions.encode_picture(model, source, picture, Path(picture).name, budget, job, tile=tile)

    def new_folder(self) -> Path:
        """A fresh folder for an answer's files; those of old answers go."""
        root = self.studio.folder / "answers"
        root.mkdir(exist_ok=True)
        for old in root.iterdir():
            with suppress(OSError):  # another call may delete the same one
                if time.time() - old.stat().st_mtime > KEPT_SECONDS:
                    shutil.rmtree(old, ignore_errors=True)
        return Path(tempfile.mkdtemp(dir=root))


def facts(result: actions.Result) -> dict:
    """A result's numbers as plain values."""
    return {
        "tokenizer": result.model_name,
        "tokens": result.ids(),
        "num_tokens": len(result.ids()),
        "bytes": None if result.tokens is None else result.tokens.num_bytes,
        "bits_per_pixel": result.bits_per_pixel,
        "psnr": result.psnr,
        "seconds": round(result.seconds, 4),
        "device": result.device,
        "width": result.image.width,
        "height": result.image.height,
    }
