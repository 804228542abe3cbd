"""SimCodec and HiFi-Codec: context, bandwidths, merged codebooks, weight norm, packing, and saving."""

from math import prod

import mediatok as mt
import pytest
import torch
import torch.nn.functional as F
from mediatok.core import speech_tokenizer
from mediatok.core.packed import PackedLayer
from mediatok.nn import grouped_vq
from mediatok.nn.grouped_vq import spread_loss
from mediatok.tokenizers.speech.simcodec import SimCodec, merge_codebooks

SIZES = {
    "en_filters": 2, "de_filters": 3, "vq_dim": 12, "upsample_rates": (5, 4, 2), "upsample_kernel_sizes": (11, 8, 4),
    "resblock_kernel_sizes": (3, 5), "resblock_dilation_sizes": ((1, 3), (2, 1)), "n_codes": 50,
}  # fmt: skip
HOP = 40
WIDE = SIZES | {"en_filters": 32, "de_filters": 16, "resblock_kernel_sizes": (3, 7), "vq_dim": 32}
HIFI = {"architecture": "hificodec", "n_q": 2, "n_code_groups": 2, "spread_loss_lambda": 0.0}


def build(seed=0, **changes):
    """Random weights whose latents spread over the codes."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = SimCodec(**SIZES | changes).eval().requires_grad_(False)
        latent_BCL = model.encode_latent(torch.rand(1, 200 * HOP) * 2 - 1)
        rows_NC = latent_BCL[0].T
        for index, codebook in enumerate(model.quantize.codebooks):
            rows = rows_NC.chunk(model.config.n_code_groups, dim=1)[index % model.config.n_code_groups]
            codebook.copy_(rows[torch.randint(200, (len(codebook),))] / (1 + index // model.config.n_code_groups))
    model.name = "small-simcodec"
    return model


def noise(batch, samples, seed=0):
    return torch.rand(batch, samples, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.fixture(scope="module")
def codec():
    return build()


@pytest.fixture(scope="module")
def layered():
    return build(n_q=3, n_code_groups=2)


# How far a frame sees.

CONTEXTS = [
    {},
    {"upsample_rates": (2, 3), "upsample_kernel_sizes": (2, 9)},
    {"upsample_rates": (8,), "upsample_kernel_sizes": (16,), "resblock_kernel_sizes": (1,),
     "resblock_dilation_sizes": ((1,),)},
    {"upsample_rates": (1, 4, 2), "upsample_kernel_sizes": (5, 4, 6), "resblock_kernel_sizes": (7,),
     "resblock_dilation_sizes": ((1, 4),)},
]  # fmt: skip


@pytest.mark.parametrize("changes", CONTEXTS)
def test_context_is_exact(changes):
    """By the gradient: nothing beyond `context_frames` reaches a frame, and something just within it does."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = SimCodec(**SIZES | changes).double()
    hop, context = prod(model.config.upsample_rates), model.context_frames
    frames = 2 * context + 5
    middle = context + 2
    x_BCT = torch.randn(1, 1, frames * hop, dtype=torch.float64, requires_grad=True)
    model.encoder(x_BCT)[:, :, middle].square().sum().backward()
    reach = [_reach(x_BCT.grad[0, 0].view(frames, hop).abs().sum(1), middle)]
    z_BCL = torch.randn(1, model.config.vq_dim, frames, dtype=torch.float64, requires_grad=True)
    model.decoder(z_BCL)[..., middle * hop : (middle + 1) * hop].square().sum().backward()
    reach.append(_reach(z_BCL.grad[0].abs().sum(0), middle))
    assert reach == [model._encoder_context(), model._decoder_context()]
    assert context == max(reach)


def _reach(gradient_L, frame):
    seen = gradient_L.nonzero()[:, 0]
    return max(frame - int(seen.min()), int(seen.max()) - frame)


def test_samples_beyond_the_context_change_nothing(codec):
    context, frames = codec.context_frames, 120
    frame = 60
    wave_BT, other_BT = noise(1, frames * HOP), noise(1, frames * HOP, seed=1)
    inside = slice((frame - context) * HOP, (frame + 1 + context) * HOP)
    other_BT[:, inside] = wave_BT[:, inside]
    before_BCL, after_BCL = (codec.encode_latent(x_BT) for x_BT in (wave_BT, other_BT))
    assert torch.equal(before_BCL[:, :, frame], after_BCL[:, :, frame])
    assert not torch.equal(before_BCL[:, :, : frame - context], after_BCL[:, :, : frame - context])


