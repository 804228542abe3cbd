"""SEED: pictures to ids, ids to an embedding and to pictures, with the small image decoder and with Stable unCLIP."""

import json

import mediatok as mt
import pytest
import torch
from mediatok.tokenizers.image.drawing import EmbeddingDecoder, checked_drawing
from mediatok.tokenizers.image.kl_vae import KLAutoencoder
from mediatok.tokenizers.image.seed import Seed
from mediatok.tokenizers.image.stable_unclip import StableUnCLIP
from PIL import Image

SIZES = {
    "image_size": 16, "patch_size": 4, "vision_width": 24, "vision_depth": 2, "vision_heads": 2, "vision_hidden": 32,
    "num_queries": 6, "qformer_width": 24, "qformer_depth": 3, "qformer_heads": 2, "qformer_hidden": 32,
    "codebook_size": 50, "token_size": 4, "decoder_depth": 1, "decoder_heads": 3, "head_widths": (8, 6, 4),
    "embedding_size": 24,
}  # fmt: skip
DRAWING = {"latent_channels": 2, "grid": 4, "width": 12, "depth": 2, "num_heads": 2}


def build(seed=0, **changes):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Seed(**SIZES | changes).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.ndim > 1 or name.startswith("drawing.out"):
                    parameter.normal_(std=max(parameter[0].numel(), 1) ** -0.5)
            pixels = torch.rand(40, 3, 16, 16)
            rows = model.to_code(model.query_features(model.normalized(pixels))).flatten(0, 1)
            model.quantize.embedding.weight.copy_(rows[torch.randperm(len(rows))[: model.vocab_size]])
    model.name = "small-seed"
    return model


@pytest.fixture(scope="module")
def seed():
    return build()


@pytest.fixture(scope="module")
def autoencoder():
    torch.manual_seed(0)
    sizes = {"image_size": 16, "latent_channels": 2, "block_out_channels": (8, 8, 8), "norm_num_groups": 4}
    return KLAutoencoder(**sizes, layers_per_block=1, encoder_attention=False, scaling_factor=1.0).eval()


@pytest.fixture(scope="module")
def drawing_seed(autoencoder):
    model = build(drawing_sizes=DRAWING)
    model.drawing.use_autoencoder(autoencoder)
    return model


@pytest.fixture
def pixels():
    return torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(5))


def test_ids_and_embeddings(seed, pixels):
    ids = seed.encode_pixels(pixels)
    assert ids.shape == (3, 6)
    assert ids.dtype == torch.int64
    assert len(ids.unique()) > 5
    assert torch.equal(ids, torch.cat([seed.encode_pixels(one[None]) for one in pixels]))
    embedding = seed.decode_embedding(ids)
    assert embedding.shape == (3, 24)
    assert embedding.dtype == torch.float32
    assert (embedding[0] - embedding[1]).abs().max() > 1e-3


