"""A second, slow TiTok: plain functions over a dict of official keys, written from the layer descriptions alone.

It shares no code with the package. Tests record new cases with it (other sizes, depths, batches, lengths) and replay
them, so that neither the model nor the replay can depend on the sizes of the recorded cases.
"""

import torch
import torch.nn.functional as F

PROXY = 1024


def linear_shapes(name, out, inner):
    return {f"{name}.weight": (out, inner), f"{name}.bias": (out,)}


def norm_shapes(name, width):
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def transformer_shapes(side, width, depth):
    shapes = {f"{side}.class_embedding": (1, width)}
    for name in ("ln_pre", "ln_post"):
        shapes |= norm_shapes(f"{side}.{name}", width)
    for i in range(depth):
        block = f"{side}.transformer.{i}"
        shapes |= norm_shapes(f"{block}.ln_1", width) | norm_shapes(f"{block}.ln_2", width)
        shapes |= {f"{block}.attn.in_proj_weight": (3 * width, width), f"{block}.attn.in_proj_bias": (3 * width,)}
        shapes |= linear_shapes(f"{block}.attn.out_proj", width, width)
        shapes |= linear_shapes(f"{block}.mlp.c_fc", 4 * width, width)
        shapes |= linear_shapes(f"{block}.mlp.c_proj", width, 4 * width)
    return shapes


def vqgan_level_shapes(name, channels_in, channels_out):
    shapes = norm_shapes(f"{name}.norm1", channels_in) | norm_shapes(f"{name}.norm2", channels_out)
    shapes |= {f"{name}.conv1.weight": (channels_out, channels_in, 3, 3)}
    shapes |= {f"{name}.conv2.weight": (channels_out, channels_out, 3, 3)}
    if channels_in != channels_out:
        shapes[f"{name}.nin_shortcut.weight"] = (channels_out, channels_out, 1, 1)
    return shapes


def vqgan_encoder_shapes(prefix, pix):
    base, mults, blocks, z = pix["hidden_channels"], pix["channel_mult"], pix["num_res_blocks"], pix["z_channels"]
    shapes, now = {f"{prefix}.conv_in.weight": (base, 3, 3, 3)}, base
    for i, mult in enumerate(mults):
        for j in range(blocks):
            shapes |= vqgan_level_shapes(f"{prefix}.down.{i}.block.{j}", now, base * mult)
            now = base * mult
    for j in range(blocks):
        shapes |= vqgan_level_shapes(f"{prefix}.mid.{j}", now, now)
    shapes |= norm_shapes(f"{prefix}.norm_out", now)
    return shapes | {f"{prefix}.conv_out.weight": (z, now, 1, 1), f"{prefix}.conv_out.bias": (z,)}


def vqgan_decoder_shapes(prefix, pix):
    base, mults, blocks, z = pix["hidden_channels"], pix["channel_mult"], pix["num_res_blocks"], pix["z_channels"]
    now = base * mults[-1]
    shapes = {f"{prefix}.conv_in.weight": (now, z, 3, 3), f"{prefix}.conv_in.bias": (now,)}
    for j in range(blocks):
        shapes |= vqgan_level_shapes(f"{prefix}.mid.{j}", now, now)
    for i in reversed(range(len(mults))):
        for j in range(blocks):
            shapes |= vqgan_level_shapes(f"{prefix}.up.{i}.block.{j}", now, base * mults[i])
            now = base * mults[i]
        if i:
            shapes |= {f"{prefix}.up.{i}.upsample_conv.weight": (now, now, 3, 3)}
            shapes |= {f"{prefix}.up.{i}.upsample_conv.bias": (now,)}
    shapes |= norm_shapes(f"{prefix}.norm_out", now)
    return shapes | {f"{prefix}.conv_out.weight": (3, now, 3, 3), f"{prefix}.conv_out.bias": (3,)}


