"""SEED once more, as plain functions over official keys, to record new cases with.

Written from the description of the authors' code and sharing nothing with ours: one product a weight, the causal mask
as -10000, all distances at once.
"""

import torch
import torch.nn.functional as F


def arch(
    hidden=24, layers=3, heads=2, intermediate=20, img=12, patch=4, num_query=32, codebook_dim=5, n_embed=40,
    image_dim=10, decode_depth=1, vit_dim=12, vit_depth=2, vit_heads=3, itc_dim=6,
):  # fmt: skip
    vit = {"patch": patch, "dim": vit_dim, "depth": vit_depth, "heads": vit_heads, "mlp_ratio": 4.3637}
    return {
        "bert_vocab": 30, "hidden": hidden, "layers": layers, "heads": heads, "intermediate": intermediate,
        "max_pos": 16, "img": img, "num_query": num_query, "codebook_dim": codebook_dim, "n_embed": n_embed,
        "image_dim": image_dim, "decode_depth": decode_depth, "vit": vit, "itc_dim": itc_dim,
    }  # fmt: skip


def linear(shapes, name, inner, outer, bias=True):
    shapes[f"{name}.weight"] = (outer, inner)
    if bias:
        shapes[f"{name}.bias"] = (outer,)


def norm(shapes, name, width):
    shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (width,)