def test_queries_are_causal(seed, pixels):
    """What a query finds does not depend on the queries behind it."""
    with torch.no_grad():
        features = seed.vision(seed.normalized(pixels))[1]
        found = seed.qformer(seed.queries, features)
        changed = seed.queries.clone()
        changed[4:] = changed[4:].flip(-1)  # another constant would vanish in the norm
        again = seed.qformer(changed, features)
        fewer = seed.qformer(seed.queries[:3], features)
    torch.testing.assert_close(found[:, :4], again[:, :4], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(found[:, :3], fewer, atol=1e-6, rtol=1e-5)
    assert (found[:, 4:] - again[:, 4:]).abs().max() > 1e-3


def test_bfloat16(pixels):
    model = build().cast(torch.bfloat16)
    assert model.quantize.embedding.weight.dtype == model.to_code[0].weight.dtype == torch.float32
    ids = model.encode_pixels(pixels)
    assert (ids == build().encode_pixels(pixels)).float().mean() > 0.5
    embedding = model.decode_embedding(ids)
    torch.testing.assert_close(embedding, build().decode_embedding(ids), atol=0.05, rtol=0.05)


def test_pictures_are_stretched(seed):
    tall = Image.new("RGB", (10, 40), "white")
    tall.paste("black", (0, 0, 10, 20))
    square = seed.fit(tall)
    assert square.size == (16, 16)
    assert square.getpixel((8, 1)) == (0, 0, 0)
    assert square.getpixel((8, 14))[0] == 255
    tokens = seed.encode([tall, square])
    assert len(tokens) == 2
    assert (tokens.frames[0].width, tokens.frames[0].height) == (10, 40)
    with pytest.raises(mt.InvalidInput, match="without tile"):
        seed.encode(tall, tile=True)
    seed.interpolation = "nearest"
    with pytest.raises(mt.InvalidInput, match="bilinear, bicubic"):
        seed.encode(tall)
    del seed.interpolation


def test_small_decoder_draws(drawing_seed, pixels):
    tokens = drawing_seed.encode(list(pixels))
    steps = []
    pictures = drawing_seed.decode(tokens, steps=3, as_tensor=True, on_step=lambda *args, **_: steps.append(args))
    assert len(pictures) == 3
    assert pictures[0].shape == (3, 16, 16)
    assert steps == [(3, 9), (6, 9), (9, 9)]  # three of each of three pictures, which go together
    alone = drawing_seed.decode(tokens[1], steps=3, as_tensor=True)
    torch.testing.assert_close(alone, pictures[1], atol=1e-5, rtol=0)  # whatever the batch
    assert (pictures[0] - pictures[1]).abs().max() > 1e-3
    for changed in ({"seed": 1}, {"guidance": 5.0}, {"steps": 9}):
        other = drawing_seed.decode(tokens[1], **{"steps": 3, "as_tensor": True} | changed)
        assert (other - alone).abs().max() > 1e-3
    ids = tokens.ids[1:2]
    seen = []
    with_previews = drawing_seed.decode(
        tokens, steps=3, as_tensor=True, previews=True, on_step=lambda step, total, preview=None: seen.append(preview)
    )
    assert all(torch.equal(a, b) for a, b in zip(with_previews, pictures, strict=True))
    shown = [preview for preview in seen if preview is not None]
    assert len(shown) == 3
    assert torch.equal(shown[-1], pictures[-1])  # the last step's is the result
    assert all(preview.shape == pictures[0].shape and 0 <= preview.min() <= preview.max() <= 1 for preview in shown)
    assert not torch.equal(shown[0], shown[1])
    own = drawing_seed.decode_ids(ids, drawing=checked_drawing(drawing_seed.drawing, 3))
    other = drawing_seed.decode_ids(ids, drawing=checked_drawing(drawing_seed.drawing, 3), negative_ids=tokens.ids[:1])
    assert (own - other).abs().max() > 1e-4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps=0"), ({"steps": 1.5}, "steps"), ({"guidance": float("nan")}, "guidance"),
        ({"guidance": "a"}, "guidance"), ({"seed": -1}, "seed"), ({"step": 3}, "no option 'step'"),
        ({"text": "a cat"}, "takes no text"),
    ],
)  # fmt: skip
def test_bad_drawing_options(drawing_seed, pixels, options, message):
    tokens = drawing_seed.encode(list(pixels))
    with pytest.raises(mt.InvalidInput, match=message):
        drawing_seed.decode(tokens, **options)


def test_bad_ids(seed, drawing_seed):
    with pytest.raises(mt.InvalidInput, match="always uses 6"):
        seed.decode_embedding(torch.zeros(1, 5, dtype=torch.int64))
    with pytest.raises(mt.InvalidInput, match=r"\[0, 50\)"):
        seed.decode_embedding(torch.full((1, 6), 50))
    zeros = torch.zeros(3, 6, dtype=torch.int64)
    with pytest.raises(mt.InvalidInput, match="2 rows of negative_ids for 3"):
        drawing_seed.decode_ids(zeros, negative_ids=zeros[:2])


def test_missing_decoder_names_the_path(seed, pixels, monkeypatch, tmp_path):
    tokens = seed.encode(list(pixels))  # needs none
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    seed.image_decoder = str(tmp_path / "nowhere")
    with pytest.raises(mt.ModelNotFound, match=r"nowhere.*sd2-community/stable-diffusion-2-1-unclip.*image_decoder"):
        seed.decode(tokens)
    seed.image_decoder = tmp_path
    with pytest.raises(mt.InvalidCheckpoint, match="no folder image_normalizer"):
        seed.decode(tokens)
    del seed.image_decoder


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head": "linear"}, "mlp, qformer"), ({"vision_width": 25}, "25"), ({"image_size": 18}, "multiple"),
        ({"vision_depth": 10**9}, "depth"), ({"qformer_width": 2**40}, "width"), ({"codebook_size": 0}, "codebook"),
        ({"head_widths": (1, 2)}, "three"), ({"head_widths": (1, 2, "a")}, "head_widths"),
        ({"decoder_heads": 5}, "decoder_heads"), ({"drawing_sizes": {"widht": 3}}, "width"),
        ({"drawing_sizes": {"width": 10, "num_heads": 3}}, "3 heads"), ({"drawing_sizes": 3}, "mapping"),
    ],
)  # fmt: skip
def test_bad_sizes(changes, message):
    with torch.device("meta"), pytest.raises(mt.InvalidInput, match=message):
        Seed(**SIZES | changes)


