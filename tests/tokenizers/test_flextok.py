"""FlexTok: any prefix decodes, batches and shortcuts change nothing, options are checked."""

import math

import mediatok as mt
import pytest
import torch
from mediatok.tokenizers.image.flextok import PADDED_SHARE, FlexTok, _Branches, power_lengths, released_configs
from mediatok.tokenizers.image.flextok_flow import FlowSettings, ProjectedGuidance, draw_times, initial_noise

SIZES = {
    "num_tokens": 8, "levels": (5, 4, 3), "grid": (4, 4), "patch_size": 1, "encoder_width": 32, "encoder_depth": 2,
    "encoder_head_width": 16, "decoder_width": 48, "decoder_depth": 2, "decoder_head_width": 24, "latent_channels": 3,
    "vae_channels": (8, 8), "vae_layers": 1, "vae_norm_groups": 4, "num_steps": 2, "guidance_scale": 2.0,
}  # fmt: skip


def build(seed=0, **changes):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = FlexTok(**SIZES | changes).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.startswith(("encoder", "decoder")) and parameter.requires_grad:
                    parameter.normal_(std=parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.3)
    model.name = "tiny-flextok"
    return model


@pytest.fixture(scope="module")
def tokenizer():
    return build()


def test_sizes_follow_from_the_config(tokenizer):
    assert (tokenizer.image_size, tokenizer.vocab_size, tokenizer.max_tokens) == (8, 60, 8)
    assert tokenizer.is_variable_length


def test_pictures_become_tokens_and_pictures(tokenizer, picture):
    tokens = tokenizer.encode([picture, picture], num_tokens=3)
    assert tokens.ids.shape == (2, 3)
    assert torch.equal(tokens.ids, tokenizer.encode([picture, picture]).ids[:, :3])
    first, second = tokenizer.decode(tokens, as_tensor=True)
    assert first.shape == (3, 8, 8)
    assert torch.equal(first, second)  # a picture depends on its tokens alone
    assert torch.equal(first, tokenizer.decode(tokens, as_tensor=True)[0])
    assert not torch.equal(first, tokenizer.decode(tokens, as_tensor=True, seed=1)[0])
    assert not torch.equal(first, tokenizer.decode(tokens, as_tensor=True, guidance=1.0, steps=3)[0])
    assert tokenizer.reconstruct(picture, steps=1, num_tokens=2).size == (8, 8)


