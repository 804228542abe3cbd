"""What the studio does with FlexTok, TokenFlow, SEED and their generators: scales, decoders, prompts, equal bytes."""

import dataclasses
import shlex
from types import SimpleNamespace

import gradio as gr
import mediatok as mt
import numpy as np
import pytest
from mediatok.app import cli, studio_views
from mediatok.app.studio_actions import (
    Budget,
    change_token,
    encode_picture,
    equal_bytes,
    measure_curves,
    token_effect,
    with_edits,
)
from mediatok.app.studio_code import command_code, generation_command, generation_python, python_code
from mediatok.app.studio_context import Studio
from mediatok.app.studio_decoding import DECODING, decoding_controls, decoding_updates
from mediatok.app.studio_gallery import chosen_panel
from mediatok.app.studio_generate import NUM_ADAPTED, NUM_OUTPUTS, GenerateEvents
from mediatok.app.studio_generation import first_gallery, make_pictures, own_settings
from mediatok.app.studio_image_controls import budget_kinds, count_slider
from mediatok.app.studio_models import GENERATOR, Catalogue
from mediatok.app.studio_session import Session
from mediatok.app.studio_worker import Device, Job
from PIL import Image

TOKENIZERS = ("flextok", "tokenflow", "seed")
GENERATORS = ("classes", "writer", "storyteller")


@pytest.fixture(scope="module")
def catalogue(picture_models):
    return Catalogue(picture_models, device="cpu")


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    path = tmp_path_factory.mktemp("photo") / "photo.png"
    Image.linear_gradient("L").resize((48, 32)).convert("RGB").save(path)
    return path


def encoded(catalogue, name, picture, budget=None, **options):
    source = catalogue.source_of(name)
    budget = budget or Budget("quality", 0.1)
    tokenizer = catalogue.get(source)
    return encode_picture(tokenizer, source, picture, picture.name, budget, Job(), **options)


def run_commands(text: str) -> None:
    for line in text.splitlines():
        with pytest.raises(SystemExit) as ended:
            cli.main(shlex.split(line)[1:])
        assert not ended.value.code, line


def test_controls_are_what_the_tokenizer_has(catalogue):
    flextok, tokenflow, seed = (catalogue.get(catalogue.source_of(name)) for name in TOKENIZERS)
    assert [budget_kinds(one)[0][0] for one in (flextok, tokenflow, seed)] == ["Tokens", "Scales", "Tokens"]
    assert [count_slider(one)["maximum"] for one in (flextok, tokenflow, seed)] == [8, 3, 4]
    assert [count_slider(one)["interactive"] for one in (flextok, tokenflow, seed)] == [True, True, False]
    with gr.Blocks():
        made = [decoding_controls(one, "image-decoder", "image") for one in (flextok, tokenflow, seed)]
    assert [group.visible for group, _ in made] == [True, False, True]
    assert [[field.visible for field in fields] for _, fields in made] == [
        [True] * 4, [False] * 4, [True, True, True, False],
    ]  # fmt: skip
    assert [field.elem_id for field in made[0][1]] == [
        "image-steps", "image-guidance", "image-seed", "image-norm-guidance",
    ]  # fmt: skip
    assert [update.value for update in decoding_updates(flextok)[1:]] == [4, 2.0, 0, True]


def test_scales_of_a_budget(catalogue, picture):
    result = encoded(catalogue, "tokenflow", picture, Budget("scales", 2))
    assert (result.tokens_per_tile, result.num_scales) == (5, 2)
    assert "2 of 3 scales" in studio_views.numbers(result)
    assert "num_tokens=5" in python_code(result)
    with pytest.raises(mt.InvalidInput, match="number of scales=4"):
        encoded(catalogue, "tokenflow", picture, Budget("scales", 4))
    with pytest.raises(mt.InvalidInput, match="no scales"):
        encoded(catalogue, "flextok", picture, Budget("scales", 2))