def titok_shapes(config):
    vq, sizes = config["official_config"]["model"]["vq_model"], config["size_overrides"]
    side = config["official_config"]["dataset"]["preprocessing"]["crop_size"]
    legacy, tokens, c = vq.get("is_legacy", True), vq["num_latent_tokens"], vq["token_size"]
    ew, dw = sizes["encoder"]["width"], sizes["decoder"]["width"]
    pe, pd = vq["vit_enc_patch_size"], vq["vit_dec_patch_size"]
    vae = vq.get("quantize_mode") == "vae"
    shapes = {"latent_tokens": (tokens, ew)}
    shapes |= transformer_shapes("encoder", ew, sizes["encoder"]["num_layers"])
    shapes |= transformer_shapes("decoder", dw, sizes["decoder"]["num_layers"])
    for name, width, patch in (("encoder", ew, pe), ("decoder", dw, pd)):
        shapes[f"{name}.positional_embedding"] = ((side // patch) ** 2 + 1, width)
        shapes[f"{name}.latent_token_positional_embedding"] = (tokens, width)
    shapes |= {"encoder.patch_embed.weight": (ew, 3, pe, pe), "encoder.patch_embed.bias": (ew,)}
    out = 2 * c if vae else c
    shapes |= {"encoder.conv_out.weight": (out, ew, 1, 1), "encoder.conv_out.bias": (out,)}
    shapes |= {"decoder.mask_token": (1, 1, dw)} | linear_shapes("decoder.decoder_embed", dw, c)
    if not vae:
        shapes["quantize.embedding.weight"] = (vq["codebook_size"], c)
    if "text_embed_dim" in vq:
        shapes |= linear_shapes("decoder.text_guidance_proj", dw, vq["text_embed_dim"])
        shapes["decoder.text_guidance_positional_embedding"] = (vq["text_context_length"], dw)
    first = 2 * dw if legacy else 3 * pd * pd
    shapes |= {"decoder.ffn.0.weight": (first, dw, 1, 1), "decoder.ffn.0.bias": (first,)}
    if legacy:
        shapes |= {"decoder.ffn.2.weight": (PROXY, first, 1, 1), "decoder.ffn.2.bias": (PROXY,)}
    else:
        shapes |= {"decoder.conv_out.weight": (3, 3, 3, 3), "decoder.conv_out.bias": (3,)}
    if vq.get("finetune_decoder", True):
        pix = sizes["pixel_vqgan"]
        shapes["pixel_quantize.embedding.weight"] = (PROXY, pix["z_channels"])
        shapes |= vqgan_decoder_shapes("pixel_decoder", pix)
    return shapes


def random_weights(shapes, seed):
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in shapes.items():
        noise = torch.randn(shape, generator=generator)
        if ("norm" in name or ".ln_" in name) and name.endswith("weight"):
            weights[name] = 1 + 0.1 * noise
        elif len(shape) > 1 and "embedding" not in name:
            # Logits of some size, so that the pixel decoder's first norm does not blow up what rounding leaves.
            weights[name] = noise / max(1, noise[0].numel()) ** 0.5 * (4 if "ffn.2" in name else 1)
        else:
            weights[name] = 0.5 * noise
    return weights


def layer_norm(x, w, name):
    return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], 1e-5)


def run_transformer(w, side, x, heads, taps):
    """x (B, L, W), through ln_pre and the blocks; attention by torch's own sequence-first function."""
    x = layer_norm(x, w, f"{side}.ln_pre")
    short = side[:3]
    taps[f"{short}.ln_pre"] = x
    depth = len({name.split(".")[2] for name in w if name.startswith(f"{side}.transformer.")})
    for i in range(depth):
        b = f"{side}.transformer.{i}"
        h = layer_norm(x, w, f"{b}.ln_1").transpose(0, 1)
        h, _ = F.multi_head_attention_forward(
            h, h, h, h.shape[-1], heads, w[f"{b}.attn.in_proj_weight"], w[f"{b}.attn.in_proj_bias"], None, None, False,
            0.0, w[f"{b}.attn.out_proj.weight"], w[f"{b}.attn.out_proj.bias"], training=False, need_weights=False,
        )  # fmt: skip
        x = x + h.transpose(0, 1)
        h = F.gelu(F.linear(layer_norm(x, w, f"{b}.ln_2"), w[f"{b}.mlp.c_fc.weight"], w[f"{b}.mlp.c_fc.bias"]))
        x = x + F.linear(h, w[f"{b}.mlp.c_proj.weight"], w[f"{b}.mlp.c_proj.bias"])
        taps[f"{short}.block{i}"] = x
    return x


