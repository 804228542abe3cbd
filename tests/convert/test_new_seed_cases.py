"""SEED: cases of sizes that no recorded case has pass, and one that differs in a value does not."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from mediatok.convert import from_official, parity
from mediatok.core.errors import InvalidCheckpoint, InvalidInput
from safetensors.torch import load_file, save_file

CASES = Path(__file__).parent.parent / "parity" / "seed"
spec = importlib.util.spec_from_file_location("plain_seed", Path(__file__).with_name("plain_seed.py"))
plain = importlib.util.module_from_spec(spec)
spec.loader.exec_module(plain)

SIZES = {
    "one layer": {"layers": 1, "hidden": 12, "heads": 1, "vit_depth": 1},
    "five layers": {"layers": 5, "decode_depth": 3, "n_embed": 7, "codebook_dim": 2},
    "no mask": {"num_query": 9, "img": 20, "patch": 5, "vit_heads": 2, "image_dim": 3},
    "33 queries": {"num_query": 33, "hidden": 36, "heads": 3, "vit_dim": 8, "vit_heads": 4},
}


def save(folder, kind, config, weights, io):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"system": "seed", "kind": kind} | config))
    for name, tensors in (("weights", weights), ("io", io)):
        tensors = {key: value.detach().clone().contiguous() for key, value in tensors.items()}
        save_file(tensors, folder / f"{name}.safetensors")
    return folder


def replayed(folder):
    lines = []
    return parity.run([folder], lines.append), "\n".join(lines)


@torch.no_grad()
def tokenizer_case(folder, sizes, reverse=False, batch=2):
    arch = plain.arch(**sizes)
    draw = torch.Generator().manual_seed(3)
    image = torch.randn(batch, 3, arch["img"], arch["img"], generator=draw)
    free_ids = torch.randint(arch["n_embed"], (3, arch["num_query"]), generator=draw)
    for attempt in range(50):  # rounding decides no choice of a code
        weights = plain.random_weights(plain.tokenizer_shapes(arch, reverse), attempt)
        weights["quantize.embedding.weight"] *= 0.3
        io, margin = plain.record_tokenizer(weights, arch, image, free_ids)
        if margin > 1e-3:
            config = {"arch": arch, "use_qformer_image": reverse, "causal_queries": arch["num_query"] == 32}
            return save(folder, "tokenizer", config, weights, io)
    raise AssertionError("no clear choices")


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("reverse", [False, True])
def test_new_tokenizer_cases(tmp_path, name, reverse):
    passed, lines = replayed(tokenizer_case(tmp_path / "c", SIZES[name], reverse, batch=1 if reverse else 3))
    assert passed, lines


@pytest.mark.parametrize("changed", ["vit_out", "qformer_hidden_1", "indices", "blocks_image_out", "image_embedding"])
def test_one_changed_value_fails(tmp_path, changed):
    folder = tokenizer_case(tmp_path / "c", SIZES["one layer"])
    io = load_file(folder / "io.safetensors")
    io[changed].view(-1)[5] += 1
    save_file(io, folder / "io.safetensors")
    assert not replayed(folder)[0]


@pytest.mark.parametrize(("batch", "sizes"), [(1, {}), (4, {"layers": 2, "num_query": 5, "itc_dim": 3})])
def test_new_contrast_cases(tmp_path, batch, sizes):
    arch = plain.arch(**sizes)
    weights = {k: v.requires_grad_() for k, v in plain.random_weights(plain.contrast_shapes(arch), 8).items()}
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(arch["bert_vocab"], (batch, 7), generator=draw)
    is_token = (torch.arange(7) < torch.randint(2, 8, (batch, 1), generator=draw)).long()
    io = {"image": torch.randn(batch, 3, arch["img"], arch["img"], generator=draw), "input_ids": ids}
    features = plain.vision(weights, arch, io["image"])[1]
    seen = plain.qformer(weights, "Qformer.bert", arch, weights["query_tokens"], features)[:, -1]
    image = io["image_feat"] = F.normalize(plain.affine(weights, "vision_proj", seen), dim=-1)
    io["attention_mask"], io["text_hidden"] = is_token, plain.read_text(weights, arch, ids, is_token)
    text = io["text_feat"] = F.normalize(plain.affine(weights, "text_proj", io["text_hidden"][:, 0]), dim=-1)
    own = torch.arange(batch)
    scores = (image @ text.detach().T, text @ image.detach().T)
    loss = sum(F.cross_entropy(s / weights["temp"], own, label_smoothing=0.1) for s in scores) / 2
    loss.backward()
    io["loss_itc"] = loss[None]
    for name in ("query_tokens", "ln_vision.bias", "text_proj.weight", "vision_proj.bias", "temp",
                 "Qformer.bert.encoder.layer.0.crossattention.self.value.weight",
                 "Qformer.bert.encoder.layer.1.attention.self.key.weight",
                 "Qformer.bert.encoder.layer.1.output.dense.bias"):  # fmt: skip
        io[f"grad:{name}"] = weights[name].grad
    passed, lines = replayed(save(tmp_path / "c", "train_stage1_itc", {"arch": arch}, weights, io))
    assert passed, lines


@pytest.mark.parametrize("reverse", [False, True])
def test_new_codebook_cases(tmp_path, reverse):
    arch = plain.arch(decode_depth=2, num_query=32, layers=2)
    given = {"embed": 3.0, "recon_s": 0.5, "distil_image": 2.0}
    image = torch.randn(3, 3, arch["img"], arch["img"], generator=torch.Generator().manual_seed(2))
    for attempt in range(50):
        weights = plain.random_weights(plain.tokenizer_shapes(arch, reverse), 100 + attempt)
        weights = {k: v.requires_grad_() for k, v in weights.items()}
        with torch.no_grad():
            features = plain.vision(weights, arch, image)[1]
            target = plain.qformer(weights, "Qformer.bert", arch, weights["query_tokens"], features)
        ids, codes, vq_loss, margin = plain.quantize(weights, plain.encode_down(weights, target))
        if margin > 1e-3:
            break
    taps = {}
    embedding = plain.embedding_of(weights, arch, codes, taps)
    io = {"image": image, "indices": ids, "clip_target": torch.randn(3, arch["image_dim"])}
    terms = {
        "loss_embed_x5": given["embed"] * vq_loss,
        "loss_recon_s_x2": given["recon_s"] * (1 - F.cosine_similarity(taps["recon_s_out"], target, dim=-1)).mean(),
        "loss_distil_image_x05": given["distil_image"] * (embedding - io["clip_target"]).square().mean(),
    }
    io |= {name: term[None] for name, term in terms.items()} | {"loss": sum(terms.values())[None]}
    sum(terms.values()).backward()
    for name in ("encode_task_layer.0.weight", "quantize.embedding.weight", "blocks.1.mlp.fc1.weight", "pos_embed",
                 "blocks_image.0.attn.qkv.weight", "distill_image_proj.weight"):  # fmt: skip
        io[f"grad:{name}"] = weights[name].grad
    config = {"arch": arch, "weights": given, "use_qformer_image": reverse}
    passed, lines = replayed(save(tmp_path / "c", "train_stage2", config, weights, io))
    assert passed, lines


def test_keys_are_listed():
    arch = plain.arch()
    weights = plain.random_weights(plain.tokenizer_shapes(arch), 0)
    with pytest.raises(InvalidCheckpoint, match="unknown left_over"):
        from_official("seed", {"arch": arch}, weights | {"left_over": torch.ones(2)})
    del weights["blocks.0.attn.qkv.bias"]
    with pytest.raises(InvalidCheckpoint, match=r"missing blocks\.0\.attn\.qkv\.bias"):
        from_official("seed", {"arch": arch}, weights)
    with pytest.raises(InvalidCheckpoint, match="no weights of SEED"):
        from_official("seed", {}, {"a": torch.ones(1)})
    with pytest.raises(InvalidCheckpoint, match="heads"):
        from_official("seed", {"arch": arch | {"heads": "two"}}, weights)


def test_new_sequence_case(tmp_path):
    images = torch.randint(20, (3, 4), generator=torch.Generator().manual_seed(0))
    text = [5, 6, 7]
    spans = [[70, *(image + 40).tolist(), 71] for image in images]
    sequence = [1, *spans[0], *text[:2], *spans[1], *spans[2], text[2], 2]
    config = {"image_id_shift": 40, "codes": 20, "image_tokens": 4, "boi": 70, "eoi": 71, "bos": 1, "eos": 2}
    io = {"image_ids": images, "text_ids": torch.tensor(text), "sequence": torch.tensor(sequence)}
    passed, lines = replayed(save(tmp_path / "c", "sequence_layout", config, {"none": torch.ones(1)}, io))
    assert passed, lines


@torch.no_grad()
def test_new_language_model_case(tmp_path):
    """Of other sizes and with a batch; recorded with transformers itself."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = LlamaConfig(
        vocab_size=30, hidden_size=24, intermediate_size=20, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=2, rms_norm_eps=1e-5, max_position_embeddings=64, tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},
    )  # fmt: skip
    model = LlamaForCausalLM(sizes).eval()
    for parameter in model.parameters():
        parameter.normal_(std=0.3)
    ids = torch.randint(30, (3, 9))
    labels = ids.masked_fill(torch.rand(3, 9) < 0.3, -100)
    output = model(input_ids=ids, labels=labels)
    io = {"input_ids": ids, "labels": labels, "logits": output.logits, "loss": output.loss[None], "prompt": ids[:1]}
    steps, greedy = [], ids[:1]
    for _ in range(4):
        steps.append(model(input_ids=greedy).logits[:, -1])
        greedy = torch.cat([greedy, steps[-1].argmax(-1, keepdim=True)], 1)
    io |= {"greedy_ids": greedy[:, 9:], "step_logits": torch.cat(steps)}
    config = {
        "image_id_shift": 10, "codes": 12, "boi": 22, "eoi": 29, "image_tokens": 3, "heads": 2, "rms_norm_eps": 1e-5,
        "rope_base": 500, "max_position_embeddings": 64,
    }  # fmt: skip
    folder = save(tmp_path / "c", "multimodal_llm", config, model.state_dict(), io)
    passed, lines = replayed(folder)
    assert passed, lines
    (folder / "config.json").write_text((folder / "config.json").read_text().replace('"boi": 22', '"boi": 30'))
    with pytest.raises(InvalidInput, match="not the image vocabulary"):
        parity.run([folder], lambda line: None)
