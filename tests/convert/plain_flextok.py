"""FlexTok and FlexAR written down plainly, over official keys: what new parity cases are recorded with.

All registers in every pass, one time a picture, masks as matrices; nothing is shared with the library.
"""

import math

import torch
import torch.nn.functional as F

LEVELS = [8, 8, 8, 5, 5, 5]
VAE = {"block_out_channels": [8, 8, 12, 16], "norm_num_groups": 4, "layers_per_block": 1}


def config(encoder, decoder, grid, registers, channels=16, patch=2, max_timestep=1.0, levels=LEVELS, scaling=0.5):
    """The official layout; `encoder` and `decoder` are (width, depth, head width)."""
    names = "flextok.model"

    def module(target, **values):
        return {"_target_": f"{names}.{target}", **values}

    def trunk(size, **more):
        return module("trunks.transformers.FlexTransformer", dim=size[0], depth=size[1], head_dim=size[2], **more)

    def patches(size):
        return module(
            "preprocessors.patching.PatchEmbedder", channels_in=channels, dim=size[0], patch_sizes=[patch, patch]
        )

    def positions(size, kind, sizes):
        return module(
            "utils.posembs.PositionalEmbeddingAdder", dim=size[0], max_sizes=sizes, posemb_type=kind,
            posemb_scaling="absolute",
        )  # fmt: skip

    def packer(mode):
        return module("preprocessors.flex_seq_packing.BlockWiseSequencePacker", mask_mode=mode)

    to_last = module("utils.dict_ops.PerSampleOp", per_sample_op=module("utils.dict_ops.f", _partial_=True))
    enc = {
        "enc_channels_to_last": to_last,
        "enc_patch_emb": patches(encoder),
        "enc_posemb_module": positions(encoder, "sincos", list(grid)),
        "enc_register_module": module("preprocessors.registers.Registers1D", n_min=registers, n_max=registers),
        "enc_seq_packer": packer("causal_last"),
        "enc_transformer": trunk(encoder),
        "enc_unpacker": module("postprocessors.seq_unpacking.SequenceUnpacker"),
        "enc_to_latents": module("postprocessors.heads.LinearHead", dim_out=len(levels), use_mup_readout=False),
    }
    dec = {
        "dec_from_latents": module("preprocessors.linear.LinearLayer", dim_in=len(levels)),
        "dec_registers_posemb_module": positions(decoder, "learnable_sum", [registers]),
        "dec_nested_dropout": module("preprocessors.token_dropout.MaskedNestedDropout"),
        "dec_latent_dropout": module("preprocessors.nullcond.LearnedNullCond"),
        "dec_noise_patch_emb": patches(decoder),
        "dec_patches_posemb_module": positions(decoder, "sincos", list(grid)),
        "dec_seq_packer": packer("full"),
        "dec_time_embedder": module("preprocessors.time_embedding.TimestepEmbedder", max_timestep=max_timestep,
                                    frequency_embedding_size=256),
        "dec_transformer": trunk(decoder, adaLN_expansion=2),
        "dec_to_patches": module("postprocessors.heads.ToPatchesLinearHead", channels_out=channels,
                                 patch_sizes=[patch, patch], use_mup_readout=False),
    }  # fmt: skip
    wrapper = module("utils.wrappers.SequentialModuleDictWrapper")
    return {
        "vae": {"_target_": "flextok.vae_wrapper.StableDiffusionVAE", "latent_channels": channels,
                "scaling_factor": scaling, "_base_config_overrides": VAE},
        "encoder": wrapper | {"module_dict": enc},
        "decoder": wrapper | {"module_dict": dec},
        "regularizer": {"_target_": "flextok.regularizers.quantize_fsq.FSQ", "levels": list(levels)},
    }  # fmt: skip


