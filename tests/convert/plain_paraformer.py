"""Paraformer once more, as plain functions over official keys, to record new cases with.

Written from the description of the authors' code and sharing nothing with ours: convolutions over [B, C, T], masked
softmax in separate steps, integrate-and-fire frame by frame, loops over rows.
"""

import math

import torch
import torch.nn.functional as F


def linear(w, key, x):
    return x @ w[f"{key}.weight"].T + w.get(f"{key}.bias", 0)


def norm(w, key, x, eps=1e-12):
    mean = x.mean(-1, keepdim=True)
    variance = ((x - mean) ** 2).mean(-1, keepdim=True)
    return (x - mean) / (variance + eps) ** 0.5 * w[f"{key}.weight"] + w[f"{key}.bias"]


def mask_of(lengths, size):
    return (torch.arange(size)[None] < torch.as_tensor(lengths)[:, None]).float()


def attend(q, k, v, heads, mask):
    b, length, width = q.shape
    size = width // heads
    out = torch.zeros(b, length, width)
    for h in range(heads):
        part = slice(h * size, (h + 1) * size)
        scores = (q[..., part] * size**-0.5) @ k[..., part].transpose(1, 2)
        scores = scores.masked_fill(mask[:, None, :] == 0, float("-inf"))
        weights = torch.softmax(scores, -1).masked_fill(mask[:, None, :] == 0, 0.0)
        out[..., part] = weights @ v[..., part]
    return out


def fsmn(w, key, x, mask, shift):
    kernel = w[f"{key}.weight"]
    taps = kernel.shape[-1]
    left = (taps - 1) // 2 + shift
    x = x * mask[..., None]
    padded = F.pad(x.transpose(1, 2), (left, taps - 1 - left))
    return (F.conv1d(padded, kernel, groups=x.shape[-1]).transpose(1, 2) + x) * mask[..., None]


# Encoder.


def encoder_layer(w, at, x, mask, heads, shift):
    y = norm(w, f"{at}.norm1", x)
    q, k, v = linear(w, f"{at}.self_attn.linear_q_k_v", y).chunk(3, -1)
    memory = fsmn(w, f"{at}.self_attn.fsmn_block", v, mask, shift)
    y = linear(w, f"{at}.self_attn.linear_out", attend(q, k, v, heads, mask)) + memory
    x = x + y if x.shape == y.shape else y
    hidden = F.relu(linear(w, f"{at}.feed_forward.w_1", norm(w, f"{at}.norm2", x)))
    return x + linear(w, f"{at}.feed_forward.w_2", hidden)


def encoder(w, config, xs, lengths, at=""):
    conf = config["encoder_conf"]
    depth = xs.shape[-1]
    half = depth // 2
    x = xs * conf["output_size"] ** 0.5
    for i in range(half):
        rate = math.exp(-i * math.log(10000) / (half - 1))
        angle = torch.arange(1, xs.shape[1] + 1).float() * rate
        x = x + F.one_hot(torch.tensor(i), depth) * angle.sin()[:, None]
        x = x + F.one_hot(torch.tensor(half + i), depth) * angle.cos()[:, None]
    mask = mask_of(lengths, xs.shape[1])
    args = (mask, conf["attention_heads"], conf["sanm_shfit"])
    outputs = {"pe": x}
    for i in range(conf["num_blocks"]):
        x = encoder_layer(w, f"{at}encoders0.0" if i == 0 else f"{at}encoders.{i - 1}", x, *args)
        outputs[f"layer{i}"] = x
    return outputs | {"out": norm(w, f"{at}after_norm", x)}


def encoder_shapes(config, at=""):
    c, size = config["encoder_conf"], config["input_size"]
    d, hidden = c["output_size"], c["linear_units"]
    shapes = {}
    for i in range(c["num_blocks"]):
        key = f"{at}encoders0.0" if i == 0 else f"{at}encoders.{i - 1}"
        width = size if i == 0 else d
        shapes |= layer_norm(f"{key}.norm1", width) | layer_norm(f"{key}.norm2", d)
        shapes |= dense(f"{key}.self_attn.linear_q_k_v", 3 * d, width) | dense(f"{key}.self_attn.linear_out", d, d)
        shapes |= {f"{key}.self_attn.fsmn_block.weight": (d, 1, c["kernel_size"])}
        shapes |= dense(f"{key}.feed_forward.w_1", hidden, d) | dense(f"{key}.feed_forward.w_2", d, hidden)
    return shapes | layer_norm(f"{at}after_norm", d)


def dense(key, out, size, bias=True):
    return {f"{key}.weight": (out, size)} | ({f"{key}.bias": (out,)} if bias else {})


