"""TiTok's own promises beside parity: continuous and text-aware variants, the two stages, gradient paths."""

import mediatok as mt
import pytest
import torch
from mediatok.tokenizers.image.maskgit_vqgan import MaskGitVQGAN
from mediatok.tokenizers.image.one_d_piece import OneDPiece
from mediatok.tokenizers.image.titok import TiTok

PIXELS = {"pixel_channels": 32, "pixel_multipliers": (1, 1), "pixel_res_blocks": 1, "pixel_embed_dim": 16}


@pytest.fixture
def stage1(build_tokenizer):
    changes = {"is_legacy": True, "image_size": 16, "encoder_patch_size": 2, "decoder_patch_size": 2}
    return build_tokenizer(TiTok, **changes)


@pytest.fixture
def vqgan():
    torch.manual_seed(0)
    return MaskGitVQGAN(
        image_size=16, hidden_channels=32, channel_multipliers=(1, 1), num_res_blocks=1, z_channels=16
    ).eval()


def test_continuous_tokenizers_reconstruct_but_have_no_ids(build_tokenizer, picture):
    vae = build_tokenizer(TiTok, quantizer="vae")
    with pytest.raises(mt.InvalidInput, match="continuous"):
        vae.encode(picture)
    assert vae.reconstruct(picture).size == (32, 32)
    assert len(vae.reconstruct([picture, picture])) == 2
    pixels = torch.rand(2, 3, 32, 32)
    draws = [vae.encode_latents(pixels, torch.Generator().manual_seed(seed), sample=True) for seed in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert vae.encode_latents(pixels).shape == (2, 8, 1, 16)


def test_text_aware_decoding_needs_and_uses_the_caption(build_tokenizer, picture):
    model = build_tokenizer(TiTok, text_context_length=5, text_embed_dim=12)
    model.encode_text = lambda texts: torch.stack([torch.full((5, 12), float(len(text))) for text in texts])
    tokens = model.encode([picture, picture])
    with pytest.raises(mt.InvalidInput, match="caption"):
        model.decode(tokens)
    with pytest.raises(mt.InvalidInput, match="3 captions"):
        model.decode(tokens, text=["a", "b", "c"])
    cat, dog = model.decode(tokens, text=["a cat", "a much longer caption"], as_tensor=True)
    assert not torch.allclose(cat, dog, atol=1e-3)


def test_captions_go_through_a_clip_text_tower(build_tokenizer, picture, tmp_path):
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    vocabulary = {"<|startoftext|>": 0, "<|endoftext|>": 1, "a</w>": 2, "c": 3, "t</w>": 4, "a": 5}
    folder = tmp_path / "clip"
    CLIPTokenizer(vocab=vocabulary, merges=[]).save_pretrained(folder)
    config = CLIPTextConfig(
        vocab_size=6, hidden_size=12, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=7, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    tower = CLIPTextModel(config).eval()
    tower.save_pretrained(folder)
    model = build_tokenizer(TiTok, text_context_length=7, text_embed_dim=12)
    model.text_encoder = str(folder)
    features = model.encode_text(["a cat", "a"])
    assert features.shape == (2, 7, 12)
    assert not torch.allclose(features[0], features[1])
    assert model.decode(model.encode(picture), text="a cat").size == (32, 32)
    model = build_tokenizer(TiTok, text_context_length=7, text_embed_dim=12)
    model.text_encoder = str(tmp_path / "nowhere")
    with pytest.raises(mt.ModelNotFound, match="text encoder"):
        model.encode_text(["a cat"])


def test_models_without_text_refuse_captions(titok, picture):
    with pytest.raises(mt.InvalidInput, match="takes no text"):
        titok.decode(titok.encode(picture), text="a cat")


def test_stage_1_becomes_stage_2(stage1, vqgan):
    ids = torch.randint(0, 64, (2, 16))
    with pytest.raises(mt.InvalidInput, match="stage-1"):
        stage1.decode_ids(ids)
    assert stage1.decode_proxy(ids, vqgan).shape == (2, 3, 16, 16)
    stage1.add_pixel_decoder(vqgan)
    decoded = stage1.decode_ids(ids)
    assert decoded.shape == (2, 3, 16, 16)
    rebuilt = TiTok(**{key: value for key, value in stage1.config.items() if not key.startswith("_")})
    rebuilt.load_state_dict(stage1.state_dict())
    torch.testing.assert_close(rebuilt.eval().decode_ids(ids), decoded)
    with pytest.raises(mt.InvalidInput, match="not a stage-1"):
        stage1.add_pixel_decoder(vqgan)


def test_stage_2_trains_the_decoders_alone(build_tokenizer):
    model = build_tokenizer(TiTok, is_legacy=True, has_pixel_decoder=True, image_size=16, encoder_patch_size=2,
                            decoder_patch_size=2, **PIXELS)  # fmt: skip
    model.freeze_encoder()
    model.train()(torch.rand(2, 3, 16, 16)).decoded.square().mean().backward()
    with_gradient = {name.split(".")[0] for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert with_gradient == {"decoder", "pixel_decoder", "pixel_quantize"}


def test_impossible_configs_are_refused():
    with pytest.raises(mt.InvalidInput, match="two-stage"):
        TiTok(quantizer="vae")
    with pytest.raises(mt.InvalidInput, match="multiple of the patch size"):
        TiTok(image_size=100, is_legacy=False, has_pixel_decoder=False)
    with pytest.raises(mt.InvalidInput, match="'vq' or 'vae'"):
        TiTok(quantizer="fsq")


def test_gradient_checkpointing_changes_no_gradient(build_tokenizer):
    pixels = torch.rand(2, 3, 32, 32)
    gradients = []
    for checkpointing in (False, True):
        model = build_tokenizer(TiTok).train()
        if checkpointing:
            model.enable_gradient_checkpointing()
        model(pixels).decoded.square().mean().backward()
        gradients.append(model.encoder.patch_embed.weight.grad)
    torch.testing.assert_close(*gradients)


def test_tail_drop_is_uniform_and_only_in_training(build_tokenizer):
    model = build_tokenizer(OneDPiece)
    pixels = torch.rand(1, 3, 32, 32)
    assert model(pixels).num_tokens == 16
    model.train()
    generator = torch.Generator().manual_seed(0)
    draws = [model.draw_num_tokens(generator) for _ in range(1600)]
    assert set(draws) == set(range(1, 17))
    assert max(draws.count(k) for k in range(1, 17)) < 150
    kept = {model(pixels, generator=generator).num_tokens for _ in range(40)}
    assert len(kept) > 5
    assert model(pixels, num_tokens=3, generator=generator).num_tokens <= 3