def test_saved_and_loaded(drawing_seed, autoencoder, pixels, tmp_path):
    drawing_seed.save_pretrained(tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["drawing_sizes"] == DRAWING
    assert config["_class_name"] == "Seed"
    again = mt.load(tmp_path / "model")
    assert again.fingerprint == drawing_seed.fingerprint
    again.drawing.use_autoencoder(autoencoder)
    ids = again.encode_pixels(pixels)
    assert torch.equal(ids, drawing_seed.encode_pixels(pixels))
    torch.testing.assert_close(again.decode_ids(ids), drawing_seed.decode_ids(ids))


def test_other_autoencoders_are_refused(autoencoder):
    decoder = EmbeddingDecoder(8, latent_channels=3, grid=4, width=8, depth=1, num_heads=1)
    with pytest.raises(mt.TokenizerMismatch, match=r"\(3, 4, 4\)"):
        decoder.use_autoencoder(autoencoder)
    decoder = EmbeddingDecoder(8, **DRAWING, autoencoder="kl-tiny", autoencoder_fingerprint="0" * 16)
    with pytest.raises(mt.TokenizerMismatch, match="kl-tiny"):
        decoder.use_autoencoder(autoencoder)
    with pytest.raises(mt.InvalidInput, match="names no autoencoder"):
        _ = EmbeddingDecoder(8, **DRAWING).autoencoder


# Stable unCLIP from a folder as diffusers saves it, without the vision tower.

TEXT = {
    "vocab_size": 16, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    "max_position_embeddings": 8, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip


@pytest.fixture(scope="module")
def unclip_folder(tmp_path_factory):
    import diffusers
    from diffusers.pipelines.stable_diffusion import StableUnCLIPImageNormalizer
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("unclip")
    blocks = ("DownBlock2D", "UpBlock2D")
    unet = diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(8,), layers_per_block=1, down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",), cross_attention_dim=16, attention_head_dim=2, norm_num_groups=4,
        class_embed_type="projection", projection_class_embeddings_input_dim=48,
    )  # fmt: skip
    vae = diffusers.AutoencoderKL(
        down_block_types=tuple(f"{blocks[0][:-7]}EncoderBlock2D" for _ in range(2)),
        up_block_types=tuple(f"{blocks[1][:-7]}DecoderBlock2D" for _ in range(2)), block_out_channels=(4, 4),
        layers_per_block=1, norm_num_groups=2,
    )  # fmt: skip
    schedule = {"beta_schedule": "scaled_linear", "prediction_type": "v_prediction", "steps_offset": 1}
    parts = {
        "unet": unet, "vae": vae, "text_encoder": CLIPTextModel(CLIPTextConfig(**TEXT)),
        "image_normalizer": StableUnCLIPImageNormalizer(24),
        "scheduler": diffusers.PNDMScheduler(skip_prk_steps=True, **schedule),
        "image_noising_scheduler": diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
    }  # fmt: skip
    for part, module in parts.items():
        module.save_pretrained(folder / part)
    tokens = ["!", "<|startoftext|>", "<|endoftext|>", *"abcdefghij", "a</w>", "b</w>", "ab</w>"]
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "tokenizer" / "merges.txt").write_text("#version: 0.2\na b</w>\n")
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 8, "pad_token": "!"}
    (folder / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def test_unclip_draws(seed, unclip_folder, pixels):
    model = build()
    model.image_decoder = unclip_folder
    tokens = model.encode(list(pixels))
    pictures = model.decode(tokens, steps=2, as_tensor=True)
    assert pictures[0].shape == (3, 16, 16)
    assert (pictures[0] - pictures[1]).abs().max() > 1e-4
    alone = model.decode(tokens[1], steps=2, as_tensor=True)
    torch.testing.assert_close(alone, pictures[1], atol=1e-4, rtol=0)
    assert (model.decode(tokens[1], steps=2, seed=3, as_tensor=True) - alone).abs().max() > 1e-3
    calls = []
    drawing = checked_drawing(model.image_decoder, 2)
    negative = model.decode_ids(tokens.ids[:1], None, drawing, tokens.ids[2:3], lambda *args, **_: calls.append(args))
    assert calls == [(1, 3), (2, 3), (3, 3)]  # one call more than steps, with this scheduler
    assert (negative - pictures[0]).abs().max() > 1e-5


def test_unclip_of_another_size(unclip_folder, pixels):
    model = build(embedding_size=20)
    model.image_decoder = unclip_folder
    with pytest.raises(mt.InvalidInput, match=r"20 channels.*24"):
        model.decode(model.encode(list(pixels)))


def test_unclip_folder_names_no_code(unclip_folder, tmp_path):
    import shutil

    folder = tmp_path / "bad"
    shutil.copytree(unclip_folder, folder)
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(path.read_text().replace("PNDMScheduler", "FlaxPNDMScheduler"))
    with pytest.raises(mt.InvalidCheckpoint, match="names the scheduler"):
        StableUnCLIP.load(folder)
    path = folder / "unet" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"_target_": "os.system"}))
    with pytest.raises(mt.InvalidCheckpoint, match="names code"):
        StableUnCLIP.load(folder)
