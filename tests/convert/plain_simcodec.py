"""SimCodec and HiFi-Codec once more, as plain functions over official keys, to record new cases with.

Written from the description of the authors' code and sharing nothing with ours: weight norm computed anew, all
distances at once, the whole matrix of the codes' similarities.
"""

import torch
import torch.nn.functional as F


def simcodec_config(rates, kernels, block_kernels, dilations, widths=(2, 2), vq_dim=12, layers=1, groups=1, codes=20):
    return {
        "channel": 1, "en_filters": widths[0], "de_filters": widths[1], "vq_dim": vq_dim, "upsample_rates": rates,
        "upsample_kernel_sizes": kernels, "resblock_kernel_sizes": block_kernels, "resblock_dilation_sizes": dilations,
        "n_q": layers, "n_code_groups": groups, "n_codes": codes, "codebook_loss_lambda": 0.7,
        "commitment_loss_lambda": 0.4,
    }  # fmt: skip


def hificodec_config(rates, kernels, block_kernels, dilations, widths=(4, 2), vq_dim=16, groups=2, codes=20):
    channels = [widths[0] * 2 ** (stage + 1) for stage in range(len(rates))]
    return {
        "resblock": "1", "upsample_rates": rates, "upsample_kernel_sizes": kernels,
        "upsample_initial_channel": widths[1] * 2 ** len(rates), "resblock_kernel_sizes": block_kernels,
        "resblock_dilation_sizes": dilations, "n_code_groups": groups, "n_codes": codes, "codebook_loss_lambda": 1.0,
        "commitment_loss_lambda": 0.25, "width": widths[0], "vq_dim": vq_dim,
        "groupnorm_groups": [max(1, width // 2) for width in channels], "num_gpus": 8, "learning_rate": 0.0002,
    }  # fmt: skip


def sizes_of(config):
    stages = len(config["upsample_rates"])
    de_filters = config.get("de_filters") or config["upsample_initial_channel"] // 2**stages
    return config.get("en_filters") or config["width"], de_filters, stages


def codebook_key(config, layer, group):
    if "n_q" in config:
        return f"quantizer.quantizer_modules.{layer}.{group}.embedding.weight"
    return f"quantizer.quantizer_modules{layer + 1 if layer else ''}.{group}.embedding.weight"


def simcodec_shapes(config):
    """Every official key of the old weight norm, and its shape."""
    first, last, stages = sizes_of(config)
    blocks, dim = len(config["resblock_kernel_sizes"]), config["vq_dim"]
    normed = {"encoder.conv_pre": (first, 1, 7), "generator.conv_pre": (last * 2**stages, dim, 7)}
    shapes = {"encoder.conv_post.weight": (dim, first * 2**stages, 3), "encoder.conv_post.bias": (dim,)}
    biases = {"encoder.conv_pre": first, "generator.conv_pre": last * 2**stages, "generator.conv_post": 1}
    for stage in range(stages):
        kernel = config["upsample_kernel_sizes"][stages - 1 - stage]
        width = first * 2 ** (stage + 1)
        normed[f"encoder.ups.{stage}"], biases[f"encoder.ups.{stage}"] = (width, width // 2, kernel), width
        up = last * 2 ** (stages - stage)
        normed[f"generator.ups.{stage}"] = (up, up // 2, config["upsample_kernel_sizes"][stage])
        biases[f"generator.ups.{stage}"] = up // 2
        for block in range(blocks):
            index = stage * blocks + block
            shapes |= {f"encoder.normalize.{index}.{kind}": (width,) for kind in ("weight", "bias")}
            for network, w, b in (("encoder", width, blocks - 1 - block), ("generator", up // 2, block)):
                for convs in ("convs1", "convs2"):
                    for i in range(len(config["resblock_dilation_sizes"][b])):
                        key = f"{network}.resblocks.{index}.{convs}.{i}"
                        normed[key], biases[key] = (w, w, config["resblock_kernel_sizes"][b]), w
    normed["generator.conv_post"] = (1, last, 7)
    for key, shape in normed.items():
        shapes |= {f"{key}.weight_g": (shape[0], 1, 1), f"{key}.weight_v": shape, f"{key}.bias": (biases[key],)}
    codes, groups = config["n_codes"], config["n_code_groups"]
    for layer in range(config.get("n_q", 2)):
        for group in range(groups):
            shapes[codebook_key(config, layer, group)] = (codes, dim // groups)
    return shapes


def random_weights(config, seed):
    rng = torch.Generator().manual_seed(seed)
    weights = {}
    for key, shape in simcodec_shapes(config).items():
        x = torch.randn(*shape, generator=rng)
        if key.endswith("weight_g") or (len(shape) == 1 and key.endswith("weight")):
            weights[key] = (1 + 0.2 * x) * (0.7 if ".convs" in key else 1.3)
        else:
            weights[key] = 0.1 * x if len(shape) == 1 else x * (0.3 if shape[-1] == 3 else 0.7)
    return weights


def weight(w, key):
    if f"{key}.weight" in w:
        return w[f"{key}.weight"]
    v = w[f"{key}.weight_v"]
    return w[f"{key}.weight_g"] * v / v.flatten(1).norm(dim=1)[:, None, None]


def conv(w, key, x, **options):
    return F.conv1d(x, weight(w, key), w[f"{key}.bias"], **options)


def resblock(w, key, x, kernel, dilations):
    for i, d in enumerate(dilations):
        y = conv(w, f"{key}.convs1.{i}", F.leaky_relu(x, 0.1), dilation=d, padding=(kernel * d - d) // 2)
        x = x + conv(w, f"{key}.convs2.{i}", F.leaky_relu(y, 0.1), padding=(kernel - 1) // 2)
    return x


def encode(w, config, wave, taps):
    is_hifi, blocks = "n_q" not in config, len(config["resblock_kernel_sizes"])
    x = taps["enc.conv_pre"] = conv(w, "encoder.conv_pre", wave, padding=3)
    pairs = list(zip(config["upsample_rates"], config["upsample_kernel_sizes"], strict=True))[::-1]
    kinds = list(zip(config["resblock_kernel_sizes"], config["resblock_dilation_sizes"], strict=True))[::-1]
    for stage, (rate, kernel) in enumerate(pairs):
        x = F.leaky_relu(x, 0.1) if is_hifi else x
        x = taps[f"enc.down{stage}"] = conv(w, f"encoder.ups.{stage}", x, stride=rate, padding=(kernel - rate) // 2)
        total = 0
        for block, kind in enumerate(kinds):
            index = stage * blocks + block
            total = total + resblock(w, f"encoder.resblocks.{index}", x, *kind)
            scale, shift = w[f"encoder.normalize.{index}.weight"], w[f"encoder.normalize.{index}.bias"]
            if is_hifi:
                total = F.group_norm(total, config["groupnorm_groups"][stage], scale, shift, 1e-6)
            else:
                total = F.layer_norm(total.mT, total.shape[1:2], scale, shift, 1e-6).mT
        x = taps[f"enc.stage{stage}"] = total / blocks
    taps["enc.before_post"] = x
    return conv(w, "encoder.conv_post", F.leaky_relu(x, 0.01 if is_hifi else 0.1), padding=1)


def quantize(w, config, latent, layers=None, mask=None):
    """quantized, loss, codes [B, T, Q] and the smallest relative lead of a chosen code."""
    batch, _, frames = latent.shape
    residual = latent.transpose(1, 2).flatten(0, 1)
    total, codes, losses, lead = 0, [], [], 1.0
    for layer in range(layers or config.get("n_q", 2)):
        parts, spreads = [], []
        for group, x in enumerate(residual.chunk(config["n_code_groups"], dim=1)):
            e = w[codebook_key(config, layer, group)]
            distance = (x[:, None] - e).square().sum(-1)
            best = distance.detach().topk(2, largest=False)[0]
            lead = min(lead, float(((best[:, 1] - best[:, 0]) / best[:, 1]).min()))
            codes.append(distance.argmin(1).view(batch, frames))
            parts.append(e[codes[-1].flatten()])
            spreads.append(F.cross_entropy(3 * e @ e.T, torch.arange(len(e))))
        q = torch.cat(parts, dim=1)
        keep = 1.0 if mask is None else (mask.flatten()[:, None] >= layer).float()
        loss = config["codebook_loss_lambda"] * ((q - residual.detach()).square() * keep).mean()
        loss = loss + config["commitment_loss_lambda"] * ((q.detach() - residual).square() * keep).mean()
        losses.append(loss + (0.1 * sum(spreads) / len(spreads) if "n_q" in config and layer == 0 else 0))
        through = residual + (q - residual).detach()
        total, residual = total + through * keep, residual - through
    quantized = total.view(batch, frames, -1).transpose(1, 2)
    return quantized, sum(losses) / len(losses), torch.stack(codes, dim=-1), lead


def lookup(w, config, codes):
    groups, total = config["n_code_groups"], 0
    for layer in range(codes.shape[2] // groups):
        rows = [w[codebook_key(config, layer, g)][codes[..., layer * groups + g]] for g in range(groups)]
        total = total + torch.cat(rows, dim=-1)
    return total.transpose(1, 2)


def decode(w, config, z, taps):
    is_hifi, blocks = "n_q" not in config, len(config["resblock_kernel_sizes"])
    kinds = list(zip(config["resblock_kernel_sizes"], config["resblock_dilation_sizes"], strict=True))
    x = taps["dec.conv_pre"] = conv(w, "generator.conv_pre", z, padding=3)
    for stage, (rate, kernel) in enumerate(zip(config["upsample_rates"], config["upsample_kernel_sizes"], strict=True)):
        x, key = F.leaky_relu(x, 0.1) if is_hifi else x, f"generator.ups.{stage}"
        x = F.conv_transpose1d(x, weight(w, key), w[f"{key}.bias"], stride=rate, padding=(kernel - rate) // 2)
        taps[f"dec.up{stage}"] = x
        x = sum(resblock(w, f"generator.resblocks.{stage * blocks + b}", x, *kinds[b]) for b in range(blocks)) / blocks
    x = taps["dec.before_post"] = F.leaky_relu(x, 0.1)
    return torch.tanh(conv(w, "generator.conv_post", x, padding=3))


def record(w, config, wave):
    """All that a recorded clip has, and the smallest lead."""
    io = {"wav": wave}
    io["latent"] = io["enc.latent"] = latent = encode(w, config, wave, io)
    io["quantized"], io["q_loss"], io["codes"], lead = quantize(w, config, latent)
    io["embed"] = lookup(w, config, io["codes"])
    io["decoded"] = decode(w, config, io["embed"], io)
    return io, lead


def training(w, config, wave):
    """Losses, and the gradient of every weight."""
    w = {key: value.clone().requires_grad_() for key, value in w.items()}
    quantized, loss, *_ = quantize(w, config, encode(w, config, wave, {}))
    l1 = (decode(w, config, quantized, {}) - wave).abs().mean()
    (10 * loss + l1).backward()
    return {"q_loss": loss, "l1": l1} | {
        f"grad.{key}": value.grad for key, value in w.items() if value.grad is not None
    }
