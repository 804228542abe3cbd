"""Which models there are, and how a name, a folder or a hub id becomes one.

The table names our own classes; nothing that a file says is ever imported.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path

from .errors import InvalidCheckpoint, InvalidInput, ModelNotFound, nearest_names

PRETRAINED = Path(__file__).parent.parent / "pretrained"
DTYPES = ("float32", "bfloat16")
WEIGHTS = "diffusion_pytorch_model.safetensors"  # as `save_pretrained` names them
TEXT_FILES = ("tokenizer.json", "tokenizer.model")  # of models that read text with a tokenizer in their folder
HUB_PATTERNS = [
    "*.json", "*.yaml", "*.yml", "*.safetensors", "*.bin", "*.ckpt", "*.pt", "*.pb", "*.mvn", "*.model", "tokens.txt"
]  # fmt: skip
# One of them tells a whole download.
CACHED_FILES = (
    "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "gense.yaml", "am.mvn",
    "seed_quantizer.pt",
)  # fmt: skip

# Class name in our config.json -> module below the package.
CLASSES = {
    "TiTok": "tokenizers.image.titok",
    "OneDPiece": "tokenizers.image.one_d_piece",
    "MaskGitVQGAN": "tokenizers.image.maskgit_vqgan",
    "KLAutoencoder": "tokenizers.image.kl_vae",
    "FlexTok": "tokenizers.image.flextok",
    "TokenFlow": "tokenizers.image.tokenflow",
    "Seed": "tokenizers.image.seed",
    "MaskGIT": "generators.maskgit",
    "XAR": "generators.xar",
    "NextScale": "generators.next_scale",
    "NextToken": "generators.next_token",
    "NextScaleLlama": "generators.next_scale_llama",
    "SeedLLaMA": "generators.seed_llama",
    "VAT": "tokenizers.shape.vat",
    "SemanticTokenizer": "tokenizers.speech.semantic",
    "SimCodec": "tokenizers.speech.simcodec",
    "Paraformer": "generators.paraformer",
    "GenSE": "generators.gense",
    "Speak": "generators.speak",
}


@dataclass(frozen=True)
class ModelEntry:
    """A model that `load` or `create` knows by name.

    parameters: exact count. hub_id: where the authors' weights are; None for models that ship with the package.
    hub_file: the one file to take from a hub repository that holds several models.
    elsewhere: for released weights that no hub has, where they are.
    """

    name: str
    class_name: str
    licence: str
    parameters: int
    description: str
    hub_id: str | None = None
    hub_file: str | None = None
    elsewhere: str | None = None
    kind: str = "tokenizer"
    modality: str = "image"

    @property
    def folder(self) -> Path:
        """Where the weights of a shipped model lie."""
        return PRETRAINED / self.name

    @property
    def is_shipped(self) -> bool:
        return self.hub_id is None and self.elsewhere is None

    @property
    def status(self) -> str:
        """ "shipped", "downloaded" (in the hub's cache) or "needs download"."""
        if self.is_shipped:
            return "shipped"
        if self.hub_id is None:
            return "needs download"
        from huggingface_hub import try_to_load_from_cache

        cached = any(
            isinstance(try_to_load_from_cache(self.hub_id, file), str)
            for file in ([self.hub_file] if self.hub_file else CACHED_FILES)
        )
        return "downloaded" if cached else "needs download"


def _titok(name: str, parameters: int, rfid: str) -> ModelEntry:
    author = "turkeyju" if name.startswith("tatitok") else "yucornetto"
    suffix = "" if name.startswith("tatitok") else "_imagenet"
    text = "text-aware, " if name.startswith("tatitok") else ""
    return ModelEntry(
        name, "TiTok", "Apache-2.0", parameters, f"{text}256 px, authors' rFID {rfid}",
        hub_id=f"{author}/tokenizer_{name.replace('-', '_')}{suffix}",
    )  # fmt: skip


ENTRIES = {
    entry.name: entry
    for entry in (
        ModelEntry("titok-tiny", "TiTok", "Apache-2.0", 1_730_720, "64 px, 64 tokens; for trying things out"),
        ModelEntry("one-d-piece-tiny", "OneDPiece", "Apache-2.0", 1_730_720, "64 px, 1 to 64 tokens; for trying out"),
        ModelEntry("kl-tiny", "KLAutoencoder", "Apache-2.0", 2_806_011, "64 px, continuous 8x8x8 latents"),
        ModelEntry(
            "maskgit-tiny", "MaskGIT", "Apache-2.0", 4_096_336, "64 px emoji, over titok-tiny", kind="generator"
        ),
        ModelEntry("xar-tiny", "XAR", "Apache-2.0", 3_838_184, "64 px emoji, over kl-tiny", kind="generator"),
        ModelEntry(
            "flextok-tiny", "FlexTok", "Apache-2.0", 7_448_711, "64 px, 1 to 64 tokens; a flow over kl-tiny's latents"
        ),
        ModelEntry(
            "flexar-tiny", "NextToken", "Apache-2.0", 2_973_184, "64 px emoji, over flextok-tiny", kind="generator"
        ),
        ModelEntry(
            "tokenflow-tiny", "TokenFlow", "Apache-2.0", 3_083_339,
            "64 px, 130 tokens over 6 scales, with what they mean"
        ),
        ModelEntry(
            "seed-tiny", "Seed", "Apache-2.0", 5_060_552, "64 px, 32 ids of what a picture shows; draws over kl-tiny"
        ),
        ModelEntry(
            "tokenflow-t2i-tiny", "NextScaleLlama", "Apache-2.0", 2_430_464, "64 px emoji by name, over tokenflow-tiny",
            kind="generator",
        ),
        ModelEntry(
            "simcodec-tiny", "SimCodec", "Apache-2.0", 3_447_025, "speech at 16 kHz, 0.6 kbps; one Russian voice",
            modality="speech",
        ),
        ModelEntry(
            "semantic-tiny", "SemanticTokenizer", "Apache-2.0", 2_165_936,
            "what is said, 50 ids a second; one Russian voice",
            modality="speech",
        ),
        ModelEntry(
            "paraformer-tiny", "Paraformer", "Apache-2.0", 3_238_865, "Russian characters; one voice",
            kind="generator", modality="speech",
        ),
        ModelEntry(
            "gense-tiny", "GenSE", "Apache-2.0", 3_437_280, "takes noise off speech; one Russian voice",
            kind="generator", modality="speech",
        ),
        ModelEntry(
            "speak-tiny", "Speak", "Apache-2.0", 3_643_297, "reads Russian texts aloud; one voice",
            kind="generator", modality="speech",
        ),
        ModelEntry(
            "vat-tiny", "VAT", "Apache-2.0", 3_478_849, "3D shapes, 424 tokens over 9 scales (636 bytes); furniture",
            modality="shape",
        ),
        ModelEntry(
            "vat-gen-tiny", "NextScale", "Apache-2.0", 2_017_052, "3D furniture by name, over vat-tiny",
            kind="generator", modality="shape",
        ),
        _titok("titok-l32", 641_054_735, "2.21"),
        _titok("titok-b64", 204_814_095, "1.70"),
        _titok("titok-s128", 83_674_639, "1.71"),
        _titok("titok-bl64-vq8k", 390_016_148, "2.06"),
        _titok("titok-bl128-vq8k", 390_179_988, "1.49"),
        _titok("titok-sl256-vq8k", 330_260_884, "1.03"),
        _titok("titok-ll32-vae-c16", 606_879_604, "1.61"),
        _titok("titok-bl64-vae-c16", 389_418_100, "1.25"),
        _titok("titok-bl128-vae-c16", 389_581_940, "0.84"),
        _titok("tatitok-bl32-vq", 390_800_532, "3.95"),
        _titok("tatitok-bl64-vq", 390_882_452, "2.43"),
        _titok("tatitok-bl128-vq", 391_046_292, "1.53"),
        _titok("tatitok-bl32-vae", 390_202_484, "1.53"),
        _titok("tatitok-bl64-vae", 390_284_404, "1.47"),
        _titok("tatitok-sl128-vae", 330_275_188, "0.90"),
        *(
            ModelEntry(
                f"one-d-piece-{size.lower()}256", "OneDPiece", "Apache-2.0", parameters,
                f"256 px, 1 to 256 tokens, authors' rFID {rfid} at 256",
                hub_id=f"turing-motors/One-D-Piece-{size}-256",
            )
            for size, parameters, rfid in (
                ("S", 83_871_247, "1.48"), ("B", 205_256_463, "1.11"), ("L", 641_742_863, "1.08")
            )
        ),
        ModelEntry(
            "maskgit-vqgan", "MaskGitVQGAN", "Apache-2.0", 54_515_587, "256 px, 16x16 codes (TiTok's proxies)",
            hub_id="fun-research/TiTok", hub_file="maskgit-vqgan-imagenet-f16-256.bin",
        ),
        ModelEntry(
            "kl16", "KLAutoencoder", "unspecified", 66_456_019, "256 px, continuous 16x16x16 latents (xAR's, of MAR)",
            elsewhere="kl16.ckpt is behind the link in the download script of github.com/LTH14/mar",
        ),
        *(
            ModelEntry(
                f"flextok-{name}", "FlexTok", "Apple Machine Learning Research Model", parameters,
                f"256 px, 1 to 256 tokens of 64,000 codes, flow decoder; trained on {data}",
                hub_id=f"EPFL-VILAB/flextok_{name.replace('-', '_')}",
            )
            for name, data, parameters in (
                ("d12-d12-in1k", "ImageNet", 341_651_737), ("d18-d18-in1k", "ImageNet", 949_734_553),
                ("d18-d28-in1k", "ImageNet", 2_540_882_841), ("d18-d28-dfn", "DFN", 2_540_882_841),
            )
        ),
        ModelEntry(
            "tokenflow-b", "TokenFlow", "MIT", 376_569_643,
            "256 px, 817 tokens over 9 scales, semantic and pixel codes, enhanced decoder; authors' rFID 1.37",
            hub_id="ByteFlow-AI/TokenFlow", hub_file="tokenflow_clipb_32k_enhanced.pt",
        ),
        ModelEntry(
            "tokenflow-xl", "TokenFlow", "MIT", 523_529_803,
            "384 px, 2227 tokens over 15 scales, semantic and pixel codes; authors' rFID 0.63",
            hub_id="ByteFlow-AI/TokenFlow", hub_file="tokenflow_siglip_32k.pt",
        ),
        *(
            ModelEntry(
                f"vat-{tokens}", "VAT", "unspecified", parameters,
                f"3D shapes, {tokens} tokens of 14 bits over {scales} scales, as far as the paper tells",
                elsewhere="its authors have published neither code nor weights (recipes/vat-680.yaml trains it)",
                modality="shape",
            )
            for tokens, scales, parameters in (
                (680, 10, 184_380_737), (1256, 11, 184_875_361), (2280, 12, 185_566_593)
            )
        ),
        *(
            ModelEntry(
                f"simcodec-{rate}hz", "SimCodec", "unspecified", parameters,
                f"speech at 16 kHz, {rate} tokens a second of 13 bits; widths assumed, as the authors published none",
                elsewhere="the authors of github.com/yaoxunji/gen-se have not published them with their code",
                modality="speech",
            )
            for rate, parameters in ((50, 66_748_225), (100, 65_240_897))
        ),
        *(
            ModelEntry(
                f"hifi-codec-{name}", "SimCodec", "unspecified", parameters, f"speech at {kbps} kbps, four codebooks",
                hub_id="Dongchao/AcademiCodec", hub_file=file, modality="speech",
            )
            for name, file, kbps, parameters in (
                ("16k-320d", "HiFi-Codec-16k-320d", 2, 63_602_497),
                ("16k-320d-large-universal", "HiFi-Codec-16k-320d-large-universal", 2, 63_602_497),
                ("24k-320d", "HiFi-Codec-24k-320d", 3, 63_602_497),
                ("24k-240d", "HiFi-Codec-24k-240d", 4, 63_586_113),
            )
        ),
        ModelEntry(
            "semantic-wavlm-large", "SemanticTokenizer", "CC-BY-SA-3.0", 89_756_816,
            "speech, 50 tokens a second: WavLM-Large's first 6 layers; clusters are fitted or come with gense",
            hub_id="microsoft/wavlm-large", modality="speech",
        ),
        ModelEntry(
            "semantic-xls-r-300m", "SemanticTokenizer", "Apache-2.0", 89_752_064,
            "speech, 50 tokens a second: XLS-R's first 6 layers; clusters are fitted",
            hub_id="facebook/wav2vec2-xls-r-300m", modality="speech",
        ),
        ModelEntry(
            "gense", "GenSE", "unspecified", 319_096_832,
            "speech enhancement at 16 kHz; the authors' files hold its tokenizers, too, and state no licence",
            hub_id="yaoxunji/gense", kind="generator", modality="speech",
        ),
        *(
            ModelEntry(
                name, "Paraformer", "FunASR Model License 1.1", parameters, description, hub_id=hub_id,
                elsewhere=None if hub_id else f"download the folder {folder} from modelscope.cn",
                kind="generator", modality="speech",
            )
            for name, parameters, description, hub_id, folder in (
                ("paraformer", 220_084_533, "Chinese speech to text, 16 kHz", "funasr/paraformer-zh", ""),
                (
                    "paraformer-long", 225_074_998, "Chinese speech to text with time stamps", None,
                    "iic/speech_paraformer-large-vad-punc_asr_nat-zh-cn-16k-common-vocab8404-pytorch",
                ),
                (
                    "paraformer-zh", 247_339_018, "Chinese speech to text with time stamps and hotwords", None,
                    "iic/speech_seaco_paraformer_large_asr_nat-zh-cn-16k-common-vocab8404-pytorch",
                ),
                ("paraformer-en", 226_731_398, "English speech to text with time stamps", "funasr/paraformer-en", ""),
            )
        ),
        *(
            ModelEntry(
                f"maskgit-titok-{variant}", "MaskGIT", "Apache-2.0", parameters,
                f"ImageNet 256 px over titok-{variant}, authors' gFID {fid}",
                hub_id=f"yucornetto/generator_titok_{variant}_imagenet", kind="generator",
            )
            for variant, parameters, fid in (
                ("l32", 177_200_896, "2.77"), ("b64", 177_225_472, "2.48"), ("s128", 294_990_848, "1.97")
            )
        ),
        *(
            ModelEntry(
                f"maskgit-one-d-piece-{size.lower()}256", "MaskGIT", "Apache-2.0", 177_372_928,
                f"ImageNet 256 px over one-d-piece-{size.lower()}256, authors' gFID {fid}",
                hub_id=f"turing-motors/MaskGIT_One-D-Piece-{size}-256", kind="generator",
            )
            for size, fid in (("S", "2.67"), ("B", "2.70"), ("L", "2.35"))
        ),
        ModelEntry(
            "seed-2", "Seed", "Apache-2.0", 1_150_053_440,
            "224 px to 32 ids that tell what a picture shows; vision tower (BSD-3) and image decoder come apart",
            hub_id="AILab-CVC/seed-tokenizer-2",
        ),
        *(
            ModelEntry(
                f"seed-llama-{size}-{stage}", "SeedLLaMA", "Llama 2", parameters,
                f"reads and writes texts with pictures over seed-2{', instructed' if stage == 'sft' else ''}",
                hub_id=f"AILab-CVC/seed-llama-{size}-{stage}", kind="generator",
            )
            for size, parameters in (("8b", 6_805_540_864), ("14b", 13_099_770_880)) for stage in ("pretrain", "sft")
        ),
        ModelEntry(
            "tokenflow-t2i", "NextScaleLlama", "Apache-2.0", 7_027_204_096,
            "text to 256 px, whole scales over tokenflow-b; authors' GenEval 0.55",
            hub_id="ByteFlow-AI/TokenFlow-t2i", kind="generator",
        ),
        *(
            ModelEntry(
                f"flexar-{size.lower()}-{kind.lower()}", "NextToken", "unspecified", parameters,
                f"{'text' if kind == 'T2I' else 'ImageNet classes'} to 1 to 256 FlexTok tokens; sizes partly assumed",
                hub_id=f"EPFL-VILAB/FlexAR-{size}-{kind}", kind="generator",
            )
            for size, kind, parameters in (
                ("113M", "T2I", 217_546_240), ("382M", "T2I", 536_579_584), ("1B", "T2I", 1_372_977_408),
                ("3B", "T2I", 3_362_324_992), ("1B", "C2I", 1_079_029_120),
            )
        ),
        *(
            ModelEntry(
                f"xar-{size.lower()}", "XAR", "unspecified", parameters,
                f"ImageNet 256 px over kl16, authors' FID {fid}",
                hub_id="OliverRen/xAR", hub_file=f"xAR-{size}.pth", kind="generator",
            )
            for size, parameters, fid in (
                ("B", 172_638_224, "1.72"), ("L", 608_397_968, "1.28"), ("H", 1_186_024_096, "1.24")
            )
        ),
    )
}  # fmt: skip


def models() -> list[ModelEntry]:
    """All models known by name: shipped ones first, then the authors' releases."""
    return list(ENTRIES.values())


def find_entry(name: str) -> ModelEntry | None:
    """The entry of a name ("titok_s128" and "titok-s128" are the same) or of a hub id; None if there is none."""
    entry = ENTRIES.get(name.lower().replace("_", "-"))
    return entry or next((e for e in ENTRIES.values() if e.hub_id == name and e.hub_file is None), None)


def model_class(class_name: str) -> type:
    """The class of ours with that name."""
    if class_name not in CLASSES:
        raise InvalidCheckpoint(f"{class_name!r} is not a mediatok model class.{nearest_names(class_name, CLASSES)}")
    return getattr(importlib.import_module(f"..{CLASSES[class_name]}", __package__), class_name)


def create(name: str, *, device: str | None = None, dtype: str = "float32", seed: int | None = None):
    """Build a known model at its full size with random weights; nothing is downloaded.

    Args:
        name: a name from `models()`.
        device: as `load` takes it.
        dtype: "float32" or "bfloat16".
        seed: makes the weights reproducible.

    Raises:
        ModelNotFound: unknown name.
        InvalidInput: a dtype or device that cannot be used.
    """
    import torch

    entry = find_entry(name)
    if entry is None:
        raise ModelNotFound(f"unknown model {name!r}.{nearest_names(name, ENTRIES)} See mediatok.models().")
    torch_dtype, torch_device = _torch_dtype(dtype), _torch_device(device)
    with torch.random.fork_rng(enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        model = model_class(entry.class_name)(**constructor_arguments(entry))
    model.name = entry.name
    return model.cast(torch_dtype).to(torch_device).eval()


def constructor_arguments(entry: ModelEntry) -> dict:
    """What the class of `entry` is built with: its shipped config, or the published sizes."""
    if entry.is_shipped:
        config = _read_config(entry.folder)
        return {key: value for key, value in config.items() if not key.startswith("_")}
    module = importlib.import_module(f"..{CLASSES[entry.class_name]}", __package__)
    return module.released_configs()[entry.name]


def load(name_or_path: str | Path, *, device: str | None = None, dtype: str = "float32"):
    """Load a model with its weights.

    Args:
        name_or_path: a name from `models()`, a local folder in our layout or in the authors', a released `.bin` or
            `.safetensors` file, or a hub id ("owner/repository").
        device: "cpu", "cuda" ... (default "cpu").
        dtype: "float32" or "bfloat16"; nearest codes are always searched in fp32.

    Raises:
        ModelNotFound: unknown name, or weights that are neither here nor reachable.
        InvalidCheckpoint: weights or a config that do not fit, or that try to name code.
        InvalidInput: a dtype or device that cannot be used.
    """
    torch_dtype, torch_device = _torch_dtype(dtype), _torch_device(device)
    path, entry = Path(name_or_path), find_entry(str(name_or_path))
    if entry is None and path.exists():
        model = _load_path(path)
    elif entry is not None and entry.is_shipped:
        model = _load_folder(entry.folder)
        model.name = entry.name
    elif entry is not None and entry.hub_id is None:
        raise ModelNotFound(
            f"{entry.name} is on no hub: {entry.elsewhere}. Pass the downloaded file instead of the name."
        )
    elif entry is not None or _looks_like_hub_id(str(name_or_path)):
        hub_id = entry.hub_id if entry else str(name_or_path)
        model = _load_path(_download(hub_id, entry.hub_file if entry else None), entry)
        model.name = entry.name if entry else hub_id
    else:
        hint = nearest_names(str(name_or_path), ENTRIES)
        raise ModelNotFound(f"{str(name_or_path)!r} is neither a known model nor a file or folder here.{hint}")
    return model.cast(torch_dtype).to(torch_device).eval()


def _load_path(path: Path, entry: ModelEntry | None = None):
    if path.is_dir() and (path / "config.json").is_file() and _names_our_class(path):
        return _load_folder(path)
    from ..convert import load_official

    return load_official(path, name=entry.name if entry else None)


def _load_folder(folder: Path):
    """A folder in our layout: config.json with `_class_name`, and safetensors weights, which must fit it exactly."""
    from .compact import COMPACT_WEIGHTS, expand
    from .strict import build
    from .weights import inside, read_state_dict

    config = _read_config(folder)
    cls = model_class(str(config.get("_class_name")))
    index = f"{WEIGHTS}.index.json"
    if (folder / COMPACT_WEIGHTS).is_file():
        weights = expand(read_state_dict(inside(folder, COMPACT_WEIGHTS), numbers_only=False))
        weights |= _borrowed(inside(folder, COMPACT_WEIGHTS))
    else:
        weights = read_state_dict(inside(folder, index if (folder / index).is_file() else WEIGHTS))
    model = build(cls, {key: value for key, value in config.items() if not key.startswith("_")}, weights)
    model.folder = folder.resolve()
    model.name = model.folder.name
    if hasattr(model, "use_text") and any((folder / file).is_file() for file in TEXT_FILES):
        model.use_text(folder)
    return model


def _borrowed(path: Path) -> dict:
    """What a compact file leaves to shipped models: the weights of the parts that its header names with their lenders.

    Raises:
        InvalidCheckpoint: a lender that is no shipped model, or another one by now.
    """
    from safetensors import safe_open

    from .compact import BORROWED, borrowed_parts

    with safe_open(path, "pt") as file:
        parts = borrowed_parts((file.metadata() or {}).get(BORROWED, "{}"), path)
    weights = {}
    for part, (name, fingerprint) in parts.items():
        entry = find_entry(name)
        if entry is None or not entry.is_shipped:
            raise InvalidCheckpoint(f"{path} leaves {part!r} to {name!r}, which is no shipped model")
        lender = load(name)
        if lender.fingerprint != fingerprint:
            raise InvalidCheckpoint(
                f"{path} leaves {part!r} to {name} with the fingerprint {fingerprint}, and here it is "
                f"{lender.fingerprint}: install the version of mediatok that the folder was made with"
            )
        weights |= {f"{part}.{key}": value for key, value in lender.state_dict().items()}
    return weights


def _names_our_class(folder: Path) -> bool:
    """Whether a folder's config.json is ours, by its `_class_name`; what else it says is checked when it is read."""
    from .weights import MAX_CONFIG_BYTES, inside, read_json

    return "_class_name" in read_json(inside(folder, "config.json"), MAX_CONFIG_BYTES)


def _read_config(folder: Path) -> dict:
    from .weights import inside, read_config

    return read_config(inside(folder, "config.json"))


def _looks_like_hub_id(name: str) -> bool:
    parts = name.split("/")
    return len(parts) == 2 and all(part and not part.startswith((".", "-")) for part in parts)


def _download(hub_id: str, file: str | None) -> Path:
    from huggingface_hub import hf_hub_download, snapshot_download

    try:
        if file is not None:
            return Path(hf_hub_download(hub_id, file))
        return Path(snapshot_download(hub_id, allow_patterns=HUB_PATTERNS))
    except Exception as error:  # huggingface_hub raises many kinds: no network, no such repository, gated ...
        raise ModelNotFound(
            f"the weights of {hub_id} could not be downloaded ({error.__class__.__name__}). Download the repository "
            "where there is a network and pass its folder instead of the name."
        ) from error


def _torch_dtype(dtype: str):
    import torch

    if dtype not in DTYPES:
        raise InvalidInput(f"dtype must be one of {', '.join(DTYPES)}, not {dtype!r}")
    return getattr(torch, dtype)


def _torch_device(device: str | None):
    """A device that torch knows and that is here; found out before anything is read or downloaded."""
    import torch

    if device is None:
        return torch.device("cpu")
    try:
        return torch.empty(0, device=device).device
    except Exception as error:  # every backend has its own kind
        hint = f"this machine has {torch.cuda.device_count()} CUDA devices"
        raise InvalidInput(f"device={device!r} cannot be used here ({hint}); use device='cpu'") from error