def encode(w, config, image, taps):
    vq, sizes = config["official_config"]["model"]["vq_model"], config["size_overrides"]["encoder"]
    patch, batch = vq["vit_enc_patch_size"], len(image)
    patches = F.conv2d(image, w["encoder.patch_embed.weight"], w["encoder.patch_embed.bias"], stride=patch)
    taps["enc.patch_embed"] = patches
    x = patches.flatten(2).transpose(1, 2)
    x = torch.cat([w["encoder.class_embedding"].expand(batch, 1, -1), x], 1) + w["encoder.positional_embedding"]
    latents = w["latent_tokens"] + w["encoder.latent_token_positional_embedding"]
    x = torch.cat([x, latents.expand(batch, -1, -1)], 1)
    x = run_transformer(w, "encoder", x, sizes["num_heads"], taps)[:, -len(latents) :]
    x = taps["enc.ln_post"] = layer_norm(x, w, "encoder.ln_post")
    if vq.get("is_legacy", True):  # the (N, W) memory read as (W, N)
        x = torch.stack([row.reshape(-1).reshape(row.shape[1], row.shape[0]) for row in x])
    else:
        x = x.transpose(1, 2)
    z = F.conv2d(x[:, :, None], w["encoder.conv_out.weight"], w["encoder.conv_out.bias"])
    taps["enc.z"] = z
    return z


def quantize(w, z, l2):
    rows, book = z.permute(0, 2, 3, 1).reshape(-1, z.shape[1]), w["quantize.embedding.weight"]
    if l2:
        rows, book = F.normalize(rows, dim=-1), F.normalize(book, dim=-1)
    distance = (rows[:, None].double() - book.double()).square().sum(-1)
    ids = distance.argmin(1)
    two = distance.topk(2, largest=False).values
    codes = book[ids]
    zq = (rows + (codes - rows).detach()).view(z.shape[0], 1, z.shape[-1], -1).permute(0, 3, 1, 2)
    ids = ids.view(z.shape[0], 1, z.shape[-1])
    commitment, codebook = 0.25 * (codes.detach() - rows).square().mean(), (codes - rows.detach()).square().mean()
    return zq, ids, commitment, codebook, (two[:, 1] - two[:, 0]).float()


def look_up(w, ids, l2):
    book = w["quantize.embedding.weight"]
    book = F.normalize(book, dim=-1) if l2 else book
    return book[ids].transpose(1, 2)[:, :, None]


def decode(w, config, zq, text=None, taps=None):
    """Codes (B, C, 1, n) -> logits or RGB of the transformer decoder."""
    taps = {} if taps is None else taps
    vq, sizes = config["official_config"]["model"]["vq_model"], config["size_overrides"]["decoder"]
    patch = vq["vit_dec_patch_size"]
    grid = config["official_config"]["dataset"]["preprocessing"]["crop_size"] // patch
    batch, n = len(zq), zq.shape[-1]
    codes = zq[:, :, 0].transpose(1, 2)
    codes = F.linear(codes, w["decoder.decoder_embed.weight"], w["decoder.decoder_embed.bias"])
    taps["dec.embed"] = codes
    codes = codes + w["decoder.latent_token_positional_embedding"][:n]
    masks = w["decoder.mask_token"].expand(batch, grid * grid, -1)
    x = torch.cat([w["decoder.class_embedding"].expand(batch, 1, -1), masks], 1) + w["decoder.positional_embedding"]
    x = torch.cat([x, codes], 1)
    if text is not None:
        text = F.linear(text, w["decoder.text_guidance_proj.weight"], w["decoder.text_guidance_proj.bias"])
        x = torch.cat([x, text + w["decoder.text_guidance_positional_embedding"]], 1)
    x = run_transformer(w, "decoder", x, sizes["num_heads"], taps)[:, 1 : 1 + grid * grid]
    x = taps["dec.ln_post"] = layer_norm(x, w, "decoder.ln_post")
    x = F.conv2d(x.transpose(1, 2).unflatten(2, (grid, grid)), w["decoder.ffn.0.weight"], w["decoder.ffn.0.bias"])
    if vq.get("is_legacy", True):
        x = F.conv2d(x.tanh(), w["decoder.ffn.2.weight"], w["decoder.ffn.2.bias"])
    else:
        x = x.view(batch, patch, patch, 3, grid, grid).permute(0, 3, 4, 1, 5, 2)
        x = x.reshape(batch, 3, grid * patch, grid * patch)
        x = F.conv2d(x, w["decoder.conv_out.weight"], w["decoder.conv_out.bias"], padding=1)
    taps["dec.out"] = x
    return x


