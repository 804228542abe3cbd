"""FlexTok, TokenFlow, SEED and their generators in a browser: scales, decoders, previews and Stop, prompts."""

import re

import mediatok as mt
import pytest
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from PIL import Image


def use(user, model: str) -> None:
    user.tab("Image")
    user.choose("#image-model", f"{model} (local)")
    user.settle()


def code(user, kind: str, tab: str = "generate") -> str:
    return user.page.locator(f"#{tab}-{kind} .cm-content").inner_text()


def test_scales_have_a_slider(user):
    use(user, "tokenflow")
    page = user.page
    user.wait_for_number("Tokens", "^21$")
    assert page.locator("#image-kind").get_by_text("Scales", exact=True).is_visible()
    assert not page.locator("#image-decoder").is_visible()
    before = user.picture()
    user.fill("#image-count", 2, then="Tab")
    user.wait_for_number("Tokens", "^5$")
    user.wait_for_other(before)
    assert "2 of 3 scales" in page.locator("#image-numbers").inner_text()
    use(user, "flextok")
    user.wait_for_number("Tokens", "^8$")
    assert page.locator("#image-kind").get_by_text("Tokens", exact=True).is_visible()


def test_decoder_has_fields_and_stop_acts_within_a_step(user):
    use(user, "flextok")
    page = user.page
    page.locator("#image-decoder button").first.click()
    page.locator("#image-steps").wait_for()
    assert page.locator("#image-steps input").input_value() == "4"
    assert page.locator("#image-norm-guidance input").is_checked()
    before = user.picture()
    user.fill("#image-seed", 5)
    before = user.wait_for_other(before)
    user.settle()
    user.tab("Show code")
    assert "tokenizer.decode(tokens, seed=5)" in page.locator("#image-python").inner_text()
    assert "--seed 5" in page.locator("#image-command").inner_text()
    user.tab("Rate and distortion")
    numbers = page.locator("#image-numbers").inner_text()
    user.fill("#image-steps", 1000)
    page.wait_for_function("[...document.querySelectorAll('#image-slider img')].at(-1).src.includes('/making-')")
    page.keyboard.press("Escape")
    page.wait_for_function("!document.querySelector('#image-slider img[src*=\"/making-\"]')")
    assert page.locator("#image-numbers").inner_text() == numbers
    user.fill("#image-steps", 0)
    user.toasts.get_by_text("Steps=0 must be").first.wait_for()
    user.forget_toasts()
    use(user, "seed")
    assert page.locator("#image-steps input").input_value() == "20"
    assert not page.locator("#image-norm-guidance").is_visible()


def test_compare_at_equal_bytes(user):
    page = user.page
    user.tab("Compare")
    page.locator("#compare-kind").get_by_text("Equal bytes").click()
    user.choose("#compare-a", "random-piece (local)")
    user.choose("#compare-b", "random-titok (local)")
    user.fill("#compare-bytes", 500)
    page.wait_for_function(
        "(([a, b]) => a <= b && a > b - 3)([...document.querySelectorAll('#compare-table tbody tr:nth-child(2) td')]"
        ".map(cell => parseInt(cell.innerText)))"
    )
    user.fill("#compare-bytes", 60)
    page.locator("#compare-table").get_by_text("random-titok does not fit 60 bytes: shown whole").wait_for()
    user.tab("Image")


@pytest.mark.parametrize("model", ["writer", "storyteller"])
def test_a_prompt_becomes_pictures(user, model):
    page = user.page
    user.tab("Generate")
    user.choose("#generate-model", f"{model} (local)")
    prompt = page.locator("#generate-prompt textarea")
    prompt.wait_for()
    assert not page.locator("#generate-labels").is_visible()
    page.locator("#generate-fresh input").set_checked(False)
    user.fill("#generate-seed", 60 if model == "writer" else 70, then="Tab")
    user.fill("#generate-count", 2, then="Tab")
    prompt.fill("sad <b>robot</b>")
    prompt.press("Enter")
    page.get_by_text(f"seed {60 if model == 'writer' else 70} ·").first.wait_for()
    assert len(user.made(2)) == 2
    assert "sad <b>robot</b>" in page.locator("#generate-panel").inner_text()
    space = {}
    exec(re.sub(r"\xa0", " ", code(user, "python")).split("for image")[0], space)
    assert len(space["made"].images) == 2
    assert page.locator("#generate-redo").count() == (model == "writer")
    prompt.fill("a" * 3000)
    page.locator("#generate-run").click()
    user.toasts.get_by_text("3000 characters").first.wait_for()
    user.forget_toasts()


