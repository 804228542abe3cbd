"""Recipes: what is shipped is valid, and what is wrong is said in one line."""

from pathlib import Path

import pytest
import yaml
from mediatok.core.errors import InvalidRecipe
from mediatok.training.build import build_model
from mediatok.training.codec_recipe import is_codec_recipe, load_codec_recipe
from mediatok.training.flextok_recipe import is_flextok_recipe, load_flextok_recipe
from mediatok.training.generator_recipe import is_generator_recipe, load_generator_recipe
from mediatok.training.kmeans_recipe import is_kmeans_recipe, load_kmeans_recipe
from mediatok.training.recipe import ModelRecipe, check_recipe, load_recipe
from mediatok.training.seed_recipe import is_seed_recipe, load_seed_recipe
from mediatok.training.shape_recipe import is_shape_recipe, load_shape_recipe
from mediatok.training.speech_recipe import is_speech_recipe, load_speech_recipe
from mediatok.training.tokenflow_recipe import is_tokenflow_recipe, load_tokenflow_recipe
from mediatok.training.tokenizer import main

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_shipped_recipes_are_valid(path):
    kinds = {is_generator_recipe: load_generator_recipe, is_codec_recipe: load_codec_recipe}
    kinds |= {is_speech_recipe: load_speech_recipe, is_kmeans_recipe: load_kmeans_recipe}
    kinds |= {is_shape_recipe: load_shape_recipe, is_flextok_recipe: load_flextok_recipe}
    kinds |= {is_tokenflow_recipe: load_tokenflow_recipe, is_seed_recipe: load_seed_recipe}
    load = next((load for is_it, load in kinds.items() if is_it(path)), load_recipe)
    assert load(path).name == path.stem


def test_overrides(recipe_values, tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(recipe_values))
    recipe = load_recipe(
        path, ["optimizer.lr=3e-4", "run.steps=50", "data.in_memory=false", "model.config.token_size=6"][:]
    )
    assert recipe.optimizer.lr == 3e-4
    assert recipe.run.steps == 50
    assert recipe.data.in_memory is False
    assert recipe.model.config["token_size"] == 6


WRONG = {
    "optimizer.learning_rate=1": "unknown key optimizer.learning_rate",
    "optimizer.warmup_step=1": "Did you mean 'warmup_steps'",
    "losses.perceptual=none": "Did you mean 'loss'",
    "run.steps=many": "run.steps",
    "run.batch_size=0": "run.batch_size",
    "model.stage=3": "model.stage",
    "run.steps": "must look like section.key=value",
    "name.x=1": "name is not a section",
    "model.stage='1'": "vqgan",
    "optimizer.warmup_steps=20": "must be below run.steps",
    "run.seed=[": "run.seed",
}


@pytest.mark.parametrize("override", WRONG)
def test_wrong_overrides(recipe_values, tmp_path, override):
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(recipe_values))
    with pytest.raises(InvalidRecipe, match=WRONG[override]) as caught:
        load_recipe(path, [override])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text", ["", "- a list", "a: [", "!!python/object/apply:os.system ['touch hacked']", "name: x\n" * 3]
)
def test_files_that_are_no_recipe(tmp_path, text):
    path = tmp_path / "r.yaml"
    path.write_text(text)
    with pytest.raises(InvalidRecipe) as caught:
        load_recipe(path)
    assert "\n" not in str(caught.value)
    assert not Path("hacked").exists()


def test_missing_recipe_names_the_nearest():
    with pytest.raises(InvalidRecipe, match=r"titok-tiny\.yaml"):
        load_recipe("recipes/titok-tinny.yaml")


def test_command_exits_2_with_one_line(tmp_path, capsys):
    assert main([str(tmp_path / "none.yaml")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1


def test_missing_data_is_a_clear_error(recipe_values, tmp_path, capsys):
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(recipe_values))
    assert main([str(path), f"data.train={tmp_path / 'nowhere'}"]) == 2
    assert "nowhere" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"config": {"codebook_sise": 8}}, "codebook_size"),
        ({"config": {"image_size": 30}}, "image_size 30"),
        ({"like": "titok-s12"}, "titok-s128"),
        ({"like": "one-d-piece-s256"}, "not a known TiTok"),
        ({"config": {"quantizer": "fsq"}}, "quantizer"),
    ],
)
def test_models_that_cannot_be_built(values, message):
    with pytest.raises(InvalidRecipe, match=message):
        build_model(ModelRecipe(**values))


def test_recipe_survives_json(recipe_values):
    recipe = check_recipe(recipe_values)
    assert check_recipe(recipe.model_dump(mode="json")) == recipe