def res_block(w, name, x):
    h = F.conv2d(group_norm(w, f"{name}.norm1", x), w[f"{name}.conv1.weight"], padding=1)
    h = F.conv2d(group_norm(w, f"{name}.norm2", h), w[f"{name}.conv2.weight"], padding=1)
    if f"{name}.nin_shortcut.weight" in w:  # fed with the branch, as released
        return h + F.conv2d(h, w[f"{name}.nin_shortcut.weight"])
    return x + h


def group_norm(w, name, x):
    return F.silu(F.group_norm(x, 32, w[f"{name}.weight"], w[f"{name}.bias"], 1e-6))


def vqgan_encode(w, image, pix):
    x = F.conv2d(image, w["encoder.conv_in.weight"], padding=1)
    for i in range(len(pix["channel_mult"])):
        for j in range(pix["num_res_blocks"]):
            x = res_block(w, f"encoder.down.{i}.block.{j}", x)
        if i < len(pix["channel_mult"]) - 1:
            x = F.avg_pool2d(x, 2)
    for j in range(pix["num_res_blocks"]):
        x = res_block(w, f"encoder.mid.{j}", x)
    x = F.conv2d(group_norm(w, "encoder.norm_out", x), w["encoder.conv_out.weight"], w["encoder.conv_out.bias"])
    rows = x.flatten(2).transpose(1, 2)
    return torch.cdist(rows.double(), w["quantize.embedding.weight"].double()).argmin(-1)


def vqgan_decode(w, prefix, x, pix, taps=None):
    taps = {} if taps is None else taps
    x = taps["pix.conv_in"] = F.conv2d(x, w[f"{prefix}.conv_in.weight"], w[f"{prefix}.conv_in.bias"], padding=1)
    for j in range(pix["num_res_blocks"]):
        x = taps[f"pix.mid{j}"] = res_block(w, f"{prefix}.mid.{j}", x)
    for i in reversed(range(len(pix["channel_mult"]))):
        for j in range(pix["num_res_blocks"]):
            x = res_block(w, f"{prefix}.up.{i}.block.{j}", x)
        if i:
            up = f"{prefix}.up.{i}.upsample_conv"
            x = F.conv2d(F.interpolate(x, scale_factor=2), w[f"{up}.weight"], w[f"{up}.bias"], padding=1)
        taps[f"pix.up{i}"] = x
    return F.conv2d(
        group_norm(w, f"{prefix}.norm_out", x), w[f"{prefix}.conv_out.weight"], w[f"{prefix}.conv_out.bias"], padding=1
    )


def soft_decode(w, logits, pix, taps=None):
    """The stage-2 path: expected proxy code, then the pixel decoder."""
    taps = {} if taps is None else taps
    expected = torch.einsum("nkhw,kd->ndhw", logits.softmax(1), w["pixel_quantize.embedding.weight"])
    taps["dec.soft_embedding"] = expected
    return vqgan_decode(w, "pixel_decoder", expected, pix, taps)
