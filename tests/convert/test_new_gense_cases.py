"""New cases of GenSE, of sizes that no recorded case has, pass as well; and the authors' folder is read.

They are recorded from the models of `transformers`: the whole sequence again for each token, every layer, no cache.
"""

import json
import re

import mediatok as mt
import pytest
import torch
import torch.nn.functional as F
import yaml
from mediatok.convert import from_official, is_official_folder, parity, simcodec
from mediatok.core.errors import InvalidCheckpoint, ModelNotFound
from mediatok.tokenizers.speech.simcodec import SimCodec
from safetensors.torch import save_file
from transformers import GPT2Config, GPT2LMHeadModel, Wav2Vec2Config, Wav2Vec2Model, WavLMConfig, WavLMModel

CONVS = "[(12,10,5)] + [(12,3,2)] * 4 + [(12,2,2)] * 2"
FAIRSEQ = (  # ours of the library -> the authors'
    (r"feature_extractor\.conv_layers\.(\d)\.conv\.", r"feature_extractor.conv_layers.\1.0."),
    (r"feature_extractor\.conv_layers\.(\d)\.layer_norm\.", r"feature_extractor.conv_layers.\1.2.1."),
    (r"feature_projection\.layer_norm\.", "layer_norm."),
    (r"feature_projection\.projection\.", "post_extract_proj."),
    (r"encoder\.pos_conv_embed\.conv\.parametrizations\.weight\.original0", "encoder.pos_conv.0.weight_g"),
    (r"encoder\.pos_conv_embed\.conv\.parametrizations\.weight\.original1", "encoder.pos_conv.0.weight_v"),
    (r"encoder\.pos_conv_embed\.conv\.bias", "encoder.pos_conv.0.bias"),
    (r"(layers\.\d+)\.layer_norm\.", r"\1.self_attn_layer_norm."),
    (r"(layers\.\d+)\.attention\.gru_rel_pos_linear\.", r"\1.self_attn.grep_linear."),
    (r"(layers\.\d+)\.attention\.gru_rel_pos_const", r"\1.self_attn.grep_a"),
    (r"(layers\.\d+)\.attention\.rel_attn_embed\.", r"\1.self_attn.relative_attention_bias."),
    (r"(layers\.\d+)\.attention\.", r"\1.self_attn."),
    (r"(layers\.\d+)\.feed_forward\.intermediate_dense\.", r"\1.fc1."),
    (r"(layers\.\d+)\.feed_forward\.output_dense\.", r"\1.fc2."),
    (r"masked_spec_embed", "mask_emb"),
)


def replay(folder, config, weights, io):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    for name, tensors in {"weights": weights, "io": io}.items():
        tensors = {key: value.detach().clone().contiguous() for key, value in tensors.items()}
        save_file(tensors, folder / f"{name}.safetensors")
    lines = []
    assert parity.run([folder], lines.append), "\n".join(lines)
    return lines


