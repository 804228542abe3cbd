"""New cases of Paraformer's parts and training, of sizes that no recorded case has, pass as well; wrong ones do not."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from mediatok.convert import parity
from mediatok.convert.load import from_official
from mediatok.convert.paraformer import official_names
from mediatok.core.errors import InvalidCheckpoint, InvalidInput
from mediatok.generators.paraformer import Paraformer, released_configs
from safetensors.torch import save_file


def load_beside(name):
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


plain = load_beside("plain_paraformer")
DROPS = {"dropout_rate": 0.1, "attention_dropout_rate": 0.1}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Thousands of tiny operations, which more threads only slow down."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def draw_weights(shapes, seed):
    """No bias and no norm is trivial."""
    rng = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in shapes.items():
        x = torch.randn(*shape, generator=rng)
        if len(shape) == 1:
            weights[name] = 1 + 0.2 * x if "norm" in name and name.endswith("weight") else 0.1 * x
        else:
            weights[name] = x / (shape[1] * (shape[2] if len(shape) == 3 else 1)) ** 0.5
    return weights


def replay(folder, config, weights, io, expected=True):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"system": "paraformer", **config}))
    for name, tensors in {"weights": weights, "io": io}.items():
        tensors = {key: value.detach().clone().contiguous() for key, value in tensors.items()}
        save_file(tensors, folder / f"{name}.safetensors")
    lines = []
    assert parity.run([folder], lines.append) == expected, "\n".join(lines)
    return lines


def encoder_config(width, heads, hidden, depth, taps, size, shift=0):
    conf = {
        "output_size": width, "attention_heads": heads, "linear_units": hidden, "num_blocks": depth,
        "input_layer": "pe", "kernel_size": taps, "sanm_shfit": shift, **DROPS,
    }  # fmt: skip
    return {"encoder": "SANMEncoder", "encoder_conf": conf, "input_size": size}


def decoder_config(heads, hidden, depth, attends, taps, shift=0):
    conf = {
        "attention_heads": heads, "linear_units": hidden, "num_blocks": depth, "att_layer_num": attends,
        "kernel_size": taps, "sanm_shfit": shift, "dropout_rate": 0.1,
    }  # fmt: skip
    return {"decoder": "ParaformerSANMDecoder", "decoder_conf": conf}


@pytest.mark.parametrize(
    ("width", "heads", "hidden", "depth", "taps", "size", "lengths", "shift"),
    [
        (24, 3, 40, 1, 5, 30, (9,), 0),
        (40, 2, 24, 4, 7, 40, (21, 3, 12), 1),
        (16, 1, 64, 2, 4, 18, (1, 8, 5), 0),  # an even number of taps
    ],
)
def test_encoder(tmp_path, width, heads, hidden, depth, taps, size, lengths, shift):
    config = {"kind": "encoder", **encoder_config(width, heads, hidden, depth, taps, size, shift)}
    weights = draw_weights(plain.encoder_shapes(config), seed=width)
    xs = torch.randn(len(lengths), max(lengths), size, generator=torch.Generator().manual_seed(1))
    io = {"xs": xs, "xs_lens": torch.tensor(lengths)} | plain.encoder(weights, config, xs, lengths)
    replay(tmp_path / "new", config, weights, io)


@pytest.mark.parametrize(
    ("width", "heads", "hidden", "depth", "attends", "taps", "shift", "counts", "lengths", "vocab_size"),
    [
        (24, 3, 40, 1, 1, 5, 0, (4,), (9,), 11),
        (40, 2, 24, 5, 3, 7, 2, (6, 1, 3), (4, 9, 2), 23),
        (16, 4, 64, 2, 3, 9, 0, (5, 7), (3, 3), 50),  # fewer blocks than layers that attend
    ],
)
def test_decoder(tmp_path, width, heads, hidden, depth, attends, taps, shift, counts, lengths, vocab_size):
    config = {"kind": "decoder", **decoder_config(heads, hidden, depth, attends, taps, shift)}
    config |= {"vocab_size": vocab_size, "encoder_output_size": width}
    conf = config["decoder_conf"]
    weights = draw_weights(plain.decoder_shapes(conf, width, vocab_size), seed=width)
    rng = torch.Generator().manual_seed(1)
    embeds = torch.randn(len(counts), max(counts), width, generator=rng)
    memory = torch.randn(len(lengths), max(lengths), width, generator=rng)
    io = plain.decoder(weights, conf, embeds, counts, memory, lengths)
    io["logits"] = plain.linear(weights, "output_layer", io["after_norm"])
    io |= {"embeds": embeds, "embeds_lens": torch.tensor(counts), "memory": memory}
    replay(tmp_path / "new", config, weights, io | {"memory_lens": torch.tensor(lengths)})
    io["logits"] = io["logits"] + 1e-3
    assert "FAIL" in "".join(
        replay(tmp_path / "wrong", config, weights, io | {"memory_lens": torch.tensor(lengths)}, False)
    )


@pytest.mark.parametrize("name", ["CifPredictor", "CifPredictorV2"])
@pytest.mark.parametrize(("before", "after", "tail"), [(1, 1, 0.45), (0, 2, 0.3), (3, 0, 0.7)])
def test_predictor(tmp_path, name, before, after, tail):
    conf = {"idim": 20, "threshold": 1.0, "l_order": before, "r_order": after, "tail_threshold": tail}
    conf |= {"smooth_factor": 0.9, "noise_threshold": 0.02}
    depthwise = name == "CifPredictor"
    weights = draw_weights(plain.predictor_shapes(conf, depthwise), seed=before)
    lengths, rng = [17, 30, 8], torch.Generator().manual_seed(2)
    hidden = torch.randn(3, 30, 20, generator=rng)
    mask = plain.mask_of(lengths, 30)
    a = plain.rates(weights, conf, hidden, mask, depthwise=depthwise)
    tailed, rates = plain.with_tail(hidden, a, lengths, tail)
    way = plain.fire if depthwise else plain.fire_by_sums
    embeds, levels = way(tailed, rates)
    target = torch.full((3, 6), -1)
    io = {
        "hidden": hidden, "lens": torch.tensor(lengths), "mask": mask.bool()[:, None], "target": target,
        "x.infer.alphas": rates, "x.infer.embeds": embeds, "x.infer.peak": levels,
        "x.infer.token_num": rates.sum(1).floor(),
    }  # fmt: skip
    wanted = torch.tensor([4, 6, 2])
    for row, count in enumerate(wanted.tolist()):
        target[row, :count] = 3
    scaled = a * (wanted / a.sum(1))[:, None]
    embeds, levels = way(hidden, scaled, 6)
    io |= {"x.train.alphas": scaled, "x.train.embeds": embeds, "x.train.peak": levels, "x.train.token_num": a.sum(1)}
    config = {"kind": "predictor", "variants": {"x": {"predictor": name, "predictor_conf": conf}}}
    replay(tmp_path / "new", config, {f"x.{key}": value for key, value in weights.items()}, io)


@pytest.mark.parametrize(
    ("width", "heads", "size", "vocab_size", "counts", "ratio", "per_token"),
    [(24, 3, 30, 19, (5, 2, 7), 0.75, True), (16, 2, 22, 31, (4,), 0.4, False)],
)
def test_training(tmp_path, width, heads, size, vocab_size, counts, ratio, per_token):
    config = encoder_config(width, heads, 40, 2, 5, size) | decoder_config(heads, 32, 2, 2, 7)
    config |= {
        "kind": "train", "model": "Paraformer", "predictor": "CifPredictorV2", "vocab_size": vocab_size,
        "predictor_conf": {"idim": width, "l_order": 1, "r_order": 1, "tail_threshold": 0.45},
        "ctc_weight": 0.0, "lsm_weight": 0.1, "length_normalized_loss": per_token, "predictor_weight": 0.7,
        "predictor_bias": 1, "sampling_ratio": ratio,
    }  # fmt: skip
    shapes = plain.encoder_shapes(config, "encoder.")
    shapes |= plain.predictor_shapes(config["predictor_conf"], at="predictor.")
    shapes |= plain.decoder_shapes(config["decoder_conf"], width, vocab_size, "decoder.")
    weights = {key: value.requires_grad_() for key, value in draw_weights(shapes, seed=width).items()}
    rng = torch.Generator().manual_seed(3)
    lengths = torch.tensor([25 - 6 * row for row in range(len(counts))])
    speech = torch.randn(len(counts), 25, size, generator=rng)
    text = torch.randint(3, vocab_size, (len(counts), max(counts)), generator=rng)
    orders = [[count, *range(count)] for count in counts]  # the last token, which rounding may lose, is shown
    for row, count in enumerate(counts):
        text[row, count:] = -1
    io = plain.training(weights, config, speech, lengths, text, torch.tensor(counts), orders)
    replay(tmp_path / "new", config, weights, io)


@pytest.mark.parametrize(("weight", "no_hotword", "lengths"), [(0.7, 5, (14, 20, 9)), (0.3, 0, (11,))])
def test_hotwords(tmp_path, weight, no_hotword, lengths):
    width, vocab_size = 24, 13
    config = official(model="SeacoParaformer", predictor="CifPredictorV3", kind="seaco", hotwords=[[3, 4], [7], [1]])
    config["predictor_conf"] |= {
        "idim": width,
        "upsample_times": 3,
        "use_cif1_cnn": False,
        "upsample_type": "cnn_blstm",
    }
    config |= encoder_config(width, 2, 24, 2, 5, 28) | decoder_config(2, 24, 2, 2, 5)
    hotword_conf = {"attention_heads": 3, "linear_units": 20, "num_blocks": 4, "kernel_size": 7, "sanm_shfit": 0}
    config |= {"seaco_decoder": "ParaformerSANMDecoder", "seaco_decoder_conf": hotword_conf, "inner_dim": width}
    config |= {"bias_encoder_type": "lstm", "NO_BIAS": no_hotword}
    weights = draw_weights(plain.seaco_shapes(config, width, vocab_size), seed=4)
    feats = torch.randn(len(lengths), max(lengths), 28, generator=torch.Generator().manual_seed(5))
    io = plain.seaco(weights, config, feats, list(lengths), weight)
    replay(tmp_path / "new", config, weights, io)


def official(**changes):
    config = encoder_config(16, 2, 24, 2, 5, 28) | decoder_config(2, 24, 2, 2, 5)
    config |= {
        "model": "Paraformer", "predictor": "CifPredictorV2",
        "predictor_conf": {"idim": 16, "l_order": 1, "r_order": 1, "tail_threshold": 0.45},
        "frontend": "WavFrontend", "frontend_conf": {"n_mels": 4, "lfr_m": 7, "lfr_n": 6},
        "model_conf": {"ctc_weight": 0.0},
    }  # fmt: skip
    return config | changes


def official_weights(config):
    shapes = plain.encoder_shapes(config, "encoder.")
    shapes |= plain.predictor_shapes(config["predictor_conf"], at="predictor.")
    return draw_weights(shapes | plain.decoder_shapes(config["decoder_conf"], 16, 13, "decoder."), seed=0)


def test_from_official_reads_sizes_and_wrapped_keys():
    config = official()
    weights = official_weights(config)
    model = from_official("paraformer", config, {f"module.{key}": value for key, value in weights.items()})
    assert (model.config.vocab_size, model.config.width, model.config.encoder_depth) == (13, 16, 2)
    assert torch.equal(
        model.decoder.stack.layers[1].cross.kv.weight, weights["decoder.decoders.1.src_attn.linear_k_v.weight"]
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "ContextualParaformer"}, "older way of hotwords"),
        ({"model": "ParaformerStreaming"}, "trained on chunks"),
        ({"model": "Whisper"}, "model must be one of"),
        ({"model": "BiCifParaformer"}, "has a CifPredictorV3"),
        ({"encoder": "ConformerEncoder"}, "not implemented"),
        ({"decoder": "ParaformerDecoderSAN"}, "not implemented"),
        ({"frontend_conf": {"n_mels": 6, "lfr_m": 7, "lfr_n": 6}}, "the weights do not fit the config"),
        ({"frontend_conf": {"n_mels": 5, "lfr_m": 7, "lfr_n": 6}}, "impossible model"),
        ({"frontend_conf": {"n_mels": 4, "lfr_m": 7, "lfr_n": 6, "window": "povey"}}, "window must be one of"),
        ({"predictor_conf": {"idim": 16, "threshold": 0.9}}, "threshold must be 1"),
        ({"eos": 5}, "eos must be 2"),
        ({"token_list": ["a", "b"]}, "2 tokens for weights with 13"),
    ],
)
def test_other_configs_are_refused_with_a_reason(changes, message):
    weights = official_weights(official())
    with pytest.raises(InvalidCheckpoint, match=message):
        from_official("paraformer", official(**changes), weights)


def test_missing_and_unknown_keys_are_listed_by_the_authors_names():
    weights = official_weights(official())
    weights["decoder.extra"] = weights.pop("decoder.decoders3.0.norm1.weight")
    with pytest.raises(
        InvalidCheckpoint, match=r"missing decoder\.decoders3\.0\.norm1\.weight.*unknown decoder\.extra"
    ):
        from_official("paraformer", official(), weights)


@pytest.mark.parametrize(
    ("name", "tensors", "numbers"),
    [
        ("paraformer", 956, 220_084_533), ("paraformer-long", 968, 225_074_998), ("paraformer-en", 968, 226_731_398),
        ("paraformer-zh", 1095, 247_339_018),
    ],
)  # fmt: skip
def test_released_sizes(name, tensors, numbers):
    names = official_names(Paraformer, released_configs()[name])
    assert len(names) == tensors
    assert sum(torch.Size(shape).numel() for _, shape in names.values()) == numbers


def test_a_case_that_records_nothing_known_fails(tmp_path):
    config = {"kind": "specaug", "specaug_conf": {"lfr_rate": 6}}
    with pytest.raises(InvalidInput, match="lacks the input"):
        replay(tmp_path / "new", config, {"w": torch.ones(1)}, {"x": torch.ones(1, 4, 14)})