@pytest.mark.parametrize("packed", [False, True])
def test_windows_give_one_pass(monkeypatch, packed):
    codec = build(seed=3)
    if packed:
        codec.pack_network()
    monkeypatch.setattr(speech_tokenizer, "WINDOW_SECONDS", 0.1)
    clips = [mt.Waveform(noise(1, samples, seed=samples), 16000) for samples in (1, HOP + 1, 9000, 7777, 8000)]
    tokens = codec.encode(clips, batch_size=3)
    decoded = codec.decode(tokens, batch_size=2)
    for clip, item, sound in zip(clips, tokens, decoded, strict=True):
        padded = F.pad(clip.samples, (0, -clip.samples.shape[1] % HOP))
        one_pass = codec.encode_waveform(padded)
        assert torch.equal(item.ids, one_pass)
        assert one_pass.unique().numel() > min(10, one_pass.numel() // 2)
        whole = codec.decode_ids(one_pass)[:, : clip.samples.shape[1]]
        torch.testing.assert_close(sound.samples, whole, atol=1e-5, rtol=0)


@pytest.mark.parametrize("changes", [{}, HIFI])
def test_rows_of_unequal_length_are_encoded_as_alone(changes):
    codec = build(**changes)
    lengths = torch.tensor([20 * HOP, 7 * HOP - 3, 1])
    wave_BT = noise(3, 20 * HOP)
    for row, length in enumerate(lengths.tolist()):
        wave_BT[row, length : -(-length // HOP) * HOP] = 0
    ids = codec.encode_waveform(wave_BT, lengths)
    for row, length in enumerate(lengths.tolist()):
        frames = -(-length // HOP)
        alone = codec.encode_waveform(wave_BT[row : row + 1, : frames * HOP])[0]
        assert torch.equal(ids[row, :frames], alone)
        assert not ids[row, frames:].any()


def test_group_norms_see_the_whole_clip():
    codec = build(**HIFI)
    assert codec.context_frames is None
    assert codec.num_codebooks == 4
    clip = mt.Waveform(noise(1, 3000), 16000)
    tokens = codec.encode(clip)
    assert tokens.ids.shape == (1, 75, 4)
    assert torch.equal(tokens.ids, codec.encode_waveform(clip.samples))


# Bandwidths.


def test_fewer_layers_decode_too(layered):
    ids_BLQ = layered.encode_waveform(noise(2, 30 * HOP))
    assert ids_BLQ.shape == (2, 30, 6)
    latent_BCL = layered.encode_latent(noise(2, 30 * HOP))
    errors = []
    for layers in (1, 2, 3):
        vq = layered.quantize(latent_BCL, num_layers=layers)
        assert torch.equal(vq.ids_BLQ, ids_BLQ[..., : 2 * layers])
        expected = layered.decode_latent(vq.quantized_BCL)
        torch.testing.assert_close(layered.decode_ids(ids_BLQ[..., : 2 * layers]), expected)
        errors.append(float((vq.quantized_BCL - latent_BCL).square().mean()))
    assert errors == sorted(errors, reverse=True)
    for count in (0, 1, 3, 7):
        with pytest.raises(mt.InvalidInput, match=r"int64 \[B, L, 6\]"):
            layered.decode_ids(torch.zeros(1, 3, count, dtype=torch.int64))
    with pytest.raises(mt.InvalidInput, match=r"\[0, 50\)"):
        layered.decode_ids(torch.full((1, 3, 2), 50))


def test_tokens_of_several_codebooks_through_a_file(layered, tmp_path):
    tokens = layered.encode(mt.Waveform(noise(1, 1234), 16000))
    tokens.save(tmp_path / "a.mtok")
    again = mt.Tokens.load(tmp_path / "a.mtok")
    assert again == tokens
    assert layered.decode(again).samples.shape == (1, 1234)
    assert layered.bit_rate == 400 * 6 * 6


def test_frames_can_keep_fewer_layers(layered):
    latent_BCL = layered.encode_latent(noise(1, 3 * HOP))
    last_BL = torch.tensor([[0, 2, 1]])
    mixed = layered.quantize(latent_BCL, last_layer_BL=last_BL)
    for frame, layers in enumerate((1, 3, 2)):
        whole = layered.quantize(latent_BCL, num_layers=layers)
        torch.testing.assert_close(mixed.quantized_BCL[..., frame], whole.quantized_BCL[..., frame])


# Merged codebooks.


def test_merged_codes_decode_as_their_pairs_did():
    stage1 = build(n_code_groups=2)
    ids_BLG = stage1.encode_waveform(noise(4, 300 * HOP))
    counts_GK = torch.stack([torch.bincount(ids.flatten(), minlength=50) for ids in ids_BLG.unbind(2)])
    merged = merge_codebooks(stage1, counts_GK, (8, 6))
    assert (merged.vocab_size, merged.num_codebooks) == (48, 1)
    most_used = [counts.argsort(descending=True, stable=True) for counts in counts_GK]
    for a, b in ((0, 0), (7, 5), (3, 4)):
        pair = torch.stack([most_used[0][a], most_used[1][b]]).view(1, 1, 2).expand(1, 9, 2)
        merged_ids = torch.full((1, 9), a * 6 + b)
        assert torch.equal(merged.decode_ids(merged_ids), stage1.decode_ids(pair.contiguous()))
    # Frames whose pair was kept get that pair's number.
    a_BL, b_BL = most_used[0].argsort()[ids_BLG[..., 0]], most_used[1].argsort()[ids_BLG[..., 1]]
    kept = (a_BL < 8) & (b_BL < 6)
    assert kept.any()
    ids_BL = merged.encode_waveform(noise(4, 300 * HOP))
    assert torch.equal(ids_BL[kept], (a_BL * 6 + b_BL)[kept])


def test_what_cannot_be_merged(codec):
    stage1, counts = build(n_code_groups=2), torch.ones(2, 50)
    with pytest.raises(mt.InvalidInput, match="two groups"):
        merge_codebooks(codec, counts, (2, 2))
    for keep in ((0, 3), (51, 3)):
        with pytest.raises(mt.InvalidInput, match="cannot be kept of 50"):
            merge_codebooks(stage1, counts, keep)


# Training.


def test_spread_loss_in_pieces(monkeypatch):
    codes_KC = torch.randn(37, 6, generator=torch.Generator().manual_seed(0)).requires_grad_()
    expected = F.cross_entropy(3 * codes_KC @ codes_KC.T, torch.arange(37))
    (expected_grad,) = torch.autograd.grad(expected, codes_KC)
    monkeypatch.setattr(grouped_vq, "SPREAD_ROWS", 10)
    loss = spread_loss(codes_KC)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, codes_KC)[0], expected_grad)


def test_encoding_and_decoding_compute_no_losses(codec, monkeypatch):
    monkeypatch.setattr(grouped_vq, "spread_loss", lambda codes: pytest.fail("the similarities of all codes"))
    codec.decode_ids(codec.encode_waveform(noise(1, 10 * HOP)))


@pytest.mark.parametrize("changes", [{}, {"n_q": 2, "n_code_groups": 2}, HIFI])
def test_training_reaches_every_weight(changes):
    codec = build(**changes).requires_grad_(True).train()
    wave_BT = noise(2, 20 * HOP)
    losses = []
    optimizer = torch.optim.Adam(codec.parameters(), 1e-3)
    for _ in range(8):
        output = codec(wave_BT)
        loss = (output.decoded - wave_BT).abs().mean() + output.vq.quantizer_loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert output.decoded.shape == wave_BT.shape
    assert output.ids_BL.shape == ((2, 20, 4) if changes else (2, 20))
    assert all(parameter.grad is not None for parameter in codec.parameters())
    assert losses[-1] < losses[0]


def test_weight_norm_on_and_off(tmp_path):
    codec = build().requires_grad_(True)
    wave_BT, before = noise(1, 10 * HOP), dict(codec.state_dict())
    expected = codec(wave_BT).decoded
    codec.set_weight_norm(True)
    codec.set_weight_norm(True)  # once is enough
    torch.testing.assert_close(codec(wave_BT).decoded, expected, atol=1e-5, rtol=0)
    names = {name.rpartition(".")[2] for name, _ in codec.named_parameters()}
    assert {"original0", "original1"} < names
    codec(wave_BT).decoded.square().sum().backward()
    assert codec.decoder.conv_pre.parametrizations.weight.original0.grad.abs().sum() > 0
    codec.save_pretrained(tmp_path / "saved")
    assert mt.load(tmp_path / "saved").fingerprint == codec.fingerprint
    codec.set_weight_norm(False)
    after = codec.state_dict()
    assert after.keys() == before.keys()
    for name, value in before.items():
        torch.testing.assert_close(after[name], value, atol=1e-6, rtol=1e-5)
    loaded = mt.load(tmp_path / "saved")
    torch.testing.assert_close(loaded.encoder.conv_pre.weight, codec.encoder.conv_pre.weight, atol=1e-6, rtol=1e-5)


# Packed and saved.


@pytest.mark.parametrize("changes", [{}, HIFI])
@torch.inference_mode()
def test_packed_weights_give_the_same(tmp_path, changes):
    codec = build(**WIDE | changes)
    wave_BT, fingerprint = noise(2, 60 * HOP), codec.fingerprint
    ids, latent_BCL = codec.encode_waveform(wave_BT), codec.encode_latent(wave_BT)
    decoded_BT = codec.decode_ids(ids)
    codec.pack_network()
    codec.pack_network()
    kinds = {type(module).__name__ for module in codec.modules() if isinstance(module, PackedLayer)}
    assert kinds == {"PackedConv1d", "PackedConvTranspose1d", "ToomCookConv1d"}
    error = (codec.encode_latent(wave_BT) - latent_BCL).abs().max() / latent_BCL.std()
    assert error < 1e-4
    assert (codec.encode_waveform(wave_BT) == ids).float().mean() > 0.99
    torch.testing.assert_close(codec.decode_ids(ids), decoded_BT, atol=1e-5, rtol=0)
    assert codec.fingerprint == fingerprint
    for act in (codec.train, lambda: codec.save_pretrained(tmp_path / "x"), lambda: codec.to("meta"), codec.double):
        with pytest.raises(mt.InvalidInput, match="load the model again"):
            act()
    assert not (tmp_path / "x").exists()


def test_saved_and_loaded(codec, tmp_path):
    codec.save_pretrained(tmp_path / "small")
    wave_BT = noise(1, 20 * HOP)
    for again in (mt.load(tmp_path / "small"), SimCodec.from_pretrained(tmp_path / "small")):
        assert again.fingerprint == codec.fingerprint
        assert again.context_frames == codec.context_frames
        assert torch.equal(again.encode_waveform(wave_BT), codec.encode_waveform(wave_BT))
    narrow = mt.load(tmp_path / "small", dtype="bfloat16")
    assert narrow.fingerprint == codec.fingerprint
    assert narrow.quantize.codebooks[0].dtype == torch.float32
    ids_BL = narrow.encode_waveform(wave_BT)
    decoded_BT = narrow.decode_ids(ids_BL)
    assert decoded_BT.dtype == torch.float32
    close = codec.decode_ids(ids_BL)
    assert (decoded_BT - close).abs().max() < 0.05 * close.abs().max() + 0.05


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"architecture": "encodec"}, "one of simcodec, hificodec"),
        ({"upsample_rates": (5, 4)}, "of one length"),
        ({"resblock_kernel_sizes": (3,)}, "of one length"),
        ({"upsample_rates": (), "upsample_kernel_sizes": ()}, "of one length"),
        ({"upsample_kernel_sizes": (10, 8, 4)}, "whole frames"),
        ({"upsample_kernel_sizes": (3, 8, 4)}, "whole frames"),
        ({"resblock_kernel_sizes": (3, 4)}, "must be odd"),
        ({"n_code_groups": 5}, "not a multiple"),
        (HIFI | {"norm_groups": (1, 2)}, "do not divide"),
        (HIFI | {"norm_groups": (1, 3, 2)}, "do not divide"),
    ],
)
def test_sizes_that_do_not_go_together(changes, reason):
    with pytest.raises(mt.InvalidInput, match=reason):
        SimCodec(**SIZES | changes)


def test_bad_input(codec):
    with pytest.raises(mt.InvalidInput, match="no multiple of 40"):
        codec.encode_waveform(torch.zeros(1, 41))
    with pytest.raises(mt.InvalidInput, match="no multiple of 40"):
        codec(torch.zeros(1, 41))
    with pytest.raises(mt.InvalidInput, match=r"int64 \[B, L\]"):
        codec.decode_ids(torch.zeros(1, 3, 1, dtype=torch.int64))
