"""TokenFlow written out plainly, on official keys and without any speed-up, to make parity cases of new sizes."""

import torch
import torch.nn.functional as F
from mediatok.convert import tokenflow_keys


def random_weights(shapes, seed):
    rng = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in shapes.items():
        x = torch.randn(*shape, generator=rng)
        if name.startswith("scaling_layer"):
            weights[name] = torch.full(shape, 0.5)
        elif len(shape) == 1 and "embedding" not in name:
            weights[name] = 1 + 0.2 * x if name.endswith("weight") else 0.1 * x
        elif "quantize" in name:
            weights[name] = x
        elif any(part in name for part in ("embed", "token", "pos_1LC")):
            weights[name] = 0.3 * x
        else:
            weights[name] = x / x[0].numel() ** 0.5
    return weights


def linear(w, name, x):
    return F.linear(x, w[f"{name}.weight"], w.get(f"{name}.bias"))


def conv(w, name, x, **options):
    return F.conv2d(x, w[f"{name}.weight"], w.get(f"{name}.bias"), **options)


def layer_norm(w, name, x, eps):
    return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], eps)


def group_norm(w, name, x):
    return F.group_norm(x, 32, w[f"{name}.weight"], w[f"{name}.bias"], 1e-6)


def heads_attention(q, k, v, heads):
    batch, length, width = q.shape
    q, k, v = (x.view(batch, -1, heads, width // heads).transpose(1, 2) for x in (q, k, v))
    y = (q @ k.transpose(-1, -2) / (width // heads) ** 0.5).softmax(-1) @ v
    return y.transpose(1, 2).reshape(batch, length, width)


def positions(table, grid):
    side = int(len(table) ** 0.5)
    extra = len(table) - side**2
    if side == grid:
        return table
    square = table[extra:].view(1, side, side, -1).permute(0, 3, 1, 2)
    square = F.interpolate(square, scale_factor=(grid + 0.1) / side, mode="bicubic")
    return torch.cat([table[:extra], square.permute(0, 2, 3, 1).reshape(grid**2, -1)])


def clip_tower(w, prefix, x, heads):
    w = {key.removeprefix(prefix): value for key, value in w.items() if key.startswith(prefix)}
    patch = w["conv1.weight"].shape[-1]
    x = F.conv2d(x, w["conv1.weight"], stride=patch)
    grid = x.shape[-1]
    x = torch.cat([w["class_embedding"].expand(len(x), 1, -1), x.flatten(2).transpose(1, 2)], dim=1)
    x = layer_norm(w, "ln_pre", x + positions(w["positional_embedding"], grid), 1e-5)
    number = 0
    while (block := f"transformer.resblocks.{number}") + ".ln_1.weight" in w:
        y = layer_norm(w, f"{block}.ln_1", x, 1e-5)
        qkv = F.linear(y, w[f"{block}.attn.in_proj_weight"], w[f"{block}.attn.in_proj_bias"]).chunk(3, -1)
        x = x + linear(w, f"{block}.attn.out_proj", heads_attention(*qkv, heads))
        y = linear(w, f"{block}.mlp.c_fc", layer_norm(w, f"{block}.ln_2", x, 1e-5))
        x = x + linear(w, f"{block}.mlp.c_proj", y * torch.sigmoid(1.702 * y))
        number += 1
    return layer_norm(w, "ln_post", x, 1e-5)[:, 1:]


def siglip_tower(w, x, heads, depth):
    prefix = "encoder_vqkd.vision_model."
    w = {key.removeprefix(prefix): value for key, value in w.items() if key.startswith(prefix)}
    weight = w["embeddings.patch_embedding.weight"]
    x = conv(w, "embeddings.patch_embedding", x, stride=weight.shape[-1]).flatten(2).transpose(1, 2)
    x = x + w["embeddings.position_embedding.weight"]
    for number in range(depth):
        block = f"encoder.layers.{number}"
        y = layer_norm(w, f"{block}.layer_norm1", x, 1e-6)
        qkv = (linear(w, f"{block}.self_attn.{part}_proj", y) for part in "qkv")
        x = x + linear(w, f"{block}.self_attn.out_proj", heads_attention(*qkv, heads))
        y = linear(w, f"{block}.mlp.fc1", layer_norm(w, f"{block}.layer_norm2", x, 1e-6))
        x = x + linear(w, f"{block}.mlp.fc2", F.gelu(y, approximate="tanh"))
    return x


def semantic_decoder(w, x, heads):
    grid = x.shape[-1]
    x = conv(w, "decoder_vqkd.patch_embed.proj", x).flatten(2).transpose(1, 2)
    x = torch.cat([w["decoder_vqkd.cls_token"].expand(len(x), -1, -1), x], dim=1)
    x = x + positions(w["decoder_vqkd.pos_embed"][0], grid)
    number = 0
    while (block := f"decoder_vqkd.blocks.{number}") + ".norm1.weight" in w:
        q, k, v = F.linear(layer_norm(w, f"{block}.norm1", x, 1e-6), w[f"{block}.attn.qkv.weight"]).chunk(3, -1)
        y = heads_attention(q + w[f"{block}.attn.q_bias"], k, v + w[f"{block}.attn.v_bias"], heads)
        x = x + linear(w, f"{block}.attn.proj", y)
        y = linear(w, f"{block}.mlp.fc1", layer_norm(w, f"{block}.norm2", x, 1e-6))
        x = x + linear(w, f"{block}.mlp.fc2", F.gelu(y))
        number += 1
    return layer_norm(w, "decoder_vqkd.fc_norm", x[:, 1:], 1e-6)


def task_layer(w, name, x):
    return linear(w, f"{name}.2", linear(w, f"{name}.0", x).tanh())


def resnet(w, name, x):
    y = conv(w, f"{name}.conv1", F.silu(group_norm(w, f"{name}.norm1", x)), padding=1)
    y = conv(w, f"{name}.conv2", F.silu(group_norm(w, f"{name}.norm2", y)), padding=1)
    return (conv(w, f"{name}.nin_shortcut", x) if f"{name}.nin_shortcut.weight" in w else x) + y


def attn(w, name, x):
    y = group_norm(w, f"{name}.norm", x)
    q, k, v = (conv(w, f"{name}.{part}", y).flatten(2).transpose(1, 2) for part in "qkv")
    y = heads_attention(q, k, v, 1).transpose(1, 2).view_as(x)
    return x + conv(w, f"{name}.proj_out", y)


def cnn(w, name, x, levels, blocks):
    def middle(x):
        return resnet(w, f"{name}.mid.2", attn(w, f"{name}.mid.1", resnet(w, f"{name}.mid.0", x)))

    x = conv(w, f"{name}.conv_in", x, padding=1)
    x = middle(x) if name == "decoder" else x
    for level in range(levels):
        stem = f"{name}.conv_blocks.{level}"
        for block in range(blocks):
            x = resnet(w, f"{stem}.res.{block}", x)
            x = attn(w, f"{stem}.attn.{block}", x) if f"{stem}.attn.{block}.q.weight" in w else x
        if level < levels - 1:
            if name == "encoder":
                x = conv(w, f"{stem}.downsample.conv", F.pad(x, (0, 1, 0, 1)), stride=2)
            else:
                x = conv(w, f"{stem}.upsample.conv", F.interpolate(x, scale_factor=2), padding=1)
    x = middle(x) if name == "encoder" else x
    return conv(w, f"{name}.conv_out", F.silu(group_norm(w, f"{name}.norm_out", x)), padding=1)


def bicubic(x, side):
    return F.interpolate(x, size=(side, side), mode="bicubic", align_corners=False)


def pairs(w):
    return [F.normalize(w[f"quantize.embedding_{part}.weight"], dim=-1) for part in ("vqkd", "vqgan")]


def quantize(w, h, sides, left_out=None):
    """Ids, sum, the small maps, and the codebook and commitment losses."""
    semantic, pixel = pairs(w)
    residual, total, ids, small, losses = h, 0, [], [], []
    for number, side in enumerate(sides):
        if number == left_out:
            continue
        z = F.adaptive_avg_pool2d(residual, side)
        small.append(z)
        rows = z.permute(0, 2, 3, 1).flatten(0, 2)
        a, b = rows.split([semantic.shape[1], pixel.shape[1]], dim=1)
        a, b = F.normalize(a, dim=-1), F.normalize(b, dim=-1)
        distance = (a[:, None] - semantic).square().sum(-1) + (b[:, None] - pixel).square().sum(-1)
        index = distance.argmin(dim=1)
        rows, codes = torch.cat([a, b], 1), torch.cat([semantic[index], pixel[index]], 1)
        losses.append(torch.stack([F.mse_loss(codes, rows.detach()), 0.25 * F.mse_loss(rows, codes.detach())]))
        codes = rows + (codes - rows).detach()
        up = bicubic(codes.view(len(h), side, side, -1).permute(0, 3, 1, 2), sides[-1])
        total, residual = total + up, residual - up.detach()
        ids.append(index.view(len(h), -1))
    return torch.cat(ids, 1), total, small, torch.stack(losses).mean(0)


def lookup(w, ids, sides):
    semantic, pixel = pairs(w)
    total, start = 0, 0
    for side in sides:
        if start + side**2 > ids.shape[1]:
            break
        codes = torch.cat([semantic, pixel], 1)[ids[:, start : start + side**2]]
        total = total + bicubic(codes.view(len(ids), side, side, -1).permute(0, 3, 1, 2), sides[-1])
        start += side**2
    return total


def encode(w, c, image_u8, io):
    """What is quantized; `c` is the constructor of the case."""
    x = (image_u8.float() / 255 - 0.5) / 0.5
    if c["teacher"] == "siglip_384":
        semantic = siglip_tower(w, x, c["sem_heads"], c["sem_layers"] - 1)
    else:
        semantic = clip_tower(w, "encoder_vqkd.", x, c["sem_heads"])
    levels, side = len(c["ch_mult"]), c["scales"][-1]
    full = side * 2 ** (levels - 1)
    x = x if full == x.shape[-1] else bicubic(x, full)
    pixel = cnn(w, "encoder", x, levels, 2)
    io |= {"encode.semantic_feature": semantic, "encode.pixel_encoder_input": x, "encode.pixel_feature": pixel}
    semantic = io["encode.semantic_code_input"] = task_layer(w, "encode_task_layer", semantic)
    pixel = io["encode.pixel_code_input"] = conv(w, "quant_conv", pixel)
    return torch.cat([semantic.transpose(1, 2).unflatten(2, (side, side)), pixel], dim=1)


def decode(w, c, q):
    """Semantic features and the picture in [-1, 1]."""
    width = w["quantize.embedding_vqkd.weight"].shape[1]
    blocks = 5 if c["enhanced_decoder"] else 3
    semantic = task_layer(w, "decode_task_layer", semantic_decoder(w, q[:, :width], c["sem_dec_heads"]))
    image = cnn(w, "decoder", conv(w, "post_quant_conv", q[:, width:]), len(c["ch_mult"]), blocks)
    return semantic, image if image.shape[-1] == c["image_size"] else bicubic(image, c["image_size"])


def tokenizer_shapes(c):
    """Official shapes of a constructor."""
    is_clip = c["teacher"] == "clipb_224"
    return tokenflow_keys.official_shapes({
        "tower": "clip" if is_clip else "siglip", "tower_width": c["sem_width"], "tower_hidden": c["sem_mlp"],
        "tower_patch": c["sem_patch"], "tower_grid": c["sem_image_size"] // c["sem_patch"],
        "tower_depth": c["sem_layers"] - (not is_clip), "semantic_width": c["sem_dec_width"],
        "semantic_grid": c["sem_dec_grid"], "semantic_depth": c["sem_dec_depth"], "teacher_width": c["sem_dec_out"],
        "semantic_code_width": c["semantic_code_dim"], "codebook_size": c["codebook_size"],
        "pixel": c["codebook_embed_dim"], "pixel_code_width": c["codebook_embed_dim"], "z_channels": c["z_channels"],
        "channels": c["ch"], "multipliers": c["ch_mult"], "res_blocks": 2,
        "decoder_channels": c["enhanced_ch"] if c["enhanced_decoder"] else c["ch"],
        "decoder_res_blocks": 4 if c["enhanced_decoder"] else 2,
    })  # fmt: skip


# Text to image, without a cache.


def rms(w, name, x, eps):
    return w[f"{name}.weight"] * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


def rotary(x, theta):
    half = x.shape[-1] // 2
    angle = torch.arange(x.shape[-2])[:, None].float() * theta ** -(torch.arange(half).float() / half)
    cos, sin = (torch.cat([part, part], -1) for part in (angle.cos(), angle.sin()))
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin


def llama(w, lm, x, allowed):
    heads, kv_heads = lm["heads"], lm["kv_heads"]
    mask = torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)[:, None]
    for number in range(lm["layers"]):
        layer = f"model.layers.{number}"
        q, k, v = (linear(w, f"{layer}.self_attn.{part}_proj", x) for part in "qkv")
        q, k, v = (y.unflatten(2, (n, -1)).transpose(1, 2) for y, n in ((q, heads), (k, kv_heads), (v, kv_heads)))
        q, k = (
            rms(w, f"{layer}.self_attn.qknorm.query_norm", q, 1e-6),
            rms(w, f"{layer}.self_attn.qknorm.key_norm", k, 1e-6),
        )
        q, k = rotary(q, lm["rope_theta"]), rotary(k, lm["rope_theta"])
        k, v = (y.repeat_interleave(heads // kv_heads, dim=1) for y in (k, v))
        shares = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5 + mask).softmax(-1)
        y = linear(w, f"{layer}.self_attn.o_proj", (shares @ v).transpose(1, 2).flatten(2))
        x = x + rms(w, f"{layer}.input_layernorm", y, lm["rms_norm_eps"])
        y = F.silu(linear(w, f"{layer}.mlp.gate_proj", x)) * linear(w, f"{layer}.mlp.up_proj", x)
        x = x + rms(w, f"{layer}.post_attention_layernorm", linear(w, f"{layer}.mlp.down_proj", y), lm["rms_norm_eps"])
    return linear(w, "lm_head", rms(w, "model.norm", x, lm["rms_norm_eps"]))


def sequence(w, lm, sides, prefix, maps):
    """Rows and what each sees, of a prefix and of the maps that the scales from the second on read."""
    rows = w["model.embed_tokens.weight"][prefix] + w["model.lvl_embed.weight"][0]
    rows[:, -1] += w["model.pos_1LC"][0]
    parts, scale_of, place = [rows], [-1] * (prefix.shape[1] - 1) + [0], 1
    for number, grid in enumerate(maps, start=1):
        flat = grid.flatten(2).transpose(1, 2)
        y = linear(w, "model.mm_projector.2", F.gelu(linear(w, "model.mm_projector.0", flat)))
        y = y + w["model.lvl_embed.weight"][number + 1] + w["model.pos_1LC"][place : place + flat.shape[1]]
        parts.append(y)
        scale_of += [number] * flat.shape[1]
        place += flat.shape[1]
    scale_of = torch.tensor(scale_of)
    allowed = torch.ones(len(scale_of), len(scale_of)).tril().bool()
    image = scale_of >= 0
    allowed |= image[:, None] & image & (scale_of[:, None] >= scale_of)
    padded = F.pad(prefix == lm["pad"], (0, len(scale_of) - prefix.shape[1]))
    return torch.cat(parts, dim=1), allowed & ~padded[:, None]


def filtered(logits, k, p):
    logits = logits.masked_fill(logits < logits.topk(min(k, logits.shape[-1])).values[..., -1:], -torch.inf)
    if p:
        ordered, order = logits.sort(dim=-1)
        drop = ordered.softmax(-1).cumsum(-1) <= 1 - p
        drop[..., -1] = False
        logits = logits.masked_fill(torch.zeros_like(drop).scatter(-1, order, drop), -torch.inf)
    return logits.softmax(-1)


def generate(w, lm, tokenizer, sides, prefix, lists, cfg, rng, loop):
    """One loop of a t2i case: its recorded tensors; `prefix` has the conditional rows first."""
    io, codes, maps, ids = {}, torch.cat(pairs(tokenizer), 1), [], []
    batch, first = len(prefix) // 2, lm["image_token_start"]
    running = None
    for number, side in enumerate(sides):
        before = None if number == 0 else bicubic(running, side)
        given = before
        for turn, (k, p) in enumerate(zip(lists["topk_list"], lists["topp_list"], strict=True)):
            if turn and number == 0:
                break
            read = [*maps, *([given] if number else [])]
            rows, allowed = sequence(w, lm, sides, prefix, [torch.cat([grid, grid]) for grid in read])
            logits = llama(w, lm, rows, allowed)[:, prefix.shape[1] - 1 :]
            name = f"{loop}.scale{number}.pass{turn}"
            io |= {
                f"{name}.inputs_embeds": rows,
                f"{name}.logits": logits,
                f"{name}.attention_allowed": allowed[:, None],
            }
            t = cfg * number / (len(sides) - 1)
            cond, uncond = logits[:, -(side**2) :, first:].chunk(2)
            shares = filtered((1 + t) * cond - t * uncond, k, p)
            noise = torch.rand(shares.shape, generator=rng).clamp(min=1e-6).log().neg()
            drawn = (shares / noise).argmax(-1)
            io |= {f"{name}.probs": shares, f"{name}.exp_noise": noise, f"{name}.tokens": drawn}
            square = codes[drawn].view(batch, side, side, -1).permute(0, 3, 1, 2)
            running = square if before is None else before + square
            given = running
        if number:
            maps.append(before)
        ids.append(drawn)
    return io | {f"{loop}.codes": torch.cat(ids, 1)}
