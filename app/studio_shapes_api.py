"""Endpoints for shapes, beside those of studio_api.py; each is there when a model for it is.

They pass through the same device lock, limits and readers as the page.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import gradio as gr

from .. import Tokens
from ..core.errors import InvalidInput
from ..core.generator import image_seeds
from ..core.meshes import write_mesh
from . import studio_shapes_actions as actions
from .studio_code import safe_stem
from .studio_context import Studio, mesh_input
from .studio_models import SHAPE_GENERATOR, SHAPE_TOKENIZER
from .studio_shapes_code import made_stem
from .studio_shapes_reader import MeshFile, read_mesh_file
from .studio_worker import Job


def build(studio: Studio, raises: Callable, new_folder: Callable[[], Path]) -> None:
    """Add the endpoints. raises: turns mistakes into answers. new_folder: gives a folder for an answer's files."""
    api = ShapeEndpoints(studio, new_folder)
    with gr.Group(visible=False):
        mesh, tokens_file = mesh_input(label="mesh"), gr.File(label="tokens")
        resolution = gr.Number(actions.FIRST_RESOLUTION, label="resolution", precision=0)
        up_to_scale, seed = (gr.Number(None, label=name, precision=0) for name in ("up_to_scale", "seed"))
        label, guidance = gr.JSON(None, label="label"), gr.Number(None, label="guidance")
        out_file, out_json = gr.File(), gr.JSON()
        trigger = gr.Button()
    endpoints = {
        "encode_mesh": (SHAPE_TOKENIZER, lambda model: [mesh, model]),
        "decode_mesh": (SHAPE_TOKENIZER, lambda model: [tokens_file, model, resolution, up_to_scale]),
        "generate_shape": (SHAPE_GENERATOR, lambda model: [model, label, seed, guidance, resolution]),
    }
    for name, (kind, inputs) in endpoints.items():
        models = [source for _, source in studio.catalogue.choices(kind)]
        if models:
            with gr.Group(visible=False):
                default = "" if name == "decode_mesh" else studio.catalogue.default_source(kind)
                model = gr.Textbox(default, label="model", info=", ".join(models))
            trigger.click(raises(getattr(api, name)), inputs(model), [out_file, out_json], api_name=name)


class ShapeEndpoints:
    """The functions behind the endpoints."""

    def __init__(self, studio: Studio, new_folder: Callable[[], Path]):
        self.studio, self.new_folder = studio, new_folder

    def encode_mesh(self, mesh, model):
        """Encode a mesh (OBJ, STL, PLY, OFF, GLB). Returns the .mtok file and its numbers."""
        if mesh is None:
            raise InvalidInput("Give a mesh.")
        folder = self.new_folder()
        subject = read_mesh_file(Path(mesh), folder)
        coded = self._code(model, subject, actions.FIRST_RESOLUTION)
        path = folder / f"{safe_stem(subject.name)}.mtok"
        coded.tokens.save(path)
        return str(path), coded_facts(coded)

    def decode_mesh(self, tokens_file, model="", resolution=actions.FIRST_RESOLUTION, up_to_scale=None):
        """Decode a .mtok file with the given tokenizer, or the one that it names. Returns a GLB file and its numbers.

        resolution: 32, 64 or 128. up_to_scale: decode the first scales alone; null for all.
        """
        if tokens_file is None:
            raise InvalidInput("Give a .mtok file.")
        subject = actions.tokens_file(Tokens.load(tokens_file), Path(tokens_file).name)
        if up_to_scale is not None:
            subject = replace(subject, tokens=subject.tokens.up_to_scale(up_to_scale))
        source = model or self.studio.catalogue.source_of(subject.tokens.tokenizer, SHAPE_TOKENIZER)
        coded = self._code(source, subject, resolution)
        path = self.new_folder() / f"{safe_stem(subject.name)}.glb"
        write_mesh(coded.mesh, path)
        return str(path), coded_facts(coded)

    def generate_shape(self, model, label=None, seed=None, guidance=None, resolution=actions.FIRST_RESOLUTION):
        """Make a shape of a class: its name, its number, or null for any. Returns a GLB file and its numbers.

        seed: drawn when null. guidance: null for the model's own.
        """
        seed = image_seeds(seed, 1)[0]
        generator, job = self.studio.catalogue.get(model, SHAPE_GENERATOR), Job()
        (number,) = generator.label_ids(label).tolist()
        number = None if number == generator.config.num_classes else number
        guidance = actions.checked_guidance(generator.config.guidance_scale if guidance is None else guidance)
        with self.studio.device.hold(job):
            made = actions.make_shape(generator, model, number, seed, guidance, resolution, job)
        path = self.new_folder() / f"{made_stem(made)}.glb"
        write_mesh(made.mesh, path)
        return str(path), {
            "generator": made.model_name, "label": made.label_name, "seed": seed, "guidance": made.guidance,
            "num_tokens": int(made.tokens.lengths[0]), "bytes": made.tokens.num_bytes, "faces": len(made.mesh.faces),
            "seconds": round(made.seconds, 4), "device": made.device,
        }  # fmt: skip

    def _code(self, source: str, subject: MeshFile | actions.TokensFile, resolution) -> actions.Coded:
        tokenizer, job = self.studio.catalogue.get(source, SHAPE_TOKENIZER), Job()
        with self.studio.device.hold(job):
            return actions.code_shape(tokenizer, source, subject, None, resolution, job)


def coded_facts(coded: actions.Coded) -> dict:
    """A coded shape's numbers as plain values."""
    return {
        "tokenizer": coded.model_name,
        "tokens": coded.tokens.ids[0].tolist(),
        "num_tokens": int(coded.tokens.lengths[0]),
        "scales": list(coded.tokens.scales[: coded.num_scales]),
        "bytes": coded.tokens.num_bytes,
        "faces": len(coded.mesh.faces),
        "f_score": None if coded.figures is None else round(coded.figures["F-score at 0.05"], 4),
        "seconds": round(coded.seconds, 4),
        "device": coded.device,
    }
