"""Which models the studio offers: shipped ones, released ones whose weights are here, and local folders."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from .. import load, models
from ..core.errors import InvalidInput, ModelNotFound, nearest_names
from ..core.registry import CLASSES
from ..generators.written_pictures import picture_generator
from .studio_worker import ModelShelf

TOKENIZER, GENERATOR = "tokenizer", "generator"  # of pictures
CODEC, ENHANCER = "speech codec", "speech enhancer"
RECOGNISER, SPEAKER = "speech recogniser", "speech synthesiser"
SHAPE_TOKENIZER, SHAPE_GENERATOR = "shape tokenizer", "shape generator"
KINDS = {  # of the classes that are for other media than pictures
    "SimCodec": CODEC, "GenSE": ENHANCER, "Paraformer": RECOGNISER, "Speak": SPEAKER,
    "SemanticTokenizer": "semantic tokenizer",  # a part of enhancers
    "VAT": SHAPE_TOKENIZER, "NextScale": SHAPE_GENERATOR,
}  # fmt: skip
MODALITIES = ("image", "speech", "shape")
PREFERRED = {  # what the page shows first, if it is here
    TOKENIZER: ("one-d-piece-tiny", "titok-tiny"),  # the token slider of the first does something
    GENERATOR: ("xar-tiny", "maskgit-tiny"),
    CODEC: ("simcodec-tiny",),
    ENHANCER: ("gense-tiny",),
    RECOGNISER: ("paraformer-tiny",),
    SPEAKER: ("speak-tiny",),
    SHAPE_TOKENIZER: ("vat-tiny",),
    SHAPE_GENERATOR: ("vat-gen-tiny",),
}


@dataclass(frozen=True)
class ModelRow:
    """A model as the Models tab lists it.

    source: what `mt.load` takes. label: how people call it. kind: one of those above.
    """

    label: str
    source: str
    status: str  # "shipped", "downloaded", "needs download", "local" or "loaded by name"
    licence: str
    parameters: int | None
    description: str
    kind: str = TOKENIZER

    @property
    def is_here(self) -> bool:
        return self.status != "needs download"


class Catalogue:
    """All models that this studio knows, and those in memory."""

    def __init__(self, models_dir: str | Path | None = None, device: str | None = None):
        self.models_dir = None if models_dir is None else Path(models_dir).resolve()
        if self.models_dir is not None and not self.models_dir.is_dir():
            raise InvalidInput(f"--models: {models_dir} is not a folder")
        self.shelf = ModelShelf(lambda source: _load(source, device))
        self._by_name: dict[str, ModelRow] = {}  # loaded by name in the Models tab

    def rows(self) -> list[ModelRow]:
        """Shipped models, local folders, names loaded here, then released ones."""
        known = [
            ModelRow(
                entry.name, entry.name, entry.status, entry.licence, entry.parameters, entry.description,
                KINDS.get(entry.class_name, entry.kind),
            )
            for entry in models()
            if entry.modality in MODALITIES and (not entry.is_shipped or (entry.folder / "config.json").is_file())
        ]  # fmt: skip
        shipped = [row for row in known if row.status == "shipped"]
        listed = {row.source for row in known}
        by_name = [row for row in self._by_name.values() if row.source not in listed]
        return [*shipped, *self._local_rows(), *by_name, *(row for row in known if row.status != "shipped")]

    def _local_rows(self) -> list[ModelRow]:
        if self.models_dir is None:
            return []
        rows = []
        for config in sorted(self.models_dir.glob("*/config.json")):
            folder = config.parent
            if not list(folder.glob("*.safetensors")):
                continue
            class_name = _class_name(config)
            rows.append(
                ModelRow(
                    f"{folder.name} (local)", str(folder), "local", "", None, f"{class_name}, local folder",
                    _kind(class_name),
                )
            )  # fmt: skip
        return rows

    def choices(self, kind: str = TOKENIZER) -> list[tuple[str, str]]:
        """(label, source) of every model of a kind whose weights are here."""
        return [(row.label, row.source) for row in self.rows() if row.is_here and row.kind == kind]

    def default_source(self, kind: str = TOKENIZER) -> str:
        """The model of a kind that the page starts with."""
        here = [source for _, source in self.choices(kind)]
        if not here:
            raise ModelNotFound(
                f"no {kind} is here: the package's pretrained/ folder is empty; give a folder with --models"
            )
        return next((source for source in PREFERRED[kind] if source in here), here[0])

    def get(self, source: str, kind: str = TOKENIZER):
        """The model of a listed source; anything else is refused, so that a form field cannot name a path."""
        row = next((row for row in self.rows() if row.source == source or row.label == source), None)
        if row is None or not row.is_here:
            raise ModelNotFound(
                f"{source!r} is not a model of this studio."
                f"{nearest_names(str(source), [label for label, _ in self.choices(kind)])} See the Models tab."
            )
        if row.kind != kind:
            names = ", ".join(label for label, _ in self.choices(kind)) or "none"
            raise InvalidInput(f"{row.label} is a {row.kind}, not a {kind}; this studio has {names}.")
        model = self.shelf.get(row.source)
        return picture_generator(model) if kind == GENERATOR else model

    def load_by_name(self, name: str):
        """Load any name, folder or hub id (Models tab, which a public studio does not have)."""
        name = name.strip()
        if not name:
            raise InvalidInput("Give a model's name, folder or hub id.")
        model = self.shelf.get(next((row.source for row in self.rows() if row.label == name), name))
        if getattr(model, "modality", None) not in MODALITIES:
            self.shelf.unload(name)
            raise InvalidInput(f"{name} is not a model of pictures, speech or shapes.")
        class_name = type(model).__name__
        row = ModelRow(model.name, name, "loaded by name", "", None, class_name, _kind(class_name))
        self._by_name.setdefault(name, row)
        return model

    def source_of(self, tokenizer_name: str, kind: str = TOKENIZER) -> str:
        """The source whose tokens carry this name (a .mtok file names its tokenizer)."""
        rows = [row for row in self.rows() if row.is_here and row.kind == kind]
        for row in rows:
            if tokenizer_name in (shortened(row.source), shortened(Path(row.source).name)):
                return row.source
        raise ModelNotFound(
            f"these tokens were made by {tokenizer_name!r}, which is not here; this studio has "
            f"{', '.join(row.label for row in rows) or 'none of that kind'}"
        )


def shortened(name: str) -> str:
    """A tokenizer's name as a .mtok file keeps it: 24 bytes at most."""
    return name.encode()[:24].decode(errors="ignore")


def _load(source: str, device: str | None):
    """A model that is only ever used."""
    model = load(source, device=device)
    if hasattr(model, "pack_network"):
        model.pack_network()
    return model


def _kind(class_name: str) -> str:
    if class_name in KINDS:
        return KINDS[class_name]
    return GENERATOR if CLASSES.get(class_name, "").startswith("generators.") else TOKENIZER


def _class_name(config: Path) -> str:
    try:
        return str(json.loads(config.read_text()).get("_class_name", "unknown class"))[:40]
    except (OSError, ValueError, AttributeError):
        return "unreadable config"