def test_decoder_options_reach_picture_edits_curves_and_code(catalogue, picture, tmp_path, monkeypatch):
    own = {"steps": 4, "guidance": 2.0, "seed": 0, "norm_guidance": True}
    plain = encoded(catalogue, "flextok", picture, Budget("tokens", 3), decoding=own)
    assert plain.decoding == {}
    chosen = own | {"steps": 2, "seed": 7, "norm_guidance": False, "guidance": None}
    result = encoded(catalogue, "flextok", picture, Budget("tokens", 3), decoding=chosen)
    assert result.decoding == {"steps": 2, "seed": 7, "norm_guidance": False}
    assert result.image.tobytes() != plain.image.tobytes()
    tokenizer = catalogue.get(result.source)
    edited = change_token(tokenizer, result, 0, (result.ids()[0] + 1) % 60, Job())
    assert with_edits(tokenizer, edited, {}, Job()).image.tobytes() == result.image.tobytes()
    assert token_effect(tokenizer, result, 0, Job()).size == result.image.size
    curves = measure_curves(
        tokenizer, result.reference, Job(), tile=False, hold=Device().hold, decoding=result.decoding
    )
    point = next(point for point in curves["flextok"] if point.num_tokens == 8)
    whole = encoded(catalogue, "flextok", picture, Budget("tokens", 8), decoding=chosen)
    assert (point.bytes, point.psnr) == (whole.tokens.num_bytes, pytest.approx(whole.psnr))
    monkeypatch.chdir(picture.parent)
    run_commands(command_code(result))
    assert mt.read_image("photo-decoded.png").tobytes() == result.image.tobytes()
    exec(compile(python_code(result), "shown", "exec"), {})
    assert mt.read_image("photo-decoded.png").tobytes() == result.image.tobytes()
    with pytest.raises(mt.InvalidInput, match="steps=0"):
        encoded(catalogue, "flextok", picture, decoding=own | {"steps": 0})


def test_a_flow_is_watched_and_stopped_at_its_next_step(catalogue, picture):
    seen = []
    encoded(catalogue, "flextok", picture, emit=seen.append, decoding={"steps": 5})
    assert [image.size for image in seen] == [(16, 16)] * 4  # what the last step comes to is the result
    job, steps = Job(), []
    tokenizer = catalogue.get(catalogue.source_of("flextok"))

    def stop_soon(image):
        steps.append(image)
        if len(steps) == 2:
            job.stop()

    with pytest.raises(mt.Cancelled):
        encode_picture(
            tokenizer, "flextok", picture, "photo.png", Budget("tokens", 8), job, emit=stop_soon, decoding={"steps": 50}
        )
    assert len(steps) == 2


def test_equal_bytes_cut_to_what_the_smaller_takes(catalogue, picture):
    tokenizers = [catalogue.get(catalogue.source_of(name)) for name in TOKENIZERS]
    flextok, tokenflow, seed = tokenizers

    def sizes(pair, budgets):
        return [
            encode_picture(one, one.name, picture, "p", budget, Job()).tokens.num_bytes
            for one, budget in zip(pair, budgets, strict=True)
        ]

    for pair in ((flextok, tokenflow), (tokenflow, flextok), (flextok, seed), (seed, tokenflow)):
        smaller = min(sizes(pair, [Budget("tokens", 999)] * 2))
        least = [min(sizes([one], [Budget("tokens", 1)])) for one in pair]
        for size, own in zip(sizes(pair, equal_bytes(list(pair), picture, 1000)), least, strict=True):
            assert size <= max(smaller, own)
    assert [budget.amount for budget in equal_bytes([tokenflow, tokenflow], picture, 1000)] == [21, 21]
    # What cannot be as small is shown whole, and the other has the bytes that were asked for.
    limit = flextok.file_bytes(2, flextok.encode(picture).frames[0])
    short, whole = equal_bytes([flextok, seed], picture, limit - 1)
    assert (short.amount, whole.amount) == (1, 4)
    continuous = catalogue.get(catalogue.source_of("latents"))
    assert equal_bytes([continuous, flextok], picture, 1000)[1].amount == 8
    for size in (0, None, -3, 2**40):
        with pytest.raises(mt.InvalidInput, match="above zero"):
            equal_bytes([flextok, seed], picture, size)