def shapes(encoder, decoder, grid, registers, channels=16, patch=2, code=6):
    """Every official key of the resampler."""
    values, found = channels * patch**2, {}

    def linear(name, rows, columns, bias=True):
        found[f"{name}.weight"] = (rows, columns)
        if bias:
            found[f"{name}.bias"] = (rows,)

    for network, (width, depth, _), table in (("encoder", encoder, "enc_posemb_module"),
                                              ("decoder", decoder, "dec_patches_posemb_module")):  # fmt: skip
        p = f"{network}.module_dict."
        found[f"{p}{table}.posembs"] = (1, width, *grid)
        linear(f"{p}{'enc' if network == 'encoder' else 'dec_noise'}_patch_emb.patch_proj", width, values)
        hidden = int(2 * int(4 * width) / 3)
        for i in range(depth):
            block = f"{p}{network[:3]}_transformer.blocks.{i}"
            for name in ("wq", "wk", "wv", "proj"):
                linear(f"{block}.attn.{name}", width, width, False)
            linear(f"{block}.mlp.fc1", hidden, width, False)
            linear(f"{block}.mlp.fc3", hidden, width, False)
            linear(f"{block}.mlp.fc2", width, hidden, False)
            if network == "decoder":
                linear(f"{block}.adaLN_modulation.1", 12 * width, width)
    p, width = "encoder.module_dict.", encoder[0]
    found[f"{p}enc_register_module.registers"] = (registers, width)
    linear(f"{p}enc_to_latents.proj", code, width)
    p, width = "decoder.module_dict.", decoder[0]
    linear(f"{p}dec_from_latents.proj", width, code)
    found[f"{p}dec_registers_posemb_module.posembs"] = (1, 1, width, registers)
    found[f"{p}dec_nested_dropout.dropout_mask_token"] = found[f"{p}dec_latent_dropout.nullcond"] = (width,)
    linear(f"{p}dec_time_embedder.mlp.0", width, 256)
    linear(f"{p}dec_time_embedder.mlp.2", width, width)
    linear(f"{p}dec_to_patches.adaLN_modulation.1", 2 * width, width)
    linear(f"{p}dec_to_patches.proj", values, width)
    return found


def random_weights(all_shapes, seed):
    rng = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=rng) * (0.7 * shape[-1] ** -0.5 if len(shape) == 2 else 0.3)
        for name, shape in all_shapes.items()
    }