def layer_norm(key, size):
    return {f"{key}.weight": (size,), f"{key}.bias": (size,)}


# Decoder.


def decoder_ff(w, at, x):
    hidden = norm(w, f"{at}.feed_forward.norm", F.relu(linear(w, f"{at}.feed_forward.w_1", x)))
    return linear(w, f"{at}.feed_forward.w_2", hidden)


def decoder(w, conf, x, counts, memory, lengths, at=""):
    """Outputs of all layers, and the last hidden vectors."""
    inside, there = mask_of(counts, x.shape[1]), mask_of(lengths, memory.shape[1])
    outputs = {}
    for i in range(max(conf["num_blocks"], conf["att_layer_num"])):
        attends = i < conf["att_layer_num"]
        key = f"{at}decoders.{i}" if attends else f"{at}decoders2.{i - conf['att_layer_num']}"
        y = norm(w, f"{key}.norm2", decoder_ff(w, key, norm(w, f"{key}.norm1", x)))
        x = x + fsmn(w, f"{key}.self_attn.fsmn_block", y, inside, conf["sanm_shfit"] if attends else 0)
        if attends:
            q = linear(w, f"{key}.src_attn.linear_q", norm(w, f"{key}.norm3", x))
            k, v = linear(w, f"{key}.src_attn.linear_k_v", memory).chunk(2, -1)
            x = x + linear(w, f"{key}.src_attn.linear_out", attend(q, k, v, conf["attention_heads"], there))
        outputs[f"layer{i}" if attends else f"layer2_{i - conf['att_layer_num']}"] = x
    x = decoder_ff(w, f"{at}decoders3.0", norm(w, f"{at}decoders3.0.norm1", x))
    return outputs | {"layer3_0": x, "after_norm": norm(w, f"{at}after_norm", x)}


def decoder_shapes(conf, width, vocab_size=None, at=""):
    hidden, shapes = conf["linear_units"], {}
    for i in range(max(conf["num_blocks"], conf["att_layer_num"])):
        attends = i < conf["att_layer_num"]
        key = f"{at}decoders.{i}" if attends else f"{at}decoders2.{i - conf['att_layer_num']}"
        shapes |= layer_norm(f"{key}.norm1", width) | layer_norm(f"{key}.norm2", width)
        shapes |= {f"{key}.self_attn.fsmn_block.weight": (width, 1, conf["kernel_size"])} | ff_shapes(
            key, width, hidden
        )
        if attends:
            shapes |= layer_norm(f"{key}.norm3", width) | dense(f"{key}.src_attn.linear_q", width, width)
            shapes |= dense(f"{key}.src_attn.linear_k_v", 2 * width, width)
            shapes |= dense(f"{key}.src_attn.linear_out", width, width)
    shapes |= layer_norm(f"{at}decoders3.0.norm1", width) | ff_shapes(f"{at}decoders3.0", width, hidden)
    shapes |= layer_norm(f"{at}after_norm", width)
    if vocab_size:
        shapes |= {f"{at}embed.0.weight": (vocab_size, width)} | dense(f"{at}output_layer", vocab_size, width)
    return shapes


def ff_shapes(key, width, hidden):
    shapes = dense(f"{key}.feed_forward.w_1", hidden, width) | dense(f"{key}.feed_forward.w_2", width, hidden, False)
    return shapes | layer_norm(f"{key}.feed_forward.norm", hidden)


# Predictor.


def rates(w, conf, hidden, mask, at="", depthwise=False):
    kernel = w[f"{at}cif_conv1d.weight"]
    x = F.pad(hidden.transpose(1, 2), (conf["l_order"], conf["r_order"]))
    y = F.conv1d(x, kernel, w[f"{at}cif_conv1d.bias"], groups=hidden.shape[-1] if depthwise else 1).transpose(1, 2)
    y = F.relu(y + hidden if depthwise else y)
    a = torch.sigmoid(linear(w, f"{at}cif_output", y)[..., 0])
    return F.relu(a * conf.get("smooth_factor", 1.0) - conf.get("noise_threshold", 0.0)) * mask


def with_tail(hidden, a, lengths, tail):
    a = torch.cat([a, torch.zeros(len(a), 1)], 1)
    for row, length in enumerate(lengths):
        a[row, length] += tail
    return torch.cat([hidden, torch.zeros(len(hidden), 1, hidden.shape[-1])], 1), a