@pytest.mark.parametrize("name", GENERATORS)
def test_shown_code_makes_the_same_pictures(catalogue, name, tmp_path, monkeypatch):
    source = str(catalogue.models_dir / name)
    generator = catalogue.get(source, GENERATOR)
    wanted = ["apple"] * 2 if name == "classes" else ["sad robot"] * 2
    seen = []
    gallery = make_pictures(generator, source, wanted, 5, *own_settings(generator), Job(), seen.append)
    assert [gallery.label(made) for made in gallery.pictures] == wanted
    assert any(progress.previews is not None for progress in seen) == (name != "storyteller")
    monkeypatch.chdir(tmp_path)
    exec(compile(generation_python(gallery), "shown", "exec"), {})
    run_commands(generation_command(gallery))
    for made in gallery.pictures:
        seed = made.recipe.seed
        for path in (f"{seed}.png", f"generated/{wanted[0].replace(' ', '-')}-{seed}.png"):
            by_code = np.asarray(mt.read_image(path), dtype=int)
            assert np.abs(by_code - np.asarray(made.image, dtype=int)).max() <= 2


def test_the_decoder_of_a_generator_is_its_tokenizers(catalogue):
    flextok = catalogue.get(catalogue.source_of("flextok"))
    classes, writer, teller = (catalogue.get(str(catalogue.models_dir / name), GENERATOR) for name in GENERATORS)
    values = [update.value for update in decoding_updates(flextok)[1:]]
    with gr.Blocks():
        made = [decoding_controls(one, "generate-decoder", "generate-decoder") for one in (classes, writer, teller)]
    # What draws by a decoder with settings of its own has no others.
    assert [group.visible for group, _ in made] == [True, False, False]
    assert [field.value for field in made[0][1]] == values == [4, 2.0, 0, True]
    assert made[0][1][0].elem_id == "generate-decoder-steps"


def test_decoder_options_reach_gallery_and_its_code(catalogue, tmp_path, monkeypatch):
    source = str(catalogue.models_dir / "classes")
    generator = catalogue.get(source, GENERATOR)
    own = generator.decoding_defaults()
    run = generator, source, ["apple"], 5, 3, 1.5, Job(), None
    plain = make_pictures(*run, decoding=own)
    assert plain.pictures[0].recipe.decoding == {}
    assert "decoding" not in generation_python(plain) + generation_command(plain)
    chosen = {"steps": 2, "guidance": None, "seed": 7, "norm_guidance": False}
    gallery = make_pictures(*run, decoding=own | chosen)
    (made,) = gallery.pictures
    assert made.recipe.decoding == {"steps": 2, "seed": 7, "norm_guidance": False}
    assert made.content.tolist() == plain.pictures[0].content.tolist()
    assert made.image.tobytes() != plain.pictures[0].image.tobytes()
    varied = make_pictures(generator, source, ["apple"], 6, 3, 1.5, Job(), None, made, (0,), {"steps": 1})
    start, made_again = generation_python(varied).splitlines()[3:5]
    assert start.endswith("guidance=1.5, decoding={'steps': 2, 'norm_guidance': False, 'seed': 7})")
    assert "guidance=1.5, decoding={'steps': 1}, start=start, keep=[0]" in made_again
    first, second = generation_command(varied).splitlines()
    assert "--decoding steps=2 --decoding norm_guidance=false --decoding seed=7 --out start-1.png" in first
    assert "--decoding steps=1 --edit start-1.mtok --keep 0" in second
    monkeypatch.chdir(tmp_path)
    for shown in (gallery, varied):
        exec(compile(generation_python(shown), "shown", "exec"), {})
        run_commands(generation_command(shown))
        (picture,) = shown.pictures
        for path in (f"{picture.recipe.seed}.png", f"generated/apple-{picture.recipe.seed}.png"):
            by_code = np.asarray(mt.read_image(path), dtype=int)
            assert np.abs(by_code - np.asarray(picture.image, dtype=int)).max() <= 2
    with pytest.raises(mt.InvalidInput, match="steps=0"):
        make_pictures(*run, decoding=own | {"steps": 0})


