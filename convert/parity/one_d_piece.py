"""Replay of One-D-Piece: decoding of prefixes, and stage-1 training with Tail Token Drop."""

from __future__ import annotations

import torch

from ...core.errors import InvalidInput
from .. import one_d_piece
from .replay import IMAGE, PIXEL, TAP, Replay
from .titok import check_encoder, check_stage1_losses, check_vq, decoder_modules, encoder_modules, taps, to_uint8


def replay_lengths(replay: Replay) -> None:
    """Kind lengths: one encode, and decoding from several prefix lengths, alone and all in one batch."""
    model = one_d_piece.from_official(replay.case.config, replay.case.weights())
    image = replay.input("image")
    with torch.no_grad():
        quantized = check_vq(replay, model, check_encoder(replay, model, image), image)
        ids = model.encode_pixels(image)
        lengths = sorted({int(match[1]) for match in replay.matches(r"len(\d+)\..+")})
        for length in lengths:
            with taps(decoder_modules(model)) as values:
                recon = model.decode_latents(quantized[..., :length])
            replay.check_all({f"len{length}.{name}": value for name, value in values.items()}, TAP)
            replay.check(f"len{length}.recon", recon, IMAGE)
            replay.check(f"len{length}.recon_uint8", to_uint8(recon), PIXEL)
            replay.check(f"len{length}.decode_tokens", model.decode_ids(ids[:, :length]), IMAGE)
        check_mixed_batch(replay, model, ids, lengths)
        if replay.has("decode_tokens.in"):
            tokens = replay.input("decode_tokens.in").flatten(1)
            replay.check("decode_tokens.out", model.decode_ids(tokens), IMAGE)


def check_mixed_batch(replay: Replay, model: one_d_piece.OneDPiece, ids: torch.Tensor, lengths: list[int]) -> None:
    """All lengths in one batch: the official code cannot, ours must give the same pictures as one by one."""
    lengths = [length for length in lengths if replay.has(f"len{length}.decode_tokens")]
    if not lengths:
        return
    counts = torch.tensor(lengths).repeat_interleave(len(ids))
    pictures = model.decode_ids(ids.repeat(len(lengths), 1)[:, : max(lengths)], counts).split(len(ids))
    for length, picture in zip(lengths, pictures, strict=True):
        replay.check(f"len{length}.decode_tokens", picture, IMAGE, note="mixed batch")


def replay_stage1_train(replay: Replay) -> None:
    """Kind stage1_train: the random lengths, then losses and gradients with each recorded length kept."""
    model = one_d_piece.from_official(replay.case.config, replay.case.weights())
    image, codes = replay.input("image"), replay.input("proxy.codes")
    with torch.no_grad():
        replay.check("vq.indices", model.encode_pixels(image)[:, None])
        for match in replay.matches(r"eval\.len(\d+)\.argmax"):
            logits = model(image, num_tokens=int(match[1])).decoded
            replay.check(match[0], logits.argmax(dim=1))
    for match in replay.matches(r"draws\.first(\d+)"):
        generator = torch.Generator().manual_seed(int(replay.input("draws.seed")))
        drawn = [model.draw_num_tokens(generator) for _ in range(int(match[1]))]
        replay.check(match[0], torch.tensor(drawn))
    model.train()
    for match in replay.matches(r"drop(\d+)\.kept"):
        prefix, kept = f"drop{match[1]}.", int(replay.input(match[0]))
        with taps(encoder_modules(model) | decoder_modules(model)) as values:
            output = model(image, generator=generator_that_keeps(kept, model))
        replay.check_all({f"{prefix}{name}": value for name, value in values.items()}, TAP)
        replay.check(f"{prefix}logits", output.decoded, TAP)
        check_stage1_losses(replay, model, output, codes, prefix)


def generator_that_keeps(kept: int, model: one_d_piece.OneDPiece) -> torch.Generator:
    """A generator whose next draw of a length is `kept`, so that the model's own dropping is what is replayed."""
    if not 1 <= kept <= model.max_tokens:
        raise InvalidInput(f"the case keeps {kept} of {model.max_tokens} tokens")
    generator = torch.Generator()
    for seed in range(200 * model.max_tokens):
        if model.draw_num_tokens(generator.manual_seed(seed)) == kept:
            return generator.manual_seed(seed)
    raise InvalidInput(f"no seed found that keeps {kept} tokens")  # odds of about e^-200
