"""xAR, MaskGIT and the KL autoencoder once more, as plain functions over official keys, to record new cases with.

Written from the descriptions of the authors' code and sharing nothing with ours: no caches, no skipped work, dense
masks, doubled batches as the authors run them.
"""

import math

import torch
import torch.nn.functional as F


def linear(w, key, x):
    return x @ w[f"{key}.weight"].T + w.get(f"{key}.bias", 0)


def heads_of(x, heads):
    return x.reshape(*x.shape[:2], heads, -1).transpose(1, 2)


def attend(q, k, v, mask=None):
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


def gelu(x):
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


# xAR


def xar_config(kind, grid, side, width, depths, heads, classes=1000, channels=16, mlp_ratio=4, **more):
    cells = (grid // side) ** 2
    constructor = {
        "img_size": 16 * grid, "vae_stride": 16, "patch_size": 1, "encoder_embed_dim": width, "class_num": classes,
        "encoder_depth": depths[0], "encoder_num_heads": heads, "decoder_embed_dim": width, "decoder_depth": depths[1],
        "decoder_num_heads": heads, "mlp_ratio": mlp_ratio, "vae_embed_dim": channels, "label_drop_prob": 0.1,
        "attn_dropout": 0.0, "proj_dropout": 0.0, "clusters": cells,
    }  # fmt: skip
    geometry = {"grid": grid, "cells_per_side": grid // side, "cell_side": side, "cells": cells}
    return {"system": "xar", "kind": kind, "constructor": constructor, "geometry": geometry, **more}


def xar_shapes(config):
    c, tokens = config["constructor"], config["geometry"]["grid"] ** 2
    d, channels = c["encoder_embed_dim"], c["vae_embed_dim"]
    hidden = int(d * c["mlp_ratio"] * 2 / 3)
    linears = {"time_embed.mlp.0": (d, 256), "time_embed.mlp.2": (d, d), "z_proj": (d, channels)}
    linears |= {"decoder_embed": (d, d), "pred": (channels, d)}
    for stack in ("encoder", "decoder"):
        for i in range(c[f"{stack}_depth"]):
            at = f"{stack}_blocks.{i}"
            linears |= {f"{at}.attn.qkv": (3 * d, d), f"{at}.attn.proj": (d, d), f"{at}.ada_lin.1": (6 * d, d)}
            linears |= {f"{at}.mlp.fc1_g": (hidden, d), f"{at}.mlp.fc1_x": (hidden, d), f"{at}.mlp.fc2": (d, hidden)}
    shapes = {"class_emb.weight": (c["class_num"] + 1, d)}
    shapes |= {f"{stack}_pos_embed_learned": (1, tokens, d) for stack in ("encoder", "decoder")}
    shapes |= {f"{name}.weight": (d,) for name in ("z_proj_ln", "encoder_norm", "decoder_norm")}
    shapes |= {f"{key}.weight": shape for key, shape in linears.items()}
    return shapes | {f"{key}.bias": shape[:1] for key, shape in linears.items()}


def cells_of(latents, side):
    """[B, C, G, G] as [N, B, L, C]."""
    rows = latents.unfold(2, side, side).unfold(3, side, side)  # b c row column y x
    return rows.permute(2, 3, 0, 4, 5, 1).flatten(3, 4).flatten(0, 1)


def map_of(cells, grid, side):
    _, b, _, channels = cells.shape
    x = cells.reshape(grid // side, grid // side, b, side, side, channels)
    return x.permute(2, 5, 0, 3, 1, 4).reshape(b, channels, grid, grid)


def positions_of(grid, side):
    """Row and column of each token in the order of the sequence."""
    n = grid // side
    return [(a * side + y, b * side + x) for a in range(n) for b in range(n) for y in range(side) for x in range(side)]


def rms(x, weight=1.0):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * weight


def turn(x, places):
    """Rotary embedding: neighbouring pairs as complex numbers."""
    half = x.shape[-1] // 2
    freqs = 10000.0 ** (-torch.arange(0, half, 2).float() / half)
    angles = torch.stack([torch.cat([r * freqs, c * freqs]) for r, c in places])
    pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2).contiguous())
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(-2)


def xar_network(w, config, x, index, labels, cells, taps=None):
    """Velocities of the tokens x [B, n * L, C] of the consecutive cells `cells`; index [n, B] are their times."""
    c, geometry = config["constructor"], config["geometry"]
    length = geometry["cell_side"] ** 2
    places = positions_of(geometry["grid"], geometry["cell_side"])[cells[0] * length : (cells[-1] + 1) * length]
    span = slice(cells[0] * length, (cells[-1] + 1) * length)
    taps = {} if taps is None else taps
    angles = index[..., None].float() * torch.exp(-math.log(10000) * torch.arange(128).float() / 128)
    time = linear(w, "time_embed.mlp.0", torch.cat([angles.cos(), angles.sin()], -1))
    time = linear(w, "time_embed.mlp.2", F.silu(time))  # [n, B, D]
    taps["time_embed"] = time.flatten(0, 1)[:, None, None]
    condition = time + w["class_emb.weight"][labels]
    group = torch.arange(x.shape[1]) // length
    mask = group[:, None] >= group[None, :]
    taps["z_proj"] = h = linear(w, "z_proj", x)
    taps["z_proj_ln"] = h = rms(h + w["encoder_pos_embed_learned"][:, span], w["z_proj_ln.weight"])
    for stack in ("encoder", "decoder"):
        if stack == "decoder":
            taps["decoder_embed"] = h = linear(w, "decoder_embed", h)
            h = h + w["decoder_pos_embed_learned"][:, span]
        for i in range(c[f"{stack}_depth"]):
            at = f"{stack}_blocks.{i}"
            m = linear(w, f"{at}.ada_lin.1", F.silu(condition))
            taps[f"{at}.ada_lin"] = m.flatten(0, 1)
            m = m.transpose(0, 1).repeat_interleave(length, 1)  # [B, n * L, 6D]
            gate1, gate2, scale1, scale2, shift1, shift2 = m.chunk(6, -1)
            taps[f"{at}.norm1"] = rms(h)
            taps[f"{at}.attn.qkv"] = qkv = linear(w, f"{at}.attn.qkv", rms(h) * (1 + scale1) + shift1)
            q, k, v = (heads_of(part, c["encoder_num_heads"]) for part in qkv.chunk(3, -1))
            y = linear(w, f"{at}.attn.proj", attend(turn(q, places), turn(k, places), v, mask))
            taps[f"{at}.attn"] = y
            h = h + gate1 * y
            z = rms(h) * (1 + scale2) + shift2
            taps |= {f"{at}.mlp.{part}": linear(w, f"{at}.mlp.{part}", z) for part in ("fc1_g", "fc1_x")}
            z = gelu(taps[f"{at}.mlp.fc1_g"]) * taps[f"{at}.mlp.fc1_x"]
            taps[f"{at}.mlp"] = z = linear(w, f"{at}.mlp.fc2", z)
            taps[at] = h = h + gate2 * z
        taps[f"{stack}_norm"] = h = rms(h, w[f"{stack}_norm.weight"])
    return linear(w, "pred", h)


def xar_training(w, config, latents, labels, drop, time_normal, noise):
    """The recorded tensors of a training pass; `w` needs gradients."""
    cells = cells_of(latents, config["geometry"]["cell_side"])
    n, b = cells.shape[:2]
    io = {"in.latents": latents, "in.labels": labels, "in.label_drop_uniform": drop, "in.time_normal": time_normal}
    io |= {"in.noise": noise, "mid.time": time_normal.sigmoid()}
    io["mid.time_index"] = (io["mid.time"] * 1000).long()
    t = io["mid.time"].view(n, b, 1, 1)
    noisy = (1 - t) * cells + t * noise
    flat = [part.transpose(0, 1).flatten(1, 2) for part in (noisy, noise - cells)]
    io["mid.model_input"] = flat[0]
    labels = torch.where(drop < config["constructor"]["label_drop_prob"], config["constructor"]["class_num"], labels)
    taps = {}
    io["out.velocity"] = xar_network(w, config, flat[0], io["mid.time_index"].view(n, b), labels, range(n), taps)
    io["out.loss"] = (io["out.velocity"] - flat[1]).square().mean()
    io["out.loss"].backward()
    io |= {f"mid.{name}": value for name, value in taps.items()}
    return io | {f"grad.{name}": value.grad for name, value in w.items()}


@torch.no_grad()
def xar_sampling(w, config, labels, starts, eps):
    """The recorded tensors of a sampling; `eps` is None for the Euler sampler."""
    grid, side = config["geometry"]["grid"], config["geometry"]["cell_side"]
    n, b, length, _ = starts.shape
    s, guidance = config["num_steps"], config["cfg"]
    io = {"in.labels": labels, "in.latents": starts} | ({} if eps is None else {"in.eps": eps})
    both = torch.cat([labels, torch.full_like(labels, config["constructor"]["class_num"])])
    done, inputs, outputs, indices = [], [], [], []
    for i in range(n):
        weight = 1 + (guidance - 1) * i / (n - 1)
        if eps is None:
            times = torch.linspace(1, 0, s + 1, dtype=torch.float64)
        else:
            times = torch.cat([torch.linspace(1, 0.04, s, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)])
        x = starts[i].double()
        for j in range(s):
            t, then = times[j], times[j + 1]
            index = int(t.float() * 1000)
            indices.append(index)
            inputs.append(x.float())
            row = torch.cat([*done, x.float()], 1).repeat(2, 1, 1)
            clean = torch.zeros(i + 1, 2 * b, dtype=torch.long)
            clean[i] = index
            taps = {}
            v = xar_network(w, config, row, clean, both, range(i + 1), taps)[:, -length:]
            outputs.append(v)
            call = i * s + j
            if call in config.get("tapped", (s, s + 1)):
                shown = length * (2 if i and not j else 1)
                names = ("encoder_blocks.0.attn", "encoder_norm", "decoder_norm")
                io |= {f"mid.call{call}.{name}": taps[name][:, -shown:] for name in names}
            c, u = v.double().chunk(2)
            if eps is None:
                c = u + weight * (c - u) if weight > 1 else c
                x = x + (then - t) * c
                continue
            dc, du = (c - t * (-((1 - t) * c + x) / t)), (u - t * (-((1 - t) * u + x) / t))
            drift = du + weight * (dc - du) if weight > 1 else dc
            x = x + drift * (then - t)
            if j < s - 1:
                x = x + torch.sqrt(2 * t) * torch.sqrt(t - then) * eps[i, j].double()
        done.append(x.float())
    io["mid.time_index"] = torch.tensor(indices).view(n, s)
    io["mid.x"] = torch.stack(inputs).unflatten(0, (n, s))
    io["mid.v"] = torch.stack(outputs).unflatten(0, (n, s))
    io["out.cells"] = torch.stack(done).double()
    io["out.latent_map"] = map_of(torch.stack(done), grid, side)
    return io


# MaskGIT


def maskgit_config(kind, codes, tokens, width, depth, heads, hidden, classes, generate=None):
    generator = {
        "model_type": "UViT" if kind.startswith("uvit") else "ViT", "hidden_size": width, "num_hidden_layers": depth,
        "num_attention_heads": heads, "intermediate_size": hidden, "dropout": 0.1, "attn_drop": 0.1,
        "class_label_dropout": 0.1, "image_seq_len": tokens, "condition_num_classes": classes,
    }  # fmt: skip
    model = {"vq_model": {"codebook_size": codes, "num_latent_tokens": tokens}, "generator": generator}
    losses = {"label_smoothing": 0.1, "loss_weight_unmasked_token": 0.1}
    more = {} if generate is None else {"generate": generate}
    return {"system": "maskgit", "kind": kind, "official_config": {"model": model, "losses": losses}, **more}


def maskgit_shapes(official):
    g, k = official["model"]["generator"], official["model"]["vq_model"]["codebook_size"]
    d, hidden, n = g["hidden_size"], g["intermediate_size"], g["image_seq_len"] + 1
    ids = k + g["condition_num_classes"] + 2
    if g["model_type"] == "UViT":
        shapes = {"embeddings.weight": (ids, d), "pos_embed": (1, n, d), "norm.weight": (d,), "norm.bias": (d,)}
        half = g["num_hidden_layers"] // 2
        blocks = [f"in_blocks.{i}" for i in range(half)] + ["mid_block"] + [f"out_blocks.{i}" for i in range(half)]
        linears = {"lm_head": (k, d)}
        for at in blocks:
            shapes |= {f"{at}.attn.qkv.weight": (3 * d, d)}
            shapes |= {f"{at}.norm{i}.{part}": (d,) for i in (1, 2) for part in ("weight", "bias")}
            linears |= {f"{at}.attn.proj": (d, d), f"{at}.mlp.fc1": (hidden, d), f"{at}.mlp.fc2": (d, hidden)}
            if at.startswith("out"):
                linears[f"{at}.skip_linear"] = (d, 2 * d)
    else:
        at = "model.embeddings"
        shapes = {f"{at}.word_embeddings.weight": (ids, d), f"{at}.position_embeddings.weight": (n, d)}
        shapes[f"{at}.token_type_embeddings.weight"] = (2, d)
        norms, linears = [f"{at}.LayerNorm"], {"model.lm_head": (k, d)}
        for i in range(g["num_hidden_layers"]):
            at = f"model.encoder.layer.{i}"
            norms += [f"{at}.attention.output.LayerNorm", f"{at}.output.LayerNorm"]
            linears |= {f"{at}.attention.self.{part}": (d, d) for part in ("query", "key", "value")}
            linears |= {f"{at}.attention.output.dense": (d, d), f"{at}.intermediate.dense": (hidden, d)}
            linears[f"{at}.output.dense"] = (d, hidden)
        shapes |= {f"{norm}.{part}": (d,) for norm in norms for part in ("weight", "bias")}
    shapes |= {f"{key}.weight": shape for key, shape in linears.items()}
    return shapes | {f"{key}.bias": shape[:1] for key, shape in linears.items()}


def norm(w, key, x, eps):
    mean = x.mean(-1, keepdim=True)
    variance = (x - mean).square().mean(-1, keepdim=True)
    return (x - mean) / torch.sqrt(variance + eps) * w[f"{key}.weight"] + w[f"{key}.bias"]


def maskgit_logits(w, official, ids, labels, taps=None):
    """Logits [B, N, K]; label `condition_num_classes` is no class."""
    g, k = official["model"]["generator"], official["model"]["vq_model"]["codebook_size"]
    heads, taps = g["num_attention_heads"], {} if taps is None else taps
    ids = torch.cat([(k + 1 + labels)[:, None], ids], 1)
    if g["model_type"] == "ViT":
        at = "model.embeddings"
        x = w[f"{at}.word_embeddings.weight"][ids] + w[f"{at}.position_embeddings.weight"]
        x = norm(w, f"{at}.LayerNorm", x + w[f"{at}.token_type_embeddings.weight"][0], 1e-12)
        taps["embeddings"] = x
        for i in range(g["num_hidden_layers"]):
            at = f"model.encoder.layer.{i}"
            q, k_, v = (heads_of(linear(w, f"{at}.attention.self.{p}", x), heads) for p in ("query", "key", "value"))
            y = linear(w, f"{at}.attention.output.dense", attend(q, k_, v))
            x = norm(w, f"{at}.attention.output.LayerNorm", x + y, 1e-12)
            y = linear(w, f"{at}.output.dense", gelu(linear(w, f"{at}.intermediate.dense", x)))
            taps[f"layer{i}"] = x = norm(w, f"{at}.output.LayerNorm", x + y, 1e-12)
        return linear(w, "model.lm_head", x[:, 1:])

    def block(at, x, skip=None):
        if skip is not None:
            x = linear(w, f"{at}.skip_linear", torch.cat([x, skip], -1))
        q, k_, v = (
            heads_of(p, heads) for p in linear(w, f"{at}.attn.qkv", norm(w, f"{at}.norm1", x, 1e-5)).chunk(3, -1)
        )
        x = x + linear(w, f"{at}.attn.proj", attend(q, k_, v))
        return x + linear(w, f"{at}.mlp.fc2", gelu(linear(w, f"{at}.mlp.fc1", norm(w, f"{at}.norm2", x, 1e-5))))

    x, skips, half = w["embeddings.weight"][ids] + w["pos_embed"], [], g["num_hidden_layers"] // 2
    for i in range(half):
        taps[f"in{i}"] = x = block(f"in_blocks.{i}", x)
        skips.append(x)
    taps["mid"] = x = block("mid_block", x)
    for i in range(half):
        taps[f"out{i}"] = x = block(f"out_blocks.{i}", x, skips.pop())
    taps["norm"] = x = norm(w, "norm", x, 1e-5)
    return linear(w, "lm_head", x[:, 1:])


def gumbel(u):
    return -torch.log(torch.clamp(-torch.log(torch.clamp(u, min=1e-20)), min=1e-20))


@torch.no_grad()
def maskgit_sampling(w, official, labels, rng, arguments):
    """The recorded tensors of one generation."""
    a = {"guidance_scale": 3.0, "guidance_decay": "constant", "guidance_scale_pow": 3.0, "randomize_temperature": 4.5,
         "softmax_temperature_annealing": False, "num_sample_steps": 8} | arguments  # fmt: skip
    g, k = official["model"]["generator"], official["model"]["vq_model"]["codebook_size"]
    n, b, steps, scale = g["image_seq_len"], len(labels), a["num_sample_steps"], a["guidance_scale"]
    none = torch.full_like(labels, g["condition_num_classes"])
    ids = torch.full((b, n), k)
    u_tokens = torch.rand(steps, b, n, k, generator=rng).clamp(1e-6, 1 - 1e-6)
    u_confidence = torch.rand(steps, b, n, generator=rng).clamp(1e-6, 1 - 1e-6)
    weight = scale if a["guidance_decay"] == "constant" else 0.0
    entering, calls = [], 0
    for i in range(steps):
        entering.append(ids)
        r = (i + 1) / steps
        heat, is_masked = a["randomize_temperature"] * (1 - r), ids == k
        if a["guidance_decay"] == "power-cosine":
            weight = 1 + (scale - 1) * (1 - math.cos(math.pi * (i / steps) ** a["guidance_scale_pow"])) / 2
        c = logits = maskgit_logits(w, official, ids, labels)
        if weight != 0:
            u, calls = maskgit_logits(w, official, ids, none), calls + 1
            logits = (u if a["guidance_decay"] == "power-cosine" else c) + weight * (c - u)
        if a["softmax_temperature_annealing"]:
            logits = logits / (0.5 + 0.8 * (1 - r))
        x = (logits + heat * gumbel(u_tokens[i])).argmax(-1)
        sure = logits.gather(-1, x[..., None])[..., 0].masked_fill(~is_masked, math.inf)
        x = torch.where(is_masked, x, ids)
        ratio = math.acos(r) / (math.pi / 2)
        count = max(1, min(int(is_masked[0].sum()) - 1, math.floor(n * ratio)))
        sure = sure + heat * gumbel(u_confidence[i])
        again = sure <= sure.sort(-1).values[:, count - 1 : count]
        ids = x if i == steps - 1 else torch.where(again, k, x)
        if a["guidance_decay"] == "linear":
            weight = r * scale
    io = {"u_tokens": u_tokens, "u_confidence": u_confidence, "ids_in": torch.stack(entering), "ids": ids}
    io |= {"logits_cond_first": maskgit_logits(w, official, entering[0], labels), "logits_cond_last": c}
    if calls:
        io["logits_uncond_last"] = maskgit_logits(w, official, entering[-1], none)
    return io | {"uncond_calls": torch.tensor(calls)}


def maskgit_training(w, official, tokens, labels, drop, u_ratio, u_perm):
    """The recorded tensors of a training pass; `w` needs gradients."""
    g, k = official["model"]["generator"], official["model"]["vq_model"]["codebook_size"]
    n = tokens.shape[1]
    io = {"tokens": tokens, "labels": labels, "drop_u": drop, "mask.u_ratio": u_ratio, "mask.u_perm": u_perm}
    ratio = (torch.arccos(u_ratio) / (math.pi / 2)).clamp(1e-6, 1)
    count = (n * ratio).round().clamp(min=1)
    mask = io["mask.mask"] = u_perm.argsort(-1) < count[:, None]
    io["mask.tokens"] = torch.where(mask, k, tokens)
    labels = torch.where(drop < g["class_label_dropout"], g["condition_num_classes"], labels)
    logits = io["logits"] = maskgit_logits(w, official, io["mask.tokens"], labels)
    smooth, low = official["losses"]["label_smoothing"], official["losses"]["loss_weight_unmasked_token"]
    log = logits.log_softmax(-1)
    loss = -(1 - smooth) * log.gather(-1, tokens[..., None])[..., 0] - smooth * log.mean(-1)
    weight = mask + low * ~mask
    io["loss"] = (weight * loss).sum() / (weight.sum() + 1e-8)
    right = (logits.argmax(-1) == tokens) & mask
    io["accuracy"] = (right.sum(1) / mask.sum(1)).mean()
    io["loss"].backward()
    return io | {f"grad.{name}": value.grad for name, value in w.items()}


# The KL autoencoder


def kl_config(ch, ch_mult, blocks, attn, resolution, embed, scale=0.2325):
    sizes = {"ch": ch, "ch_mult": ch_mult, "blocks": blocks, "attn": attn, "resolution": resolution, "embed": embed}
    return {"system": "kl16_vae", "kind": "autoencoder", "architecture": sizes, "latent_scale": scale}


class KLNetwork:
    """Runs, or with `w` None lists the shapes of, the autoencoder: the two cannot differ."""

    def __init__(self, config, w=None, draw=None):
        self.a, self.w, self.draw, self.taps = config["architecture"], w, draw, {}

    def get(self, key, *shape):
        if key not in self.w:
            self.w[key] = self.draw(key, shape)
        return self.w[key]

    def conv(self, at, x, out, size, **options):
        weight = self.get(f"{at}.weight", out, x.shape[1], size, size)
        self.taps[at] = y = F.conv2d(x, weight, self.get(f"{at}.bias", out), **options)
        return y

    def norm(self, at, x):
        b, c = x.shape[:2]
        y = x.reshape(b, 32, -1)
        y = (y - y.mean(-1, keepdim=True)) / torch.sqrt(y.var(-1, unbiased=False, keepdim=True) + 1e-6)
        weight, bias = (self.get(f"{at}.{part}", c)[:, None, None] for part in ("weight", "bias"))
        self.taps[at] = y = y.reshape(x.shape) * weight + bias
        return y

    def resnet(self, at, x, out):
        y = self.norm(f"{at}.norm1", x)
        y = self.conv(f"{at}.conv1", y * y.sigmoid(), out, 3, padding=1)
        y = self.norm(f"{at}.norm2", y)
        y = self.conv(f"{at}.conv2", y * y.sigmoid(), out, 3, padding=1)
        if x.shape[1] != out:
            x = self.conv(f"{at}.nin_shortcut", x, out, 1)
        self.taps[at] = y = x + y
        return y

    def attention(self, at, x):
        c = x.shape[1]
        y = self.norm(f"{at}.norm", x)
        q, k, v = (self.conv(f"{at}.{part}", y, c, 1).flatten(2) for part in "qkv")
        y = v @ (q.transpose(1, 2) @ k * c**-0.5).softmax(-1).transpose(1, 2)
        self.taps[at] = y = x + self.conv(f"{at}.proj_out", y.reshape(x.shape), c, 1)
        return y

    def middle(self, at, x):
        x = self.attention(f"{at}.attn_1", self.resnet(f"{at}.block_1", x, x.shape[1]))
        return self.resnet(f"{at}.block_2", x, x.shape[1])

    def encode(self, x):
        a, side = self.a, self.a["resolution"]
        x = self.conv("encoder.conv_in", x, a["ch"], 3, padding=1)
        for i, multiplier in enumerate(a["ch_mult"]):
            for j in range(a["blocks"]):
                x = self.resnet(f"encoder.down.{i}.block.{j}", x, a["ch"] * multiplier)
                if side in a["attn"]:
                    x = self.attention(f"encoder.down.{i}.attn.{j}", x)
            if i < len(a["ch_mult"]) - 1:
                x = self.conv(f"encoder.down.{i}.downsample.conv", F.pad(x, (0, 1, 0, 1)), x.shape[1], 3, stride=2)
                self.taps[f"encoder.down.{i}.downsample"] = x
                side //= 2
        x = self.norm("encoder.norm_out", self.middle("encoder.mid", x))
        x = self.conv("encoder.conv_out", x * x.sigmoid(), 2 * a["embed"], 3, padding=1)
        return self.conv("quant_conv", x, 2 * a["embed"], 1)

    def decode(self, z):
        a = self.a
        x = self.conv("post_quant_conv", z, a["embed"], 1)
        x = self.conv("decoder.conv_in", x, a["ch"] * a["ch_mult"][-1], 3, padding=1)
        x = self.middle("decoder.mid", x)
        for i, multiplier in reversed(list(enumerate(a["ch_mult"]))):
            for j in range(a["blocks"] + 1):
                x = self.resnet(f"decoder.up.{i}.block.{j}", x, a["ch"] * multiplier)
            if i:
                x = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
                x = self.conv(f"decoder.up.{i}.upsample.conv", x, x.shape[1], 3, padding=1)
                self.taps[f"decoder.up.{i}.upsample"] = x
        x = self.norm("decoder.norm_out", x)
        return self.conv("decoder.conv_out", x * x.sigmoid(), 3, 3, padding=1)


@torch.no_grad()
def kl_case(config, images, rng, tapped=None):
    """Weights and recorded tensors; of the first image the outputs of `tapped` modules, too (None: of all)."""

    def draw(key, shape):
        value = torch.randn(*shape, generator=rng)
        if len(shape) == 1:
            return 1 + 0.2 * value if key.endswith("weight") else 0.1 * value
        return value / math.sqrt(math.prod(shape[1:]))

    network, io = KLNetwork(config, {}, draw), {}
    for j, image in enumerate(images):
        network.taps = {}
        moments = network.encode(image)
        mean, logvar = moments.chunk(2, 1)
        noise = torch.randn(mean.shape, generator=rng)
        logvar = logvar.clamp(-30, 20)
        sample = mean + torch.exp(0.5 * logvar) * noise
        values = {"moments": moments, "mean": mean, "logvar": logvar, "sample": sample}
        values["kl"] = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum((1, 2, 3))
        values["latent"] = sample * config["latent_scale"]
        values["decoded_from_latent"] = network.decode(values["latent"] / config["latent_scale"])
        values["decoded"] = network.decode(sample)
        io |= {f"in.{j}.image": image, f"in.{j}.noise": noise} | {f"out.{j}.{name}": x for name, x in values.items()}
        if not j:
            names = network.taps if tapped is None else tapped
            io |= {f"mid.0.{name}": network.taps[name] for name in names}
    return network.w, io