def test_decoder_fields_are_heard(catalogue, tmp_path, recwarn):
    """A run, a variant of its picture, a mistake, and another generator, whose fields say nothing of this picture."""
    source, other = (str(catalogue.models_dir / name) for name in ("classes", "writer"))
    events, session = GenerateEvents(Studio(catalogue, tmp_path)), Session(tmp_path, tmp_path / "none.png")
    asked = {"labels": ["apple"], "prompt": ""}
    numbers = {"count": 1, "seed": 3, "fresh": False, "steps": 3, "guidance": 1.5}

    def run(outputs):
        shown = list(outputs)
        assert all(len(one) == NUM_OUTPUTS for one in shown)
        return shown[-1]

    def recipe():
        return session.gallery.pictures[0].recipe

    shown = run(events.make(session, source, *asked.values(), *numbers.values(), 2, 2.0, 0, True))
    assert recipe().decoding == {"steps": 2}
    assert "decoding={'steps': 2}" in shown[6]
    assert "--decoding steps=2" in shown[7]
    with Image.open(shown[4]) as file:
        assert "--decoding steps=2" in file.text["command"]
    click = SimpleNamespace(keep=[0])
    shown = run(events.vary(session, click, source, *numbers.values(), 2, 2.0, 9, True))
    assert (recipe().decoding, recipe().start.decoding) == ({"steps": 2, "seed": 9}, {"steps": 2})
    assert shown[6].count("decoding={'steps': 2") == 2
    session.chosen = 1
    run(events.vary(session, click, other, *numbers.values(), None, None, None, None))
    assert recipe().decoding == recipe().start.decoding == {"steps": 2, "seed": 9}
    before = session.gallery
    assert len(list(events.make(session, source, *asked.values(), *numbers.values(), 0, 2.0, 0, True))) == 1
    assert session.gallery is before
    (message,) = [str(warning.message) for warning in recwarn if "steps=0" in str(warning.message)]
    assert message.startswith("Decoder: ")

    adapted = events.adapt(session, other, ["apple"], source)
    assert len(adapted) == NUM_ADAPTED
    assert [adapted[6].visible, *(field.visible for field in adapted[7:-1])] == [False] * (1 + len(DECODING))
    assert events.adapt(session, source, [], other)[6].visible


def test_pieces_that_stay(catalogue):
    writer, classes, teller = (catalogue.get(str(catalogue.models_dir / name), GENERATOR) for name in
                               ("writer", "classes", "storyteller"))  # fmt: skip
    source = str(catalogue.models_dir / "writer")
    first = make_pictures(writer, source, ["red apple"], 1, 1, 3.0, Job())
    panel = chosen_panel(first, 0)
    assert panel.count('class="mt-unit"') == 3
    assert "0 of 3 scales kept" in panel
    again = make_pictures(writer, source, ["red apple"], 2, 1, 3.0, Job(), None, first.pictures[0], (0, 1))
    assert again.pictures[0].content[0, :5].tolist() == first.pictures[0].content[0, :5].tolist()
    with pytest.raises(mt.InvalidInput, match="first scales"):
        make_pictures(writer, source, ["red apple"], 2, 1, 3.0, Job(), None, first.pictures[0], (1,))
    short = make_pictures(classes, "classes", ["apple"], 1, 3, 1.5, Job())
    assert short.units_of(short.pictures[0]) == 3
    assert "0 of 3 tokens kept" in chosen_panel(short, 0)
    told = make_pictures(teller, "storyteller", ["a cat"], 1, 2, 1.5, Job())
    assert "redo" not in chosen_panel(told, 0)


def test_prompts_are_shown_as_text(catalogue):
    gallery = make_pictures(
        catalogue.get(str(catalogue.models_dir / "writer"), GENERATOR), "writer", ["<script>alert(1)</script>"], 1, 1,
        3.0, Job(),
    )  # fmt: skip
    assert "<script>" not in chosen_panel(gallery, 0)
    nothing = make_pictures(
        catalogue.get(str(catalogue.models_dir / "writer"), GENERATOR), "writer", [None], 1, 1, 3.0, Job()
    )
    assert nothing.label(nothing.pictures[0]) == "no prompt"
    assert "--prompt" not in generation_command(nothing)


def test_first_page_with_a_text_generator_alone(picture_models, catalogue, monkeypatch):
    alone = Catalogue(picture_models, device="cpu")
    rows = [row for row in alone.rows() if row.label.startswith("writer")]
    monkeypatch.setattr(alone, "rows", lambda: [dataclasses.replace(row) for row in rows])
    gallery = first_gallery(alone)
    assert {gallery.label(made) for made in gallery.pictures} == {"red apple"}