def encoder_shapes(a):
    vit, width = a["vit"], a["vit"]["dim"]
    shapes = {
        "query_tokens": (1, a["num_query"], a["hidden"]), "visual_encoder.cls_token": (1, 1, width),
        "visual_encoder.pos_embed": (1, (a["img"] // vit["patch"]) ** 2 + 1, width),
        "visual_encoder.patch_embed.proj.weight": (width, 3, vit["patch"], vit["patch"]),
        "visual_encoder.patch_embed.proj.bias": (width,),
    }  # fmt: skip
    for number in range(vit["depth"]):
        block = f"visual_encoder.blocks.{number}"
        norm(shapes, f"{block}.norm1", width)
        shapes |= {f"{block}.attn.q_bias": (width,), f"{block}.attn.v_bias": (width,)}
        linear(shapes, f"{block}.attn.qkv", width, 3 * width, bias=False)
        linear(shapes, f"{block}.attn.proj", width, width)
        norm(shapes, f"{block}.norm2", width)
        hidden = int(width * vit["mlp_ratio"])
        linear(shapes, f"{block}.mlp.fc1", width, hidden)
        linear(shapes, f"{block}.mlp.fc2", hidden, width)
    norm(shapes, "ln_vision", width)
    return shapes | qformer_shapes("Qformer.bert", a, width)


def qformer_shapes(prefix, a, features, reads_text=False):
    width, shapes = a["hidden"], {}
    norm(shapes, f"{prefix}.embeddings.LayerNorm", width)
    for number in range(a["layers"]):
        layer = f"{prefix}.encoder.layer.{number}"
        for block, inner in (("attention", width), ("crossattention", features)):
            if block == "crossattention" and number % 2:
                continue
            linear(shapes, f"{layer}.{block}.self.query", width, width)
            linear(shapes, f"{layer}.{block}.self.key", inner, width)
            linear(shapes, f"{layer}.{block}.self.value", inner, width)
            linear(shapes, f"{layer}.{block}.output.dense", width, width)
            norm(shapes, f"{layer}.{block}.output.LayerNorm", width)
        linear(shapes, f"{layer}.intermediate_query.dense", width, a["intermediate"])
        linear(shapes, f"{layer}.output_query.dense", a["intermediate"], width)
        norm(shapes, f"{layer}.output_query.LayerNorm", width)
    return shapes


def tokenizer_shapes(a, reverse=False):
    width, code = a["hidden"], a["codebook_dim"]
    shapes = encoder_shapes(a) | {
        "pos_embed": (1, a["num_query"], width), "pos_embed_image": (1, a["num_query"], width),
        "quantize.embedding.weight": (a["n_embed"], code),
    }  # fmt: skip
    linear(shapes, "encode_task_layer.0", width, width)
    linear(shapes, "encode_task_layer.2", width, code)
    linear(shapes, "decode_task_layer.0", code, code)
    linear(shapes, "decode_task_layer.2", code, width)
    for stack in ("blocks", "blocks_image"):
        for number in range(a["decode_depth"]):
            block = f"{stack}.{number}"
            norm(shapes, f"{block}.norm1", width)
            norm(shapes, f"{block}.norm2", width)
            linear(shapes, f"{block}.attn.qkv", width, 3 * width)
            linear(shapes, f"{block}.attn.proj", width, width)
            linear(shapes, f"{block}.mlp.fc1", width, 4 * width)
            linear(shapes, f"{block}.mlp.fc2", 4 * width, width)
    if reverse:
        shapes |= qformer_shapes("Reverse_Qformer.bert", a, width) | {"reverse_tokens": (1, 1, width)}
        linear(shapes, "distill_image_proj", width, a["image_dim"])
    else:
        for number, (inner, outer) in {0: (width, 256), 2: (256, 128), 4: (128, 32)}.items():
            linear(shapes, f"image_down.{number}", inner, outer, bias=False)
        linear(shapes, "distill_image_proj", 32 * a["num_query"], a["image_dim"])
    return shapes


def contrast_shapes(a):
    shapes = encoder_shapes(a) | {
        "temp": (), "Qformer.bert.embeddings.word_embeddings.weight": (a["bert_vocab"], a["hidden"]),
        "Qformer.bert.embeddings.position_embeddings.weight": (a["max_pos"], a["hidden"]),
    }  # fmt: skip
    for number in range(a["layers"]):
        layer = f"Qformer.bert.encoder.layer.{number}"
        linear(shapes, f"{layer}.intermediate.dense", a["hidden"], a["intermediate"])
        linear(shapes, f"{layer}.output.dense", a["intermediate"], a["hidden"])
        norm(shapes, f"{layer}.output.LayerNorm", a["hidden"])
    linear(shapes, "vision_proj", a["hidden"], a["itc_dim"])
    linear(shapes, "text_proj", a["hidden"], a["itc_dim"])
    return shapes


def random_weights(shapes, seed):
    draw = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in shapes.items():
        value = torch.randn(shape, generator=draw)
        is_norm = "norm" in name.lower() or name.startswith("ln_")
        if len(shape) == 0:
            value = value.abs() * 0.1 + 0.2
        elif is_norm and name.endswith("weight"):
            value = 1 + 0.2 * value
        elif len(shape) == 1:
            value = 0.1 * value
        elif len(shape) == 2 and "embedding" not in name:
            value = value * shape[1] ** -0.5
        weights[name] = value
    return weights


def affine(w, name, x):
    return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0)


def layer_norm(w, name, x, eps):
    centred = x - x.mean(-1, keepdim=True)
    scaled = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
    return scaled * w[f"{name}.weight"] + w[f"{name}.bias"]


def gelu(x):
    return 0.5 * x * (1 + torch.erf(x / 2**0.5))


def attend(q, k, v, heads, mask=0.0):
    """Heads apart, scores, softmax, heads together."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5 + mask
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


def vision(w, a, image):
    vit = a["vit"]
    weight, bias = (w[f"visual_encoder.patch_embed.proj.{kind}"] for kind in ("weight", "bias"))
    x = F.conv2d(image, weight, bias, stride=vit["patch"]).flatten(2).transpose(1, 2)
    x = torch.cat([w["visual_encoder.cls_token"].expand(len(x), -1, -1), x], 1) + w["visual_encoder.pos_embed"]
    for number in range(vit["depth"]):
        block = f"visual_encoder.blocks.{number}"
        q_bias, v_bias = w[f"{block}.attn.q_bias"], w[f"{block}.attn.v_bias"]
        bias = torch.cat([q_bias, torch.zeros_like(q_bias), v_bias])
        qkv = layer_norm(w, f"{block}.norm1", x, 1e-6) @ w[f"{block}.attn.qkv.weight"].T + bias
        x = x + affine(w, f"{block}.attn.proj", attend(*qkv.chunk(3, -1), vit["heads"]))
        x = x + affine(
            w, f"{block}.mlp.fc2", gelu(affine(w, f"{block}.mlp.fc1", layer_norm(w, f"{block}.norm2", x, 1e-6)))
        )
    return x, layer_norm(w, "ln_vision", x, 1e-5)


def bert_attention(w, name, x, other, heads, mask):
    q, k, v = affine(w, f"{name}.self.query", x), *(affine(w, f"{name}.self.{p}", other) for p in ("key", "value"))
    out = affine(w, f"{name}.output.dense", attend(q, k, v, heads, mask))
    return layer_norm(w, f"{name}.output.LayerNorm", out + x, 1e-12)


def feed_forward(w, layer, kind, x):
    out = affine(w, f"{layer}.output{kind}.dense", gelu(affine(w, f"{layer}.intermediate{kind}.dense", x)))
    return layer_norm(w, f"{layer}.output{kind}.LayerNorm", out + x, 1e-12)


def qformer(w, prefix, a, queries, features, taps=None):
    taps = {} if taps is None else taps
    count = queries.shape[1]
    mask = torch.ones(count, count).triu(1) * -10000.0 if count == 32 else 0.0
    x = taps["qformer_hidden_0"] = layer_norm(w, f"{prefix}.embeddings.LayerNorm", queries, 1e-12).expand(
        len(features), -1, -1
    )
    for number in range(a["layers"]):
        layer = f"{prefix}.encoder.layer.{number}"
        x = bert_attention(w, f"{layer}.attention", x, x, a["heads"], mask)
        if number % 2 == 0:
            x = bert_attention(w, f"{layer}.crossattention", x, features, a["heads"], 0.0)
        x = feed_forward(w, layer, "_query", x)
        taps.setdefault("qformer_hidden_1", x)
    return x


def read_text(w, a, ids, is_token):
    words = w["Qformer.bert.embeddings.word_embeddings.weight"][ids]
    places = w["Qformer.bert.embeddings.position_embeddings.weight"][: ids.shape[1]]
    x = layer_norm(w, "Qformer.bert.embeddings.LayerNorm", words + places, 1e-12)
    mask = (1 - is_token[:, None, None, :].float()) * -10000.0
    for number in range(a["layers"]):
        layer = f"Qformer.bert.encoder.layer.{number}"
        x = feed_forward(w, layer, "", bert_attention(w, f"{layer}.attention", x, x, a["heads"], mask))
    return x


def quantize(w, z):
    """Ids, codes, the loss with its legacy weights, and how clear the closest choice is."""
    codes = w["quantize.embedding.weight"]
    distances = z.square().sum(-1, keepdim=True) + codes.square().sum(-1) - 2 * z @ codes.T
    nearest = distances.double().topk(2, largest=False).values
    ids = distances.argmin(-1)
    q = codes[ids]
    loss = (q.detach() - z).square().mean() + 0.25 * (q - z.detach()).square().mean()
    return ids, z + (q - z).detach(), loss, float(((nearest[..., 1] - nearest[..., 0]) / nearest[..., 1]).min())


def blocks(w, stack, a, x):
    for number in range(a["decode_depth"]):
        block = f"{stack}.{number}"
        qkv = affine(w, f"{block}.attn.qkv", layer_norm(w, f"{block}.norm1", x, 1e-6))
        x = x + affine(w, f"{block}.attn.proj", attend(*qkv.chunk(3, -1), 12))
        x = x + affine(
            w, f"{block}.mlp.fc2", gelu(affine(w, f"{block}.mlp.fc1", layer_norm(w, f"{block}.norm2", x, 1e-6)))
        )
    return x


def encode_down(w, z):
    return affine(w, "encode_task_layer.2", torch.tanh(affine(w, "encode_task_layer.0", z)))


def decode_up(w, codes):
    return affine(w, "decode_task_layer.2", torch.tanh(affine(w, "decode_task_layer.0", codes)))


def head(w, a, x, taps=None):
    taps = {} if taps is None else taps
    if "reverse_tokens" in w:
        return affine(w, "distill_image_proj", qformer(w, "Reverse_Qformer.bert", a, w["reverse_tokens"], x))[:, 0]
    for number in (0, 2, 4):
        x = affine(w, f"image_down.{number}", x)
        x = x if number == 4 else x.clamp(min=0)
    taps["image_down_out"] = x
    return affine(w, "distill_image_proj", x.flatten(1))


def embedding_of(w, a, codes, taps=None):
    taps = {} if taps is None else taps
    up = taps["decode_up"] = decode_up(w, codes)
    out = taps["blocks_image_out"] = blocks(w, "blocks_image", a, up + w["pos_embed_image"])
    taps["recon_s_out"] = blocks(w, "blocks", a, up + w["pos_embed"])
    taps["image_embedding"] = head(w, a, out, taps)
    return taps["image_embedding"]


def record_tokenizer(w, a, image, free_ids):
    """The tensors of a case, and how clear the closest choice of a code is."""
    io = {"image": image, "free_ids": free_ids}
    io["vit_out"], io["image_embeds"] = vision(w, a, image)
    io["qformer_out"] = qformer(w, "Qformer.bert", a, w["query_tokens"], io["image_embeds"], io)
    io["encode_down"] = encode_down(w, io["qformer_out"])
    io["indices"], io["quantized_st"], loss, margin = quantize(w, io["encode_down"])
    io["vq_loss"] = loss[None]
    io["decode_up_from_encode"] = decode_up(w, io["quantized_st"])
    io["codebook_entry"] = w["quantize.embedding.weight"][io["indices"]]
    embedding_of(w, a, io["codebook_entry"], io)
    io["free_ids_image_embedding"] = embedding_of(w, a, w["quantize.embedding.weight"][free_ids])
    return io, margin