class Plain:
    """The resampler over official weights `w`."""

    def __init__(self, w, head_widths, patch=2, max_timestep=1.0, levels=LEVELS):
        self.w, self.heads, self.patch, self.max_timestep = w, head_widths, patch, max_timestep
        self.levels = torch.tensor(levels)
        self.registers = len(w["encoder.module_dict.enc_register_module.registers"])

    def linear(self, name, x):
        return F.linear(x, self.w[f"{name}.weight"], self.w.get(f"{name}.bias"))

    def attention(self, name, x, mask, width):
        q, k, v = (self.linear(f"{name}.w{c}", x).unflatten(-1, (-1, width)).transpose(1, 2) for c in "qkv")
        q, k = (F.layer_norm(t, (width,), eps=1e-5) for t in (q, k))
        scores = (q @ k.mT * (8 / width)).masked_fill(~mask, float("-inf"))
        return self.linear(f"{name}.proj", (scores.softmax(-1) @ v).transpose(1, 2).flatten(2))

    def mlp(self, name, x):
        return self.linear(f"{name}.fc2", F.silu(self.linear(f"{name}.fc1", x)) * self.linear(f"{name}.fc3", x))

    def patches(self, module, table, x):
        b, c, h, w = x.shape
        p = self.patch
        x = x.view(b, c, h // p, p, w // p, p).permute(0, 2, 4, 3, 5, 1).reshape(b, h // p, w // p, -1)
        x = self.linear(module, x) + self.w[table][0].permute(1, 2, 0)[: h // p, : w // p]
        return x.flatten(1, 2)

    def encode(self, latents, k=None):
        p = "encoder.module_dict."
        x = self.patches(f"{p}enc_patch_emb.patch_proj", f"{p}enc_posemb_module.posembs", latents)
        n, registers = x.shape[1], self.w[f"{p}enc_register_module.registers"][:k]
        x = torch.cat([x, registers.expand(len(x), -1, -1)], 1)
        place = torch.arange(x.shape[1])
        mask = (place[None] < n) | (place[None] <= place[:, None])
        i = 0
        while f"{p}enc_transformer.blocks.{i}.attn.wq.weight" in self.w:
            block = f"{p}enc_transformer.blocks.{i}"
            x = x + self.attention(f"{block}.attn", norm(x), mask, self.heads[0])
            x = x + self.mlp(f"{block}.mlp", norm(x))
            i += 1
        return self.linear(f"{p}enc_to_latents.proj", norm(x[:, n:]))

    def quantize(self, z):
        half = (self.levels - 1) * 1.001 / 2
        off = (self.levels % 2 == 0) * 0.5
        b = torch.tanh(z + torch.atanh(off / half)) * half - off
        q = b + (b.round() - b).detach()
        basis = torch.cat([torch.ones(1, dtype=torch.long), self.levels.cumprod(0)[:-1]])
        ids = ((q.detach() + self.levels // 2).round().long() * basis).sum(-1)
        return q / (self.levels // 2), ids, float(0.5 - (b - b.round()).detach().abs().max())

    def decode(self, xt, t, codes, keep, null):
        p = "decoder.module_dict."
        r = self.linear(f"{p}dec_from_latents.proj", codes)
        r = r + self.w[f"{p}dec_registers_posemb_module.posembs"][0, 0].T
        hidden = torch.arange(self.registers) >= keep[:, None]
        r = torch.where(hidden[..., None], self.w[f"{p}dec_nested_dropout.dropout_mask_token"], r)
        r = torch.where(null[:, None, None], self.w[f"{p}dec_latent_dropout.nullcond"], r)
        x = self.patches(f"{p}dec_noise_patch_emb.patch_proj", f"{p}dec_patches_posemb_module.posembs", xt)
        n = x.shape[1]
        x = torch.cat([x, r], 1)
        angles = t[:, None] * (1000 / self.max_timestep) * torch.exp(-math.log(256) * torch.arange(128) / 128)
        emb = self.linear(f"{p}dec_time_embedder.mlp.0", torch.cat([angles.cos(), angles.sin()], 1))
        emb = F.silu(self.linear(f"{p}dec_time_embedder.mlp.2", F.silu(emb)))
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool)
        i = 0
        while f"{p}dec_transformer.blocks.{i}.attn.wq.weight" in self.w:
            block = f"{p}dec_transformer.blocks.{i}"
            m = self.linear(f"{block}.adaLN_modulation.1", emb)[:, None].chunk(2, -1)
            m = torch.cat([m[0].expand(-1, n, -1), m[1].expand(-1, self.registers, -1)], 1)
            ga, gm, sha, sca, shm, scm = m.chunk(6, -1)
            x = x + ga * self.attention(f"{block}.attn", norm(x) * (1 + sca) + sha, mask, self.heads[1])
            x = x + gm * self.mlp(f"{block}.mlp", norm(x) * (1 + scm) + shm)
            i += 1
        shift, scale = self.linear(f"{p}dec_to_patches.adaLN_modulation.1", emb)[:, None].chunk(2, -1)
        x = self.linear(f"{p}dec_to_patches.proj", norm(x[:, :n]) * (1 + scale) + shift)
        b, c, h, w = xt.shape
        x = x.view(b, h // self.patch, w // self.patch, self.patch, self.patch, c)
        return x.permute(0, 5, 1, 3, 2, 4).reshape(b, c, h, w)

    def flow(self, noise, codes, keep, steps, scale, projected=False):
        x, running, none = noise, 0.0, torch.zeros(len(noise), dtype=torch.bool)
        for i in range(steps, 0, -1):
            t = torch.full((len(x),), i / steps)
            v = self.decode(x, t, codes, keep, none)
            s = scale(i / steps) if callable(scale) else scale
            if s != 1:
                u = self.decode(x, t, codes, keep, ~none)
                if projected:
                    d = running = v - u - 0.5 * running
                    d = d * (2.5 / d.flatten(1).norm(dim=1)).clamp(max=1)[:, None, None, None]
                    direction = v / v.flatten(1).norm(dim=1)[:, None, None, None]
                    v = v + (s - 1) * (d - (d * direction).sum((1, 2, 3), keepdim=True) * direction)
                else:
                    v = u + s * (v - u)
            x = x - v / steps
        return x


def norm(x):
    return F.layer_norm(x, x.shape[-1:], eps=1e-5)


# FlexAR.

AR = "models.ar_image_model."


def ar_shapes(c):
    """Official keys of a config as the recorded cases have it."""
    d, found = c["embed_dim"], {}
    is_text, bias = "text_dim" in c, c["use_bias"]

    def linear(name, rows, columns, has_bias=bias):
        found[f"{name}.weight"] = (rows, columns)
        if has_bias:
            found[f"{name}.bias"] = (rows,)

    def normed(name, width=d):
        found[f"{name}.weight"] = (width,)
        if c["norm"] == "layer":
            found[f"{name}.bias"] = (width,)

    found[f"{AR}preprocessor.embedding.weight"] = (c["codebook_size"], d)
    found[f"{AR}preprocessor.sos_token_embed"] = (1, 1, d)
    found[f"{AR}preprocessor.positional_embedding"] = (c["num_tokens"], d)
    hidden = -(-int(2 * 4 * d / 3) // 256) * 256
    for i in range(c["num_blocks"]):
        block = f"{AR}trunk.blocks.{i}"
        attn = f"{block}.self_attn" if is_text else f"{block}.attn"
        linear(f"{attn}.qkv", 3 * d, d, False)
        linear(f"{attn}.proj", d, d)
        if is_text:
            for name in ("Wq", "Wk", "Wv"):
                linear(f"{block}.cross_attn.{name}", d, d, False)
            linear(f"{block}.cross_attn.proj", d, d)
        for name in (attn, f"{block}.cross_attn")[: 1 + is_text] if c["qk_norm"] else ():
            normed(f"{name}.q_norm", d // c["num_heads"])
            normed(f"{name}.k_norm", d // c["num_heads"])
        for name in ("norm_1", "norm_2", "norm_3")[: 2 + is_text]:
            normed(f"{block}.{name}")
        linear(f"{block}.mlp.fc1", hidden, d)
        linear(f"{block}.mlp.fc3", hidden, d)
        linear(f"{block}.mlp.fc2", d, hidden)
    if c["post_trunk_norm"]:
        normed(f"{AR}trunk.post_trunk_norm")
    if c["head_norm"]:
        found[f"{AR}head.norm.weight"] = found[f"{AR}head.norm.bias"] = (d,)
    linear(f"{AR}head.linear", c["codebook_size"], d)
    if is_text:
        found["models.text_encoder.mlp.fc1.weight"] = (c["text_dim"], c["text_dim"])
        found["models.text_encoder.mlp.fc2.weight"] = (d, c["text_dim"])
    else:
        found[f"{AR}preprocessor.cls_embedding.weight"] = (c["num_classes"], d)
    return found


class PlainAR:
    def __init__(self, w, c):
        self.w, self.c, self.d = w, c, c["embed_dim"]

    def linear(self, name, x):
        return F.linear(x, self.w[f"{name}.weight"], self.w.get(f"{name}.bias"))

    def norm(self, name, x):
        if self.c["norm"] == "layer":
            return F.layer_norm(x, x.shape[-1:], self.w[f"{name}.weight"], self.w[f"{name}.bias"], 1e-6)
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * self.w[f"{name}.weight"]

    def heads(self, x, name=None):
        x = x.unflatten(-1, (self.c["num_heads"], -1)).transpose(1, 2)
        return self.norm(name, x) if name and self.c["qk_norm"] else x

    def logits(self, ids, labels=None, text=None, mask=None):
        """Of the start and all of `ids` [B, n]: [B, n + 1, V]; label -1 is no class."""
        w, pre = self.w, f"{AR}preprocessor."
        start = w[f"{pre}sos_token_embed"].expand(len(ids), 1, -1)
        x = torch.cat([start, w[f"{pre}embedding.weight"][ids]], 1)
        x = x + w[f"{pre}positional_embedding"][: x.shape[1]]
        if labels is not None:
            added = w[f"{pre}cls_embedding.weight"][labels.clamp(min=0)] * (labels >= 0)[:, None]
            x = torch.cat([x[:, :1] + added[:, None], x[:, 1:]], 1)
        else:
            text = F.gelu(F.linear(text, w["models.text_encoder.mlp.fc1.weight"]), approximate="tanh")
            text = F.linear(text, w["models.text_encoder.mlp.fc2.weight"])
        for i in range(self.c["num_blocks"]):
            b = f"{AR}trunk.blocks.{i}"
            a = f"{b}.attn" if text is None else f"{b}.self_attn"
            q, k, v = self.linear(f"{a}.qkv", self.norm(f"{b}.norm_1", x)).chunk(3, -1)
            q, k, v = self.heads(q, f"{a}.q_norm"), self.heads(k, f"{a}.k_norm"), self.heads(v)
            scores = q @ k.mT / q.shape[-1] ** 0.5
            seen = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
            y = scores.masked_fill(~seen, float("-inf")).softmax(-1) @ v
            x = x + self.linear(f"{a}.proj", y.transpose(1, 2).flatten(2))
            last = "norm_2"
            if text is not None:
                a, last = f"{b}.cross_attn", "norm_3"
                q = self.heads(self.linear(f"{a}.Wq", self.norm(f"{b}.norm_2", x)), f"{a}.q_norm")
                k, v = self.heads(self.linear(f"{a}.Wk", text), f"{a}.k_norm"), self.heads(self.linear(f"{a}.Wv", text))
                scores = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(mask[:, None, None] == 0, float("-inf"))
                x = x + self.linear(f"{a}.proj", (scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
            h = self.norm(f"{b}.{last}", x)
            h = F.silu(self.linear(f"{b}.mlp.fc1", h)) * self.linear(f"{b}.mlp.fc3", h)
            x = x + self.linear(f"{b}.mlp.fc2", h)
        if self.c["post_trunk_norm"]:
            x = self.norm(f"{AR}trunk.post_trunk_norm", x)
        if self.c["head_norm"]:
            x = F.layer_norm(x, (self.d,), w[f"{AR}head.norm.weight"], w[f"{AR}head.norm.bias"], 1e-5)
        return self.linear(f"{AR}head.linear", x)
