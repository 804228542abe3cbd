"""Endpoints for speech, beside those of studio_api.py; each is there when a model for it is.

They pass through the same device lock, limits and readers as the page.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import gradio as gr

from .. import Tokens
from ..core.errors import InvalidInput
from ..core.generator import image_seeds
from . import studio_speech_actions as actions
from .studio_code import safe_stem
from .studio_context import Studio, clip_input
from .studio_models import CODEC, ENHANCER, RECOGNISER, SPEAKER
from .studio_speech import checked_temperature
from .studio_speech_reader import read_clip
from .studio_worker import Job


def build(studio: Studio, raises: Callable, new_folder: Callable[[], Path]) -> None:
    """Add the endpoints. raises: turns mistakes into answers. new_folder: gives a folder for an answer's files."""
    api = SpeechEndpoints(studio, new_folder)
    with gr.Group(visible=False):
        clip, tokens_file = clip_input(label="clip"), gr.File(label="tokens")
        seed, temperature = gr.Number(None, label="seed", precision=0), gr.Number(1.0, label="temperature")
        greedy, hotwords = gr.Checkbox(False, label="greedy"), gr.Textbox("", label="hotwords")
        text, out_file, out_json = gr.Textbox("", label="text"), gr.File(), gr.JSON()
        trigger = gr.Button()
    endpoints = {
        "encode_audio": (CODEC, lambda model: [clip, model]),
        "decode_audio": (CODEC, lambda model: [tokens_file, model]),
        "enhance": (ENHANCER, lambda model: [clip, model, seed, temperature, greedy]),
        "transcribe": (RECOGNISER, lambda model: [clip, model, hotwords]),
        "speak": (SPEAKER, lambda model: [text, model, seed]),
    }
    for name, (kind, inputs) in endpoints.items():
        models = [source for _, source in studio.catalogue.choices(kind)]
        if models:
            with gr.Group(visible=False):
                default = "" if name == "decode_audio" else studio.catalogue.default_source(kind)
                model = gr.Textbox(default, label="model", info=", ".join(models))
            trigger.click(raises(getattr(api, name)), inputs(model), [out_file, out_json], api_name=name)


class SpeechEndpoints:
    """The functions behind the endpoints."""

    def __init__(self, studio: Studio, new_folder: Callable[[], Path]):
        self.studio, self.new_folder = studio, new_folder

    def encode_audio(self, clip, model):
        """Encode a clip (WAV, FLAC, Ogg). Returns the .mtok file and its numbers."""
        folder, clip = self._read(clip)
        coded = self._run(CODEC, model, lambda codec, job: actions.code_clip(codec, model, clip, job))
        path = folder / f"{safe_stem(clip.name)}.mtok"
        coded.tokens.save(path)
        return str(path), coded_facts(coded)

    def decode_audio(self, tokens_file, model=""):
        """Decode a .mtok file with the given codec, or the one that it names. Returns the WAV file and its numbers."""
        if tokens_file is None:
            raise InvalidInput("Give a .mtok file.")
        tokens, name = Tokens.load(tokens_file), Path(tokens_file).name
        source = model or self.studio.catalogue.source_of(tokens.tokenizer, CODEC)
        coded = self._run(CODEC, source, lambda codec, job: actions.decode_tokens(codec, source, tokens, name, job))
        path = self.new_folder() / f"{safe_stem(name)}.wav"
        coded.after.save(path)
        return str(path), coded_facts(coded)

    def enhance(self, clip, model, seed=None, temperature=1.0, greedy=False):
        """Make a noisy clip clean. Returns the WAV file and its numbers. seed: drawn when null."""
        folder, clip = self._read(clip)
        seed, temperature = image_seeds(seed, 1)[0], checked_temperature(temperature)
        mixed = actions.mix(clip, "none", 0)

        def work(enhancer, job: Job) -> actions.Enhanced:
            enhanced = actions.enhance_clip(enhancer, model, mixed, seed, bool(greedy), temperature, job)
            return actions.with_dnsmos(enhanced, job) if actions.has_dnsmos(enhanced) else enhanced

        enhanced = self._run(ENHANCER, model, work)
        path = folder / f"{safe_stem(clip.name)}-enhanced.wav"
        enhanced.after.save(path)
        return str(path), {
            "model": enhanced.model_name, "seed": seed, "audio_seconds": round(enhanced.after.seconds, 4),
            "sample_rate": enhanced.after.sample_rate, "dnsmos": enhanced.dnsmos,
            "seconds": round(enhanced.seconds, 4), "device": enhanced.device,
        }  # fmt: skip

    def transcribe(self, clip, model, hotwords=""):
        """Write a clip down. Returns captions (.srt), and the text with the time of each word.

        hotwords: between commas; for models that take them.
        """
        folder, clip = self._read(clip)
        words = actions.checked_hotwords(hotwords)
        heard = self._run(
            RECOGNISER, model, lambda model_, job: actions.transcribe_clip(model_, model, clip, words, job)
        )
        path = folder / f"{safe_stem(clip.name)}.srt"
        heard.transcript.save(path)
        return str(path), {
            "model": heard.model_name, "text": heard.transcript.text, "audio_seconds": round(clip.seconds, 4),
            "words": [[word.text, round(word.start, 4), round(word.end, 4)] for word in heard.transcript.words],
            "seconds": round(heard.seconds, 4), "device": heard.device,
        }  # fmt: skip

    def speak(self, text, model, seed=None):
        """Say a text. Returns the WAV file and its numbers. seed: drawn when null."""
        seed = image_seeds(seed, 1)[0]
        spoken = self._run(SPEAKER, model, lambda model_, job: actions.speak_text(model_, model, text, seed, job))
        path = self.new_folder() / f"spoken-{seed}.wav"
        spoken.after.save(path)
        return str(path), {
            "model": spoken.model_name, "seed": seed, "audio_seconds": round(spoken.after.seconds, 4),
            "sample_rate": spoken.after.sample_rate, "seconds": round(spoken.seconds, 4), "device": spoken.device,
        }  # fmt: skip

    def _read(self, path):
        if path is None:
            raise InvalidInput("Give a clip.")
        folder = self.new_folder()
        return folder, read_clip(Path(path), folder)

    def _run(self, kind: str, source: str, work: Callable):
        model, job = self.studio.catalogue.get(source, kind), Job()
        with self.studio.device.hold(job):
            return work(model, job)


def coded_facts(coded: actions.Coded) -> dict:
    """A coded clip's numbers as plain values."""
    return {
        "tokenizer": coded.model_name,
        "tokens": coded.tokens.ids[0, : coded.num_frames].tolist(),
        "num_tokens": coded.num_frames * coded.num_codebooks,
        "bytes": coded.tokens.num_bytes,
        "bits_per_second": round(coded.file_bit_rate, 2),
        "stoi": coded.stoi,
        "audio_seconds": round(coded.after.seconds, 4),
        "sample_rate": coded.after.sample_rate,
        "seconds": round(coded.seconds, 4),
        "device": coded.device,
    }