def gpt2(vocab, positions, width, depth, heads):
    config = GPT2Config(
        vocab_size=vocab, n_positions=positions, n_embd=width, n_layer=depth, n_head=heads, initializer_range=0.2,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = GPT2LMHeadModel(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or "ln_" in name:
            parameter.data += 0.2 * torch.randn_like(parameter)
    return model


def language_models(width, depth, heads, semantic, acoustic, positions=(600, 2100)):
    torch.manual_seed(width)
    vocabularies = {"n2s": semantic + 3, "s2s": semantic + acoustic + 3}
    lms = {
        name: gpt2(vocab, table, width, depth, heads)
        for (name, vocab), table in zip(vocabularies.items(), positions, strict=True)
    }
    config = {
        "hidden_size": width, "num_hidden_layers": depth, "num_attention_heads": heads, "semantic_num": semantic,
        "n2s_vocab_size": vocabularies["n2s"], "s2s_vocab_size": vocabularies["s2s"],
    }  # fmt: skip
    weights = {f"{name}.lm.{key}": value for name, lm in lms.items() for key, value in lm.state_dict().items()}
    return lms, config, weights


def call(lm, ids, positions, hidden=False):
    """No cache, and a mask of ones, without which the library cuts the sequence where positions restart."""
    with torch.no_grad():
        out = lm(
            ids, position_ids=positions, attention_mask=torch.ones_like(ids), use_cache=False, output_hidden_states=True
        )
    return (out.logits, out.hidden_states[1]) if hidden else out.logits


@pytest.mark.parametrize(
    ("width", "depth", "heads", "batch", "length"), [(24, 1, 3, 1, 9), (48, 4, 2, 5, 31), (16, 2, 1, 2, 60)]
)
def test_language_models(tmp_path, width, depth, heads, batch, length):
    lms, config, weights = language_models(width, depth, heads, semantic=17, acoustic=40)
    io = {}
    for name, lm in lms.items():
        ids = torch.randint(lm.config.vocab_size, (batch, length))
        positions = torch.cat([torch.arange(length // 2), torch.arange(length - length // 2)]).expand(batch, -1)
        logits, hidden = call(lm, ids, positions, hidden=True)
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        io |= {f"{name}.ids": ids, f"{name}.positions": positions, f"{name}.logits": logits, f"{name}.loss": loss}
        io[f"{name}.hidden1"] = hidden
    lines = replay(tmp_path / "c", {"system": "gense", "kind": "lm_forward", "config": {"model": config}}, weights, io)
    assert len(lines) == len(io) - 4 + 1


def encoder(kind, width=36, depth=7, heads=3, ffn=50, distance=18):
    """The library's model, its authors' config and weights under the authors' names."""
    torch.manual_seed(width)
    shared = {
        "hidden_size": width, "num_hidden_layers": depth, "num_attention_heads": heads, "intermediate_size": ffn,
        "conv_dim": (12,) * 7, "num_conv_pos_embeddings": 14, "num_conv_pos_embedding_groups": 4, "layerdrop": 0.0,
        "feat_extract_norm": "layer", "do_stable_layer_norm": True, "conv_bias": kind == "wav2vec2",
    }  # fmt: skip
    config = {"encoder_layers": depth, "encoder_attention_heads": heads, "layer_norm_first": True}
    config["conv_feature_layers"] = CONVS
    if kind == "wavlm":
        model = WavLMModel(WavLMConfig(**shared, num_buckets=12, max_bucket_distance=distance))
        config |= {"max_distance": distance, "num_buckets": 12}
    else:
        model = Wav2Vec2Model(Wav2Vec2Config(**shared))
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    weights = {}
    for key, value in model.eval().state_dict().items():
        for ours, theirs in FAIRSEQ:
            key = re.sub(ours, theirs, key)
        weights[key] = value
    assert "layer_norm.weight" in weights
    assert "encoder.layers.0.self_attn_layer_norm.weight" in weights
    return model, config, weights


def states_of(model, wave, mask=None):
    with torch.no_grad():
        out = model(F.pad(wave, (0, 100)) if mask is None else wave, attention_mask=mask, output_hidden_states=True)
    return out.hidden_states, out.last_hidden_state


@pytest.mark.parametrize(("kind", "seconds"), [("wavlm", (0.9, 0.5, 0.26)), ("wavlm", (0.4, 0.7))])
def test_encoder_of_clips_and_batches(tmp_path, kind, seconds):
    model, config, weights = encoder(kind)
    wave = 0.3 * torch.randn(1, 9000)
    with torch.no_grad():
        out = model(wave, output_hidden_states=True)
    features = out.hidden_states[6]
    centers = features[0, torch.randperm(features.shape[1])[:11]]
    distances = torch.cdist(features, centers[None])
    lengths = torch.tensor([int(s * 16000) for s in seconds])
    batch = 0.3 * torch.randn(len(lengths), int(lengths.max()))
    sample_mask = torch.arange(batch.shape[1]) < lengths[:, None]
    with torch.no_grad():
        batched = model(batch * sample_mask, attention_mask=sample_mask.long(), output_hidden_states=True)
    frames = (lengths - 400) // 320 + 1
    is_padding = torch.arange(batched.last_hidden_state.shape[1]) >= frames[:, None]
    io = {
        "one.wav": wave, "one.layers": torch.stack(out.hidden_states[:-1]), "one.normed": out.last_hidden_state,
        "one.layer6": features, "one.tokens": distances.argmin(-1), "batch.wav": batch, "batch.lengths": lengths,
        "batch.padding_mask": is_padding, "batch.layer2": batched.hidden_states[2],
        "batch.normed": batched.last_hidden_state,
    }  # fmt: skip
    # The library gives the last layer only behind its norm.
    io["one.layers"] = torch.cat([io["one.layers"], last_block(model, wave)[None]])
    replay(
        tmp_path / "c", {"system": "gense", "kind": "wavlm", "config": config},
        weights | {"km.emb.weight": centers}, io,
    )  # fmt: skip


def last_block(model, wave):
    outputs = []
    handle = model.encoder.layers[-1].register_forward_hook(lambda module, args, output: outputs.append(output))
    with torch.no_grad():
        model(wave)
    handle.remove()
    return outputs[0][0] if isinstance(outputs[0], tuple) else outputs[0]


def write(lm, ids, positions, new_positions, first, choose):
    """The loop of the official code, with what is recorded of it."""
    logits_of, noise = [], -torch.rand(len(new_positions), lm.config.vocab_size).log()
    for step, position in enumerate(new_positions):
        last_ids, last_positions = ids, torch.tensor([positions])
        logits = call(lm, ids, last_positions)[:, -1]
        logits_of.append(logits[0])
        allowed = logits.masked_fill(torch.arange(logits.shape[1]) < first, -1e5)
        chosen = choose(allowed.softmax(-1), noise[step])
        ids, positions = torch.cat([ids, chosen[:, None]], 1), [*positions, position]
    record = {"logits": torch.stack(logits_of), "last_ids": last_ids, "last_positions": last_positions}
    return ids[:, -len(new_positions) :], record, noise


def pipeline(kind, wave, acoustic, num_acoustic, width, depth, heads, clusters=13, distance=18):
    """Config, weights and recorded tensors of a whole chain."""
    model, ssl, weights = encoder(kind, distance=distance)
    states, last = states_of(model, wave)
    features = states[6]
    centers = features[0, torch.linspace(0, features.shape[1] - 1, clusters).long()]
    semantic = torch.cdist(features, centers[None]).argmin(-1)
    lms, sizes, lm_weights = language_models(width, depth, heads, clusters, num_acoustic)
    squares = features[0].square().sum(1, keepdim=True) + centers.square().sum(1)
    io = {
        "wav": wave[None], "noisy_acoustic": acoustic[..., None], "ssl.layer1": states[1], "ssl.layer6": features,
        "ssl.last_normed": last, "km.distances": squares - 2 * features[0] @ centers.T,
    }  # fmt: skip
    length, voice = semantic.shape[1], acoustic.shape[1]
    count, begin = (2 * length + voice) // 2, torch.ones(1, 1, dtype=torch.long)
    for way, choose in (("sample", lambda p, q: (p / q).argmax(-1)), ("greedy", lambda p, q: p.argmax(-1))):
        clean, n2s, n2s_noise = write(
            lms["n2s"], torch.cat([semantic + 3, begin], 1), [*range(length + 1)], range(length), 3, choose
        )
        first = 3 + clusters
        prompt = torch.cat([semantic + 3, clean, begin, acoustic + first], 1)
        positions = [*range(2 * length + 1), *range(voice)]
        written, s2s, s2s_noise = write(lms["s2s"], prompt, positions, range(1000, 1000 + count), first, choose)
        io |= {f"{way}.noisy_semantic": semantic, f"{way}.clean_semantic": clean[0] - 3}
        io[f"{way}.acoustic"] = (written - first)[..., None]
        io |= {f"{way}.n2s.{key}": value for key, value in n2s.items()}
        io |= {f"{way}.s2s.{key}": value for key, value in s2s.items()}
        if way == "sample":
            io |= {"sample.n2s.noise": n2s_noise, "sample.s2s.noise": s2s_noise}
    weights = lm_weights | {f"n2s.xlsr.{key}": value for key, value in weights.items()} | {"n2s.km.emb.weight": centers}
    config = {"system": "gense", "kind": "pipeline", "config": {"model": sizes, "ssl": ssl}}
    return config, weights, io


@pytest.mark.parametrize(
    ("kind", "samples", "rate", "width", "depth", "heads"),
    [
        ("wav2vec2", 3200, 2, 24, 2, 2),
        ("wavlm", 4800, 1, 40, 1, 5),
        ("wavlm", 5000, 2, 16, 3, 1),  # the last token's samples are not whole
        ("wav2vec2", 5119, 1, 32, 2, 4),
    ],
)
def test_pipelines(tmp_path, kind, samples, rate, width, depth, heads):
    torch.manual_seed(samples)
    wave = 0.3 * torch.randn(1, samples)
    acoustic = torch.randint(21, (1, rate * samples // 320))
    lines = replay(tmp_path / "c", *pipeline(kind, wave, acoustic, 21, width, depth, heads))
    assert len(lines) == 6 - 2 + 1 + 2 * 9 + 1  # of layer 6 twice


def small_codec():
    torch.manual_seed(3)
    return SimCodec(
        en_filters=2, de_filters=3, vq_dim=6, upsample_rates=(5, 4, 4, 2), upsample_kernel_sizes=(11, 8, 8, 4),
        resblock_kernel_sizes=(3,), resblock_dilation_sizes=((1, 2),), n_codes=21,
    ).eval()  # fmt: skip


def codec_weights(codec):
    own = codec.state_dict()
    return {f"s2s.codec_tokenizer.{key}": own[name] for key, name in simcodec.official_names(codec).items()}


CODEC = {
    "channel": 1, "en_filters": 2, "de_filters": 3, "vq_dim": 6, "upsample_rates": [5, 4, 4, 2],
    "upsample_kernel_sizes": [11, 8, 8, 4], "resblock_kernel_sizes": [3], "resblock_dilation_sizes": [[1, 2]],
    "n_q": 1, "n_code_groups": 1, "n_codes": 21,
}  # fmt: skip


def test_a_pipeline_with_a_codec_of_another_size(tmp_path):
    codec, wave = small_codec(), 0.3 * torch.randn(1, 3200)
    with torch.no_grad():
        acoustic = codec.encode_waveform(wave)
        config, weights, io = pipeline("wavlm", wave, acoustic, 21, 24, 2, 3)
        for way in ("sample", "greedy"):
            io[f"{way}.enhanced"] = codec.decode_ids(io[f"{way}.acoustic"][..., 0])
    config["config"]["codec"] = CODEC
    replay(tmp_path / "c", config, weights | codec_weights(codec), io)


def test_a_changed_token_fails(tmp_path):
    torch.manual_seed(0)
    config, weights, io = pipeline("wav2vec2", 0.3 * torch.randn(1, 1600), torch.randint(21, (1, 10)), 21, 24, 1, 2)
    io["sample.acoustic"][0, 3] = (io["sample.acoustic"][0, 3] + 1) % 21
    with pytest.raises(AssertionError, match=r"sample\.acoustic .*FAIL"):
        replay(tmp_path / "c", config, weights, io)


# The authors' folder.


@pytest.fixture
def released(tmp_path):
    """The authors' folder with small models, a waveform, and what their code makes of it without chance."""
    codec, wave = small_codec(), 0.3 * torch.randn(1, 3200)
    with torch.no_grad():
        config, weights, io = pipeline("wavlm", wave, codec.encode_waveform(wave), 21, 24, 1, 3, distance=800)
        enhanced = codec.decode_ids(io["greedy.acoustic"][..., 0])
    weights |= codec_weights(codec)
    weights |= {key.replace("n2s.", "s2s.", 1): value for key, value in weights.items() if key.startswith("n2s.xlsr")}
    for name in ("n2s", "s2s"):
        own = {key[4:]: value for key, value in weights.items() if key.startswith(f"{name}.")}
        torch.save({"state_dict": own}, tmp_path / f"{name}_wavlm.ckpt")
    paths = {"n2s_ckpt_path": "ckpts/n2s_wavlm.ckpt", "s2s_ckpt_path": "ckpts/s2s_wavlm.ckpt"}
    paths["codec_config_path"] = "configs/config.json"
    official = {"path": paths, "model": config["config"]["model"], "ssl_model": {"type": "wavlm", "km_path": "x.mdl"}}
    (tmp_path / "gense.yaml").write_text(yaml.safe_dump(official))
    (tmp_path / "config.json").write_text(json.dumps(CODEC))
    return tmp_path, wave, enhanced


def test_the_authors_folder_is_read(released, tmp_path_factory):
    folder, wave, enhanced = released
    assert is_official_folder(folder)
    model = mt.load(folder)
    assert model.name == folder.name
    audio = mt.Waveform(wave, 16000)
    torch.testing.assert_close(model.enhance(audio, greedy=True).samples, enhanced, atol=2e-5, rtol=0)
    # In our layout it finds its tokenizers by the names that it is given.
    ours = tmp_path_factory.mktemp("ours")
    for name, part in (("semantic", model.semantic_tokenizer), ("codec", model.codec)):
        part.save_pretrained(ours / name)
    model.register_to_config(semantic_tokenizer=str(ours / "semantic"), codec=str(ours / "codec"))
    model.save_pretrained(ours / "gense")
    again = mt.load(ours / "gense")
    torch.testing.assert_close(again.enhance(audio, greedy=True).samples, enhanced, atol=2e-5, rtol=0)


def test_an_incomplete_folder_is_named(released):
    folder, *_ = released
    (folder / "s2s_wavlm.ckpt").unlink()
    with pytest.raises(ModelNotFound, match=r"s2s_wavlm\.ckpt, which is missing"):
        mt.load(folder)
    config = yaml.safe_load((folder / "gense.yaml").read_text())
    del config["path"]["n2s_ckpt_path"]
    (folder / "gense.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(InvalidCheckpoint, match=r"lacks path\.n2s_ckpt_path"):
        mt.load(folder)


def test_foreign_weights_are_refused():
    _, sizes, weights = language_models(16, 1, 2, 9, 5)
    config = {"model": sizes}
    model = from_official("gense", config, weights)
    assert (model.config.num_semantic, model.config.num_acoustic) == (9, 5)
    assert (model.config.n2s_positions, model.config.s2s_positions) == (600, 2100)
    masks = {f"n2s.lm.transformer.h.0.attn.{name}": torch.ones(1, 1, 4, 4) for name in ("bias", "masked_bias")}
    from_official("gense", config, weights | masks)  # older libraries saved them
    head = weights["n2s.lm.lm_head.weight"]
    for changed, message in (
        ({"n2s.lm.lm_head.weight": head + 1}, "ties it"),
        ({"n2s.lm.extra": head}, r"unknown n2s\.lm\.extra"),
        ({"optimizer.state": head}, "optimizer.state is no key of GenSE"),
        ({"s2s.lm.transformer.h.0.mlp.c_fc.weight": head}, r"c_fc\.weight has shape"),
        ({"s2s.codec_tokenizer.encoder.conv_pre.weight": head}, "codec"),
    ):
        with pytest.raises(InvalidCheckpoint, match=message):
            from_official("gense", config, weights | changed)
    with pytest.raises(InvalidCheckpoint, match="do not consist of"):
        from_official("gense", {"model": sizes | {"semantic_num": 8}}, weights)
    with pytest.raises(InvalidCheckpoint, match=r"wpe\.weight is missing"):
        from_official("gense", config, {key: value for key, value in weights.items() if "wpe" not in key})