def fire(hidden, a, rows=None):
    """Tokens [B, K, D] and levels [B, T], one frame after the other."""
    tokens, levels = [], []
    for h_row, a_row in zip(hidden, a, strict=True):
        level, filled = torch.zeros(()), torch.zeros(hidden.shape[-1])
        mine, trace = [], []
        for h, x in zip(h_row, a_row, strict=True):
            before, level = level, level + x
            trace.append(level)
            if level >= 1:
                mine.append(filled + (1 - before) * h)
                level = level - 1
                filled = (x - (1 - before)) * h
            else:
                filled = filled + x * h
        tokens.append(mine)
        levels.append(torch.stack(trace))
    rows = max(len(mine) for mine in tokens) if rows is None else rows
    zero = torch.zeros(hidden.shape[-1])
    return torch.stack([torch.stack([*mine, *[zero] * (rows - len(mine))]) for mine in tokens]), torch.stack(levels)


def fire_by_sums(hidden, a, rows=None):
    """The same from running sums, whose fp32 roundings decide where a token is complete."""
    tokens, levels = [], []
    for h, x in zip(hidden, a, strict=True):
        until = torch.cumsum(x.double(), 0).float()
        whole = until.floor()
        fires = [t for t in range(len(x)) if whole[t] > (whole[t - 1] if t else 0)]
        sums = torch.cumsum(x[:, None] * h, 0)
        ends = [sums[t] - (until[t] - whole[t]) * h[t] for t in fires]
        tokens.append([end - (ends[k - 1] if k else 0) for k, end in enumerate(ends)])
        levels.append(torch.stack([until[t] - whole[t] + (t in fires) for t in range(len(x))]))
    rows = max(len(mine) for mine in tokens) if rows is None else rows
    zero = torch.zeros(hidden.shape[-1])
    return torch.stack([torch.stack([*mine, *[zero] * (rows - len(mine))]) for mine in tokens]), torch.stack(levels)


def predictor_shapes(conf, depthwise=False, at=""):
    width, taps = conf["idim"], conf["l_order"] + conf["r_order"] + 1
    shapes = {f"{at}cif_conv1d.weight": (width, 1 if depthwise else width, taps), f"{at}cif_conv1d.bias": (width,)}
    return shapes | dense(f"{at}cif_output", 1, width)


# Training.


def smoothed_loss(logits, target, smoothing, per_token):
    total, tokens = 0.0, 0
    for scores, wanted in zip(logits, target, strict=True):
        for row, true in zip(scores.log_softmax(-1), wanted.tolist(), strict=True):
            if true < 0:
                continue
            aim = torch.full_like(row, smoothing / (len(row) - 1))
            aim[true] = 1 - smoothing
            total = total + sum(a * (math.log(a) - r) for a, r in zip(aim.tolist(), row, strict=True) if a > 0)
            tokens += 1
    return total / (tokens if per_token else len(target))


def training(w, config, speech, lengths, text, counts, orders):
    """The recorded tensors of kind train."""
    frames = encoder(w, config, speech, lengths, "encoder.")["out"]
    conf = config["predictor_conf"]
    a = rates(w, conf, frames, mask_of(lengths, speech.shape[1]), "predictor.")
    target = torch.full((len(text), int(counts.max()) + 1), -1)
    for row, count in enumerate(counts.tolist()):
        target[row, :count], target[row, count] = text[row, :count], 2
    sizes = counts + 1
    sums = a.sum(1)
    scaled = a * (sizes / sums)[:, None]
    embeds, levels = fire_by_sums(frames, scaled, target.shape[1])
    dec = config["decoder_conf"]

    def logits_of(x):
        hidden = decoder(w, dec, x, sizes, frames, lengths, "decoder.")["after_norm"]
        return linear(w, "decoder.output_layer", hidden)

    draft = logits_of(embeds).detach()
    mixed, right, glance, used = [], 0, [], []
    for row, size in enumerate(sizes.tolist()):
        same = int((draft[row, :size].argmax(-1) == target[row, :size]).sum())
        right += same
        shown = int(torch.tensor(float(size - same)) * config["sampling_ratio"])
        glance.append({"len": size, "same": same, "glanced": shown})
        chosen = set(orders[row][:shown]) if shown else set()
        if shown:
            used.append(torch.tensor([*orders[row], *[-1] * (target.shape[1] - size)]))
        rows = [
            w["decoder.embed.0.weight"][target[row, k]] if k in chosen else embeds[row, k] * (k < size)
            for k in range(target.shape[1])
        ]
        mixed.append(torch.stack(rows))
    mixed = torch.stack(mixed)
    att = smoothed_loss(logits_of(mixed), target, config["lsm_weight"], config["length_normalized_loss"])
    pre = (sizes - sums).abs().sum() / (sizes.sum() if config["length_normalized_loss"] else len(text))
    loss = att + config["predictor_weight"] * pre
    recorded = {
        "speech": speech, "speech_lens": lengths, "text": text, "text_lens": counts, "encoder_out": frames,
        "predictor_token_num": sums, "predictor_alphas": scaled, "predictor_embeds": embeds,
        "predictor_peaks": levels, "sampler_acoustic_embeds": embeds, "sampler_first_pass_logits": draft,
        "sampler_ys": target, "sampler_ys_lens": sizes, "sampler_semantic_embeds": mixed, "randperm": torch.stack(used),
        "loss": loss[None], "stats.loss_att": att[None], "stats.loss_pre": pre[None],
        "stats.acc": torch.tensor([right / int(sizes.sum())]),
    }  # fmt: skip
    loss.backward()
    recorded |= {f"grad.{name}": value.grad for name, value in w.items() if value.grad is not None}
    config["glance"] = glance
    return recorded