def test_coarse_scales_stay(user):
    page = user.page
    user.tab("Generate")
    user.choose("#generate-model", "writer (local)")
    page.locator("#generate-prompt textarea").fill("red apple")
    user.fill("#generate-count", 1, then="Tab")
    user.fill("#generate-seed", 80)
    page.get_by_text("seed 80 ·").first.wait_for()
    user.made(1)
    page.locator("#generate-panel .mt-unit").nth(1).click()
    assert "2 of 3 scales kept" in page.locator("#generate-panel output").inner_text()
    page.locator("#generate-panel .mt-unit").nth(0).click()
    assert "0 of 3 scales kept" in page.locator("#generate-panel output").inner_text()
    page.locator("#generate-panel .mt-unit").nth(0).click()
    user.fill("#generate-seed", 90, then="Tab")
    page.locator("#generate-redo").click()
    page.get_by_text("seed 90 ·").first.wait_for()
    assert "--keep 0" in code(user, "command")
    user.choose("#generate-model", "classes (local)")
    page.locator("#generate-labels").wait_for()


def test_the_decoder_of_generated_pictures(user):
    page = user.page
    user.tab("Generate")
    user.choose("#generate-model", "writer (local)")
    page.locator("#generate-decoder").wait_for(state="hidden")
    user.choose("#generate-model", "classes (local)")
    page.locator("#generate-decoder").wait_for()
    page.locator("#generate-decoder button").first.click()
    page.locator("#generate-decoder-steps").wait_for()
    assert page.locator("#generate-decoder-steps input").input_value() == "4"
    page.locator("#generate-fresh input").set_checked(False)
    user.fill("#generate-count", 1, then="Tab")
    user.fill("#generate-seed", 95)
    page.get_by_text("seed 95 ·").first.wait_for()
    (plain,) = user.made(1)
    assert "decoding" not in code(user, "python")
    user.fill("#generate-decoder-steps", 2, then="Tab")
    user.fill("#generate-decoder-seed", 6)
    page.wait_for_function(
        "before => document.querySelector('#generate-grid .mt-made img')?.getAttribute('src') !== before", arg=plain
    )
    user.made(1)
    assert "decoding={'steps': 2, 'seed': 6}" in code(user, "python")
    assert "--decoding steps=2 --decoding seed=6" in code(user, "command")
    page.locator("#generate-panel .mt-unit").nth(0).click()
    user.fill("#generate-seed", 97, then="Tab")
    page.locator("#generate-redo").click()
    page.get_by_text("seed 97 ·").first.wait_for()
    assert code(user, "command").count("--decoding steps=2") == 2
    user.fill("#generate-decoder-steps", 0)
    user.toasts.get_by_text("Decoder: steps=0 must be").first.wait_for()
    user.forget_toasts()


def test_endpoints(studio_url, models_dir, tmp_path):
    client = Client(studio_url, verbose=False, download_files=str(tmp_path))
    photo = tmp_path / "photo.png"
    Image.linear_gradient("L").resize((40, 30)).convert("RGB").save(photo)
    flextok, seed = str(models_dir / "flextok"), str(models_dir / "seed")
    path, facts = client.predict(handle_file(photo), flextok, 5, api_name="/encode_image")
    assert facts["num_tokens"] == 5
    options = {"steps": 2, "seed": 9}
    image, _ = client.predict(handle_file(path), flextok, options, api_name="/decode_tokens")
    own = mt.load(flextok).decode(mt.Tokens.load(path), **options)
    assert Image.open(image).convert("RGB").tobytes() == own.tobytes()
    pair = client.predict(handle_file(photo), flextok, seed, None, 500, api_name="/compare")
    assert [one["num_tokens"] for one in pair] == [1, 4]  # the other one's file is smaller than any of FlexTok's
    _, facts = client.predict(str(models_dir / "writer"), ["red apple", None], 3, None, None, api_name="/generate")
    assert facts["labels"] == ["red apple", "no prompt"]
    for arguments, name, message in (
        ((handle_file(path), flextok, {"step": 2}), "/decode_tokens", "steps"),
        ((handle_file(path), flextok, {"steps": "many"}), "/decode_tokens", "must be a whole number"),
        ((str(models_dir / "storyteller"), [None], 3, None, None), "/generate", "needs a prompt"),
    ):
        with pytest.raises(AppError, match=message):
            client.predict(*arguments, api_name=name)
