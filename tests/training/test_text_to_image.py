"""Generators that read text train through one loop: names as prompts, exact resume, another start, clear refusals."""

import copy
import json
from pathlib import Path

import mediatok as mt
import pytest
import torch
from mediatok.core.errors import InvalidRecipe, ModelNotFound
from mediatok.tokenizers.image.titok import TiTok
from mediatok.tokenizers.image.tokenflow import TokenFlow
from mediatok.training.checkpoint import load_checkpoint, whole_checkpoints
from mediatok.training.generator import generator_trainer
from mediatok.training.generator_recipe import GeneratorRecipe
from mediatok.training.recipe import check_recipe

SIZES = {
    "NextToken": {"width": 16, "depth": 1, "num_heads": 2, "hidden": 16},
    "NextScaleLlama": {
        "width": 16, "depth": 1, "num_heads": 2, "num_kv_heads": 2, "hidden": 24, "prompt_length": 6,
        "negative_prompt": "",
    },
}  # fmt: skip


class Interrupted(Exception):
    pass


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folders of a tokenizer for each generator, and of a T5 that knows a few words."""
    from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    TiTok(
        image_size=16, encoder_patch_size=8, decoder_patch_size=8, num_latent_tokens=4, token_size=4, codebook_size=32,
        is_legacy=False, has_pixel_decoder=False, encoder_width=32, encoder_depth=1, encoder_heads=2, decoder_width=32,
        decoder_depth=1, decoder_heads=2,
    ).save_pretrained(folder / "NextToken")  # fmt: skip
    TokenFlow(
        image_size=16, sides=(1, 2), codebook_size=40, semantic_code_width=6, pixel_code_width=3, tower_width=24,
        tower_depth=1, tower_heads=2, tower_hidden=32, tower_patch=8, tower_grid=2, semantic_width=24,
        semantic_depth=1, semantic_heads=2, semantic_grid=2, teacher_width=5, channels=32, multipliers=(1, 1, 1, 1),
        res_blocks=1, z_channels=8, decoder_channels=32, decoder_res_blocks=1,
    ).save_pretrained(folder / "NextScaleLlama")  # fmt: skip
    known = {word: number for number, word in enumerate(("<pad>", "</s>", "<unk>", "a", "red", "blue", "one"))}
    words = Tokenizer(models.WordLevel(known, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    wrapped.save_pretrained(folder / "t5")
    sizes = T5Config(vocab_size=len(known), d_model=12, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    T5EncoderModel(sizes).save_pretrained(folder / "t5")
    return folder


@pytest.fixture
def make_values(pictures, folders, tmp_path):
    names = {
        path.stem: {"name": f"a {['red', 'blue'][i % 2]} one"} for i, path in enumerate(sorted(pictures.iterdir()))
    }
    (tmp_path / "labels.json").write_text(json.dumps(names))

    def values(class_name, **model):
        encoder = {"text_encoder": str(folders / "t5")} if class_name == "NextToken" else {}
        return {
            "name": "tiny", "output": str(tmp_path / "run"), "tokenizer": str(folders / class_name),
            "model": {"class_name": class_name, "config": SIZES.get(class_name, {})} | encoder | model,
            "data": {"train": str(pictures), "labels": str(tmp_path / "labels.json"), "label_fields": ["name"]},
            "optimizer": {"lr": 1e-3, "warmup_steps": 2},
            "run": {
                "steps": 4, "batch_size": 4, "log_every": 1, "validate_every": 2, "sample_every": 4, "num_samples": 2,
                "checkpoint_every": 2,
            },
        }  # fmt: skip

    return values


def trainer_of(values):
    return generator_trainer(check_recipe(copy.deepcopy(values), GeneratorRecipe))


def last_checkpoint(output):
    return load_checkpoint(whole_checkpoints(Path(output) / "checkpoints")[-1])


@pytest.mark.parametrize("class_name", SIZES)
def test_two_and_two_steps_equal_four(make_values, tmp_path, class_name):
    values = make_values(class_name)
    trainer_of(values | {"output": str(tmp_path / "whole")}).run()
    stopped = trainer_of(values)
    save = stopped.save

    def save_and_stop():
        save()
        raise Interrupted

    stopped.save = save_and_stop
    with pytest.raises(Interrupted):
        stopped.run()
    trainer_of(values).run()
    (tensors, _), (again, _) = last_checkpoint(tmp_path / "whole"), last_checkpoint(tmp_path / "run")
    assert tensors.keys() == again.keys()
    for file, content in tensors.items():
        for name, value in content.items():
            assert torch.equal(value, again[file][name]), f"{file}: {name}"


@pytest.mark.parametrize("class_name", SIZES)
def test_what_was_trained_reads_prompts(make_values, tmp_path, class_name):
    trainer = trainer_of(make_values(class_name))
    trainer.run()
    assert list((tmp_path / "run" / "samples").iterdir())
    model = mt.load(tmp_path / "run" / "model")
    assert model.accepts_text
    made = model.sample(["a red one", "a blue one", None], seed=[1, 1, 1])
    assert made.labels == ["a red one", "a blue one", ""]
    assert made.images[0].size == (16, 16)
    # Each picture is trained with its own name.
    condition = trainer.condition(torch.tensor([0, 1, 2]))
    assert condition.tolist() == [*trainer.folder.labels.names, ""]
    # A new run may begin with it.
    second = make_values(class_name, init_from=str(tmp_path / "run" / "model"), config={})
    started = trainer_of(second | {"output": str(tmp_path / "second")}).raw_model
    for name, value in model.state_dict().items():
        assert torch.equal(value, started.state_dict()[name]), name


def test_only_next_token_takes_a_text_encoder_and_it_must_be_there(make_values, folders):
    with pytest.raises(InvalidRecipe, match="text_encoder is for NextToken; MaskGIT has none"):
        trainer_of(make_values("MaskGIT", text_encoder=str(folders / "t5")))
    for wrong in ("somebody/t5", str(folders / "nowhere")):
        with pytest.raises(ModelNotFound, match="neither a folder nor a Flan-T5"):
            trainer_of(make_values("NextToken", text_encoder=wrong))
    with pytest.raises(ModelNotFound, match="could not be loaded"):
        trainer_of(make_values("NextToken", text_encoder=str(folders)))
    with pytest.raises(InvalidRecipe, match=r"model\.config\.text_width is 13, but the data say 12"):
        trainer_of(make_values("NextToken", config=SIZES["NextToken"] | {"text_width": 13}))
