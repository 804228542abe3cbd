"""Replay of SEED's tokenizer: every inner output from picture to image embedding, and both training stages."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ...tokenizers.image.seed import Seed, as_map
from ...training.seed_losses import CODEBOOK_WEIGHT, seed_loss
from .. import seed
from .replay import LOSS, TAP, Replay, Tolerance

EMBEDDING = Tolerance(atol=2e-5, rtol=1e-5)
GRADIENT = Tolerance(atol=1e-5, rtol=1e-3)


def replay_tokenizer(replay: Replay) -> None:
    """Kind tokenizer: picture to ids, ids to the image embedding."""
    model = seed.from_official(replay.case.config, replay.case.weights())
    image = replay.input("image")
    tapped = {"qformer_hidden_0": model.qformer.norm, "qformer_hidden_1": model.qformer.layers[0].mlp}
    with torch.no_grad(), outputs_of(tapped) as taps:
        vit_out, image_embeds = model.vision(image)
        z_BQD = model.qformer(model.queries, image_embeds)
    replay.check("vit_out", vit_out, TAP)
    replay.check("image_embeds", image_embeds, TAP)
    for name, value in taps.items():  # queries are the same for all pictures until they look at one: one row there
        replay.check(name, value.expand(len(image), -1, -1), TAP)
    replay.check("qformer_out", z_BQD, TAP)
    with torch.no_grad():
        codes_BQC = model.to_code(z_BQD)
        quantized, vq = model.quantize(as_map(codes_BQC))
        quantized_BQC = quantized[:, :, 0].mT
        ids_BQ = model.ids_of_normalized(image)
    replay.check("encode_down", codes_BQC, TAP)
    replay.check("indices", vq.ids_BHW[:, 0])
    replay.check("indices", ids_BQ, note="inference")
    replay.check("quantized_st", quantized_BQC, TAP)
    loss = vq.commitment_loss + CODEBOOK_WEIGHT * vq.codebook_loss
    replay.check("vq_loss", _as_recorded(replay, "vq_loss", loss), LOSS)
    replay.check("decode_up_from_encode", model.from_code(quantized_BQC), TAP)
    _replay_decoder(replay, model, vq.ids_BHW[:, 0])


def _replay_decoder(replay: Replay, model: Seed, ids_BQ: Tensor) -> None:
    with torch.no_grad():
        entry_BQC = model.quantize.lookup(ids_BQ)
        vectors_BQD = model.from_code(entry_BQC)
        blocks_BQD = model.image_blocks(vectors_BQD)
        replay.check("codebook_entry", entry_BQC)
        replay.check("decode_up", vectors_BQD, TAP)
        replay.check("blocks_image_out", blocks_BQD, TAP)
        replay.check("recon_s_out", model.semantic_decoder(vectors_BQD), TAP)
        if hasattr(model.to_embedding, "down"):
            replay.check("image_down_out", model.to_embedding.down(blocks_BQD), TAP)
        replay.check("image_embedding", model.decode_embedding(ids_BQ), EMBEDDING)
        if replay.has("free_ids"):
            embedding = model.decode_embedding(replay.input("free_ids"))
            replay.check("free_ids_image_embedding", embedding, EMBEDDING)


def replay_stage1(replay: Replay) -> None:
    """Kind train_stage1_itc: features of pictures and captions, the contrastive loss and its gradients."""
    model = seed.contrast_from_official(replay.case.config, replay.case.weights())
    is_token_BL = replay.input("attention_mask").bool()
    image_BE = model.image_features(model.seed.query_features(replay.input("image")))
    states_BLD = model.caption_states(replay.input("input_ids"), is_token_BL)
    text_BE = model.text_features(states_BLD)
    loss, _ = model.contrast(image_BE, text_BE, replay.input("input_ids"))
    replay.check("image_feat", image_BE, TAP)
    replay.check("text_hidden", states_BLD, TAP)
    replay.check("text_feat", text_BE, TAP)
    replay.check("loss_itc", _as_recorded(replay, "loss_itc", loss), LOSS)
    loss.backward()
    of_text = seed.text_shapes(model.seed.config, 1, 1, 1)
    for match in replay.matches(r"grad:(.+)"):
        own = seed.place_text(match[1]) if match[1] in of_text else None
        _check_gradient(replay, match[1], model if own else model.seed, own)


def replay_stage2(replay: Replay) -> None:
    """Kind train_stage2: ids, the three terms of the loss, and gradients."""
    model = seed.from_official(replay.case.config, replay.case.weights())
    given = replay.case.setting("weights", default={})
    weights = {"quantizer_weight": given.get("embed", 5.0), "semantic_weight": given.get("recon_s", 2.0)}
    output = model.training_pass(replay.input("image"))
    loss, terms = seed_loss(
        output, replay.input("clip_target"), **weights, embedding_weight=given.get("distil_image", 0.5)
    )
    replay.check("indices", output.ids_BQ)
    recorded = {
        "loss": loss, "loss_embed_x5": terms["quantizer_loss"], "loss_recon_s_x2": terms["semantic_loss"],
        "loss_distil_image_x05": terms["embedding_loss"],
    }  # fmt: skip
    for name, value in recorded.items():
        replay.check(name, _as_recorded(replay, name, value), LOSS)
    loss.backward()
    for match in replay.matches(r"grad:(.+)"):
        _check_gradient(replay, match[1], model)


def _check_gradient(replay: Replay, key: str, model: nn.Module, own: str | None = None) -> None:
    """Compare the gradient of an official parameter with the part that it is of one of ours."""
    name = f"grad:{key}"
    ours, part = (own, None) if own else seed.place(key, model.config.cross_every)
    parameter = model.get_parameter(ours)
    gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    if part is not None:
        rows = replay.case.io[name].shape[0]
        gradient = gradient[part * rows : (part + 1) * rows]
    replay.check(name, _as_recorded(replay, name, gradient), GRADIENT)


def _as_recorded(replay: Replay, name: str, value: Tensor) -> Tensor:
    """`value` with the shape that was recorded, where they differ by dimensions of one."""
    recorded = replay.case.io.get(name)
    if recorded is None or recorded.squeeze().shape != value.squeeze().shape:
        return value
    return value.reshape(recorded.shape)


@contextmanager
def outputs_of(modules: dict[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """Collect what each of `modules` gives in its first call."""
    values: dict[str, Tensor] = {}

    def collect(name: str):
        def hook(module: nn.Module, args: tuple, output: Tensor) -> None:
            values.setdefault(name, output.detach().clone())

        return hook

    handles = [module.register_forward_hook(collect(name)) for name, module in modules.items()]
    try:
        yield values
    finally:
        for handle in handles:
            handle.remove()