# Hotwords.


def lstm(w, at, x):
    """Two layers over one sequence [T, D]."""
    for layer in range(2):
        gates = {part: w[f"{at}.{part}_l{layer}"] for part in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")}
        h = c = torch.zeros(x.shape[1])
        outputs = []
        for now in x:
            every = gates["weight_ih"] @ now + gates["bias_ih"] + gates["weight_hh"] @ h + gates["bias_hh"]
            enter, forget, cell, leave = every.chunk(4)
            c = forget.sigmoid() * c + enter.sigmoid() * cell.tanh()
            h = leave.sigmoid() * c.tanh()
            outputs.append(h)
        x = torch.stack(outputs)
    return x


def seaco_shapes(config, width, vocab_size):
    shapes = encoder_shapes(config, "encoder.") | predictor_shapes(config["predictor_conf"], at="predictor.")
    shapes |= {"predictor.upsample_cnn.weight": (width, width, 3), "predictor.upsample_cnn.bias": (width,)}
    shapes |= dense("predictor.cif_output2", 1, 2 * width)
    for end in ("", "_reverse"):
        shapes |= lstm_shapes("predictor.blstm", f"_l0{end}", width)
    shapes |= decoder_shapes(config["decoder_conf"], width, vocab_size, "decoder.")
    shapes |= decoder_shapes(config["seaco_decoder_conf"] | {"att_layer_num": 6}, width, at="seaco_decoder.")
    for layer in range(2):
        shapes |= lstm_shapes("bias_encoder", f"_l{layer}", width)
    return shapes | dense("hotword_output_layer", vocab_size, width)


def lstm_shapes(at, end, width):
    matrices = {f"{at}.weight_{kind}{end}": (4 * width, width) for kind in ("ih", "hh")}
    return matrices | {f"{at}.bias_{kind}{end}": (4 * width,) for kind in ("ih", "hh")}


def seaco(w, config, feats, lengths, weight):
    """The recorded tensors of kind seaco, with the hotwords of the config."""
    frames = encoder(w, config, feats, lengths, "encoder.")["out"]
    conf, dec = config["predictor_conf"], config["decoder_conf"]
    a = rates(w, conf, frames, mask_of(lengths, feats.shape[1]), "predictor.")
    tailed, a = with_tail(frames, a, lengths, conf["tail_threshold"])
    counts = [int(row.sum()) for row in a]
    embeds = fire(tailed, a)[0][:, : max(counts)]
    hidden = decoder(w, dec, embeds, counts, frames, lengths, "decoder.")["after_norm"]
    plain = linear(w, "decoder.output_layer", hidden).log_softmax(-1)
    words = [w["decoder.embed.0.weight"][torch.tensor(ids)] for ids in config["hotwords"]]
    vectors = torch.stack([lstm(w, "bias_encoder", word)[-1] for word in words])
    memory, sizes = vectors[None].repeat(len(feats), 1, 1), [len(vectors)] * len(feats)
    hot_conf = config["seaco_decoder_conf"] | {"att_layer_num": 6}
    read = sum(decoder(w, hot_conf, x, counts, memory, sizes, "seaco_decoder.")["after_norm"] for x in (embeds, hidden))
    hot = linear(w, "hotword_output_layer", read).log_softmax(-1)
    is_none = (hot.argmax(-1) == config["NO_BIAS"]).float()[..., None]
    keep = (is_none + (1 - weight) / weight) * weight
    return {
        "feats": feats, "feats_lens": torch.as_tensor(lengths), "encoder_out": frames, "acoustic_embeds": embeds,
        "token_num": torch.tensor(counts).float(), "hotword.embeds": vectors, "no_hotword.log_probs": plain,
        f"hotword_w{weight:.1f}.log_probs".replace("w0.", "w0"): keep * plain + (1 - keep) * hot,
    }  # fmt: skip
