"""mediatok: images, 3D shapes and speech as short token sequences, and back.

    import mediatok as mt

    tokenizer = mt.load("titok-tiny")
    tokens = tokenizer.encode("photo.jpg")
    image = tokenizer.decode(tokens)

Everything below is imported on first use, so `import mediatok` costs next to nothing.
"""

from __future__ import annotations

import importlib

__version__ = "0.1.0"

# Public name -> module that holds it.
_PUBLIC = {
    "load": "core.registry",
    "create": "core.registry",
    "models": "core.registry",
    "ModelEntry": "core.registry",
    "Tokens": "core.tokens",
    "ImageFrame": "core.tokens",
    "ShapeFrame": "core.tokens",
    "SpeechFrame": "core.tokens",
    "Waveform": "core.audio",
    "read_mesh": "core.meshes",
    "write_mesh": "core.meshes",
    "read_audio": "core.audio",
    "open_audio": "core.audio",
    "write_audio": "core.audio",
    "read_image": "core.images",
    "write_image": "core.images",
    "psnr": "core.images",
    "TiTok": "tokenizers.image.titok",
    "OneDPiece": "tokenizers.image.one_d_piece",
    "MaskGitVQGAN": "tokenizers.image.maskgit_vqgan",
    "KLAutoencoder": "tokenizers.image.kl_vae",
    "FlexTok": "tokenizers.image.flextok",
    "TokenFlow": "tokenizers.image.tokenflow",
    "Seed": "tokenizers.image.seed",
    "VAT": "tokenizers.shape.vat",
    "SimCodec": "tokenizers.speech.simcodec",
    "SemanticTokenizer": "tokenizers.speech.semantic",
    "MaskGIT": "generators.maskgit",
    "XAR": "generators.xar",
    "NextToken": "generators.next_token",
    "NextScale": "generators.next_scale",
    "NextScaleLlama": "generators.next_scale_llama",
    "SeedLLaMA": "generators.seed_llama",
    "Paraformer": "generators.paraformer",
    "GenSE": "generators.gense",
    "Speak": "generators.speak",
    "MaskGITPipeline": "generators.pipelines",
    "XARPipeline": "generators.pipelines",
    "Model": "core.base",
    "Generation": "core.generator",
    "evaluate": "evaluation.evaluate",
    "evaluate_generator": "evaluation.generation",
    "evaluate_speech": "evaluation.speech",
    "evaluate_shapes": "evaluation.shapes",
    "rate_curve": "evaluation.rate",
    "codec_curve": "evaluation.rate",
    "rate_speech": "evaluation.speech_rate",
    "MediatokError": "core.errors",
    "InvalidInput": "core.errors",
    "LimitExceeded": "core.errors",
    "InvalidTokens": "core.errors",
    "TokenizerMismatch": "core.errors",
    "ModelNotFound": "core.errors",
    "InvalidCheckpoint": "core.errors",
    "InvalidRecipe": "core.errors",
    "Cancelled": "core.errors",
    "MissingDependency": "core.errors",
}
_MODULES = ("convert",)

__all__ = [*_PUBLIC, *_MODULES]


def __getattr__(name: str):
    if name in _MODULES:
        return importlib.import_module(f".{name}", __name__)
    if name in _PUBLIC:
        # A function may share its module's name (evaluate): bind it here so that the submodule does not hide it.
        value = getattr(importlib.import_module(f".{_PUBLIC[name]}", __name__), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