@pytest.mark.parametrize("kept", [1, 3, 7])
def test_few_registers_give_the_first_tokens(tokenizer, kept):
    latents = torch.randn(2, 3, 4, 4)
    with torch.no_grad():
        whole, few = tokenizer.registers_of(latents), tokenizer.registers_of(latents, kept)
    torch.testing.assert_close(few, whole[:, :kept], atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_registers_that_are_left_out_stand_once_for_all(tokenizer):
    """The same velocities as with every copy of the mask in the sequence."""
    decoder, codes = tokenizer.decoder, torch.rand(2, 8, 3) - 0.5
    noisy, modulations = torch.randn(2, 3, 4, 4), decoder.modulations(torch.tensor([0.3]))
    whole, _ = decoder.condition(codes)
    for kept, token in ((3, decoder.mask_token), (0, decoder.null_token)):
        copied = torch.cat([whole[:, :kept], token.expand(2, 8 - kept, -1)], dim=1)
        expected, _ = decoder(noisy, copied, None, modulations)
        is_null = torch.full((2,), kept == 0)
        for given in (codes[:, :kept], codes):
            condition = decoder.condition(given, torch.full((2,), kept), is_null)
            torch.testing.assert_close(decoder(noisy, *condition, modulations)[0], expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("norm_guidance", [False, True])
@pytest.mark.parametrize("longest", [2, 8])
@torch.no_grad()
def test_rows_of_other_lengths_change_nothing(tokenizer, norm_guidance, longest):
    settings = tokenizer.decoding_settings(steps=2, guidance=3.0, norm_guidance=norm_guidance)
    ids, lengths = torch.randint(60, (3, longest)), torch.tensor([1, longest, longest])
    noise = torch.randn(3, 3, 4, 4)
    together = tokenizer.decode_to_latents(ids, lengths, settings, noise)
    for row, length in enumerate(lengths.tolist()):
        alone = tokenizer.decode_to_latents(ids[row, None, :length], None, settings, noise[row, None])
        torch.testing.assert_close(alone[0], together[row], atol=2e-5, rtol=1e-4)


@torch.no_grad()
def test_one_batch_and_two_passes_are_the_same(tokenizer):
    codes, x = torch.rand(2, 4, 3) - 0.5, torch.randn(2, 3, 4, 4)
    branches = _Branches(tokenizer.decoder, codes, torch.tensor([4, 2]), (4, 4))
    assert branches.is_one_batch == (PADDED_SHARE * 16 >= 4)
    modulations = tokenizer.decoder.modulations(torch.tensor([0.7]))
    v, u = branches.both(x, modulations)
    torch.testing.assert_close(v, branches.conditional(x, modulations), atol=2e-5, rtol=1e-4)
    empty = tokenizer.decoder.condition(codes[:, :0], None, torch.ones(2, dtype=torch.bool))
    torch.testing.assert_close(u, tokenizer.decoder(x, *empty, modulations)[0], atol=2e-5, rtol=1e-4)
    assert not _Branches(tokenizer.decoder, codes.repeat(1, 2, 1), None, (4, 4)).is_one_batch


def test_steps_report_and_guidance_may_depend_on_time(tokenizer):
    calls, times = [], []

    def scale(time):
        times.append(time)
        return 1.0

    settings = tokenizer.decoding_settings(steps=4, guidance=scale)
    tokenizer.decode_to_latents(torch.zeros(1, 2, dtype=torch.int64), None, settings, None,
                                lambda step, latents: calls.append((step, latents.shape)))  # fmt: skip
    assert calls == [(step, (1, 3, 4, 4)) for step in (1, 2, 3, 4)]
    assert times == [1.0, 0.75, 0.5, 0.25]


def test_decoding_is_watched_step_by_step_and_can_be_stopped(tokenizer, picture):
    tokens, seen = tokenizer.encode([picture] * 3), []
    watched = tokenizer.decode(
        tokens, steps=3, batch_size=2, previews=True, on_step=lambda *args, preview: seen.append((*args, preview))
    )
    assert [pair[:2] for pair in seen] == [(2, 9), (4, 9), (6, 9), (7, 9), (8, 9), (9, 9)]
    assert {tuple(preview.shape) for _, _, preview in seen} == {(3, 8, 8)}
    plain = tokenizer.decode(tokens, steps=3, batch_size=2)
    assert [one.tobytes() for one in watched] == [one.tobytes() for one in plain]
    quiet = []
    tokenizer.decode(tokens[0], steps=3, on_step=lambda *args, preview: quiet.append(preview is None))
    assert quiet == [True, True, False]  # previews cost a decoding of latents each

    def stop(step, total, preview=None):
        raise mt.Cancelled("stopped")

    with pytest.raises(mt.Cancelled):
        tokenizer.decode(tokens, steps=100, on_step=stop)
    assert tokenizer.decoding_defaults() == {"steps": 2, "guidance": 2.0, "norm_guidance": True, "seed": 0}


def test_encoding_takes_the_mean_or_a_draw(tokenizer):
    pixels = torch.rand(1, 3, 8, 8)
    draws = [tokenizer.encode_pixels(pixels, None, torch.Generator().manual_seed(s), sample=True) for s in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1])
    assert torch.equal(tokenizer.encode_pixels(pixels), tokenizer.encode_pixels(pixels))


def test_saved_models_are_the_same(tokenizer, tmp_path, picture):
    tokenizer.save_pretrained(tmp_path / "m")
    again = mt.load(tmp_path / "m")
    again.name = tokenizer.name
    assert again.fingerprint == tokenizer.fingerprint
    tokens = tokenizer.encode(picture)
    assert torch.equal(again.decode(tokens, as_tensor=True), tokenizer.decode(tokens, as_tensor=True))
    half = mt.load(tmp_path / "m", dtype="bfloat16")
    assert half.fingerprint == tokenizer.fingerprint
    assert half.vae.dtype == torch.float32
    half.name = tokenizer.name
    assert (half.decode(tokens, as_tensor=True) - tokenizer.decode(tokens, as_tensor=True)).abs().mean() < 0.1


def test_training_pass_reaches_everything_but_the_vae():
    model = build().train()
    model.freeze_vae()
    output = model(torch.randn(6, 3, 4, 4), torch.Generator().manual_seed(0), null_share=0.5, features_of=0)
    assert output.ids_BK.shape == (6, 8)
    assert output.features_BPD.shape == (6, 16, 48)
    output.loss.backward()
    without = {name for name, p in model.named_parameters() if p.grad is None}
    assert {name for name in without if not name.startswith("vae.")} == {
        "encoder.patch_embed.positions", "decoder.patch_embed.positions"
    }  # fmt: skip


def test_a_fresh_model_starts_at_rest():
    model = FlexTok(**SIZES)
    registers, bias = model.decoder.condition(torch.zeros(1, 2, 3))
    velocity, _ = model.decoder(torch.randn(1, 3, 4, 4), registers, bias, model.decoder.modulations(torch.ones(1)))
    assert not velocity.any()


def test_gradient_checkpointing_changes_no_gradient():
    gradients = []
    for checkpointing in (False, True):
        model = build().train()
        if checkpointing:
            model.enable_gradient_checkpointing()
        model(torch.ones(2, 3, 4, 4), torch.Generator().manual_seed(1)).loss.backward()
        gradients.append(model.encoder.registers.grad)
    torch.testing.assert_close(*gradients)


def test_times_and_lengths_of_training():
    for density in ("mode", "uniform", "logit_normal", "stratified"):
        times = draw_times(density, 1000, torch.Generator().manual_seed(0))
        assert 0 <= times.min() < 0.1
        assert 0.9 < times.max() <= 1
    assert power_lengths(256).tolist() == [2**power for power in range(9)]
    assert power_lengths(6).tolist() == [1, 2, 4, 6]


def test_projected_guidance_is_across_and_short():
    v, u = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    step = ProjectedGuidance()(v, u, 2.0) - v
    assert (step * v).sum(dim=(1, 2, 3)).abs().max() < 1e-3
    assert step.flatten(1).norm(dim=1).max() <= 2.5 + 1e-4


def test_noise_is_the_same_everywhere():
    assert torch.equal(initial_noise(3, (1, 2, 2)), initial_noise(3, (1, 2, 2)))
    assert FlowSettings(4, 1.0, False, 0).times() == [1.0, 0.75, 0.5, 0.25]


@pytest.mark.parametrize(
    "options",
    [{"steps": 0}, {"steps": 10**6}, {"guidance": -1}, {"guidance": math.nan}, {"guidance": "7"}, {"seed": -1},
     {"norm_guidance": "no"}, {"step": 3}],
)  # fmt: skip
def test_options_are_checked(tokenizer, picture, options):
    tokens = tokenizer.encode(picture, num_tokens=2)
    with pytest.raises(mt.InvalidInput, match=next(iter(options))):
        tokenizer.decode(tokens, **options)
    if "step" not in options:  # which is no option of encoding either
        with pytest.raises(mt.InvalidInput, match=next(iter(options))):
            tokenizer.reconstruct(picture, num_tokens=2, **options)


@pytest.mark.parametrize("k", [0, -1, 9, 10**30, 2.0, 2.5, True, "2", math.nan])
def test_numbers_of_tokens_that_are_not_there(tokenizer, picture, k):
    for call in (tokenizer.encode, tokenizer.reconstruct):
        with pytest.raises(mt.InvalidInput, match=r"num_tokens=.* is out of range; tiny-flextok has 1 to 8 tokens"):
            call(picture, num_tokens=k)
    with pytest.raises(mt.InvalidInput, match="1 to 8 tokens"):
        tokenizer.encode_pixels(torch.rand(1, 3, 8, 8), k)
    if k not in (9, 10**30):  # a prefix of more than all tokens is all
        with pytest.raises(mt.InvalidInput, match="at least 1"):
            tokenizer.encode(picture)[:, :k]


def test_what_cannot_be_is_said(tokenizer):
    for bad in ({"num_tokens": 0}, {"encoder_depth": 10**6}, {"encoder_width": 30}, {"grid": (4,)}, {"levels": (1,)},
                {"max_timestep": 0}, {"grid": (4, 10**9)}):  # fmt: skip
        with pytest.raises(mt.InvalidInput):
            FlexTok(**SIZES | bad)
    with pytest.raises(mt.InvalidInput, match="out of range"):
        tokenizer.encode_pixels(torch.rand(1, 3, 8, 8), 9)
    with pytest.raises(mt.InvalidInput, match="reads latents"):
        tokenizer.registers_of(torch.randn(1, 3, 8, 8))
    with pytest.raises(mt.InvalidInput, match="no option"):
        mt.load("titok-tiny").decode(mt.load("titok-tiny").encode(torch.rand(3, 64, 64)), steps=3)


def test_released_sizes():
    for name in released_configs():
        entry = next(model for model in mt.models() if model.name == name)
        with torch.device("meta"):
            model = FlexTok(**released_configs()[name])
        assert sum(parameter.numel() for parameter in model.parameters()) == entry.parameters
        assert (model.vocab_size, model.max_tokens, model.image_size) == (64_000, 256, 256)
