"""The studio in a browser: the main path of each tab, with real files and what a person sees."""

import io
import re
from contextlib import suppress

import numpy as np
import pytest
from mediatok import Tokens
from PIL import Image
from playwright.sync_api import TimeoutError

TABS = ("Image", "Compare", "Generate", "Models", "Help")


def photo(size=(90, 60), seed=0) -> bytes:
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 255, (6, 9, 3), dtype=np.uint8))
    buffer = io.BytesIO()
    small.resize(size, Image.Resampling.BICUBIC).save(buffer, "PNG")
    return buffer.getvalue()


def test_first_screen_needs_no_choice(user):
    page = user.page
    assert user.number("PSNR").endswith("dB")
    assert re.fullmatch(r"\d+ B", user.number("Bytes"))
    assert page.locator("#image-grid button.mt-token").count() == int(user.number("Tokens"))
    assert page.locator("#image-plot svg.wide .mark").is_visible()
    assert page.locator("#image-plot svg.wide .line").count() >= 2
    assert page.locator("#image-effect img").is_visible()
    text = page.locator("body").inner_text()
    assert "undefined" not in text
    assert "NaN" not in text
    # Nothing scrolls on a laptop's screen, and nothing is cut off.
    assert page.evaluate("document.documentElement.scrollHeight") <= 900
    assert page.evaluate("document.documentElement.scrollWidth") <= 1440


def test_token_slider_changes_picture_and_numbers(user):
    page = user.page
    user.use_flexible_model()
    user.fill("#image-count", 64, then="Tab")
    user.wait_for_number("Tokens", "^64$")
    before, size = user.picture(), user.number("Bytes")
    user.fill("#image-count", 8, then="Tab")
    user.wait_for_number("Tokens", "^8$")
    user.wait_for_other(before)
    assert int(user.number("Bytes").split()[0]) < int(size.split()[0])
    assert page.locator("#image-grid button.mt-token").count() == 8
    assert page.locator("#image-grid .dropped").count() == 56
    user.tab("Show code")
    assert "num_tokens=8" in page.locator("#image-python").inner_text()
    assert "--num-tokens 8" in page.locator("#image-command").inner_text()
    user.tab("Rate and distortion")


def test_byte_budget_and_quality(user):
    page = user.page
    user.use_flexible_model()
    page.locator("#image-kind").get_by_text("Bytes", exact=True).click()
    user.fill("#image-bytes", 60)
    user.wait_for_number("Bytes", r"^(5\d|60) B$")
    refusal = user.toasts.get_by_text("too small").first
    for _ in range(8):  # what is typed while an earlier result arrives is put back, and that value is asked for
        user.settle()
        before = user.number("Bytes")
        user.fill("#image-bytes", 5)
        with suppress(TimeoutError):
            refusal.wait_for(timeout=7000)
            break
    assert refusal.is_visible()
    assert user.number("Bytes") == before  # the page stayed as it was
    page.locator("#image-kind").get_by_text("Quality", exact=True).click()
    user.wait_for_number("Tokens", "^64$")  # random weights never reach the quality, so all tokens are used
    page.locator("#image-kind").get_by_text("Tokens", exact=True).click()


def test_fixed_length_model_fixes_the_slider(user):
    user.use_flexible_model()
    user.choose("#image-model", "random-titok (local)")
    user.wait_for_number("Tokens", "^32$")
    user.page.locator("#image-count").get_by_text("random-titok always uses all of them").wait_for()
    assert user.page.locator("#image-count input[type=number]").is_disabled()


def test_upload_download_and_back(user, other_user, tmp_path):
    page, before = user.page, user.picture()
    user.upload(photo())
    user.wait_for_other(before)
    with page.expect_download() as download:
        page.locator("#image-mtok").click()
    assert download.value.suggested_filename == "photo.mtok"
    download.value.save_as(tmp_path / "photo.mtok")
    tokens = Tokens.load(tmp_path / "photo.mtok")
    assert f"{(tmp_path / 'photo.mtok').stat().st_size} B" == user.number("Bytes")
    with page.expect_download() as download:
        page.locator("#image-png").click()
    download.value.save_as(tmp_path / "photo.png")
    with Image.open(tmp_path / "photo.png") as image:
        assert image.size == (64, 64)

    # The .mtok goes in on another user's page: the same tokens, without an original.
    other_user.page.locator('input[type=file][accept=".mtok"]').set_input_files(tmp_path / "photo.mtok")
    other_user.wait_for_number("PSNR", "^–$")
    cells = other_user.page.locator("#image-grid button.mt-token").all_inner_texts()
    assert [int(cell) for cell in cells] == tokens.ids[0].tolist()
    assert "original" in other_user.page.locator("#image-plot svg.wide").text_content()
    other_user.sample(0)
    other_user.wait_for_number("PSNR", "dB$")


def test_tiles_keep_size_and_shape(user):
    user.use_flexible_model()
    before = user.picture()
    user.upload(photo((150, 100), seed=1), "wide.png")
    user.wait_for_other(before)
    user.page.locator("#image-tile input").check()
    user.page.locator("#image-numbers").get_by_text("150 × 100 px").wait_for()
    assert "tiles" in user.page.locator("#image-numbers").inner_text()
    user.page.locator("#image-tile input").uncheck()
    user.page.locator("#image-numbers").get_by_text("64 × 64 px").wait_for()


def test_click_a_token_and_change_it(user):
    page = user.page
    user.use_flexible_model()
    user.fill("#image-count", 64, then="Tab")
    user.wait_for_number("Tokens", "^64$")
    page.get_by_text("Where token 1 acts").wait_for()
    picture, psnr = user.picture(), user.number("PSNR")
    cell = page.locator("#image-grid button.mt-token").nth(3)
    code = int(cell.inner_text())
    cell.click()
    page.get_by_text("Where token 4 acts").wait_for()
    page.get_by_text("Code of token 4").wait_for()
    assert int(page.locator("#image-code input").input_value()) == code
    other = (code + 300) % 1024
    page.locator("#image-code input").fill(str(other))
    page.locator("#image-change").click()
    edited = user.wait_for_other(picture)
    assert page.locator("#image-grid .edited").all_inner_texts() == [str(other)]
    user.tab("Show code")
    assert f"tokens.ids[0, 3] = {other}" in page.locator("#image-python").inner_text()
    user.tab("Rate and distortion")
    page.locator("#image-undo").click()
    user.wait_for_other(edited)
    user.wait_for_number("PSNR", f"^{re.escape(psnr)}$")
    page.locator("#image-code input").fill("99999")
    page.locator("#image-change").click()
    user.toasts.get_by_text("out of range").first.wait_for()
    assert user.number("PSNR") == psnr


def test_compare_two_models(user):
    page = user.page
    user.tab("Image")
    page.locator("#image-to-compare").click()
    page.locator("#compare-view-2 img").wait_for()
    user.choose("#compare-a", "random-piece (local)")
    user.choose("#compare-b", "random-titok (local)")
    page.locator("#compare-kind").get_by_text("Equal tokens").click()
    page.locator("#compare-count").wait_for()
    user.fill("#compare-count", 16, then="Tab")
    table = page.locator("#compare-table")
    table.get_by_text("random-titok always uses 32 tokens").wait_for()
    page.wait_for_function("document.querySelector('#compare-table tbody td').innerText.startsWith('16')")
    assert table.locator("tr", has_text="Bytes").locator("td").first.locator("strong").count() == 1
    assert table.locator("tr", has_text="PSNR").locator("strong").count() == 1
    assert len({page.locator(f"#compare-view-{i} img").get_attribute("src") for i in range(3)}) == 3
    page.locator("#compare-kind").get_by_text("Equal bytes").click()
    user.fill("#compare-bytes", 100)
    page.wait_for_function(
        "[...document.querySelectorAll('#compare-table tbody tr:nth-child(2) td')]"
        ".every(td => parseInt(td.innerText) <= 100 && parseInt(td.innerText) > 70)"
    )
    user.tab("Image")


def test_models_load_and_unload(user):
    page = user.page
    user.tab("Models")
    table = page.locator("#models-table")
    row = table.locator("tr", has_text="random-titok (local)")
    row.wait_for()
    assert "needs download" in table.inner_text()
    assert "Apache-2.0" in table.inner_text()
    user.choose("#models-name", "random-titok (local)")
    page.locator("#models-load").click()
    row.get_by_text("iB", exact=False).wait_for()
    page.locator("#models-unload").click()
    row.get_by_text("iB", exact=False).wait_for(state="detached")
    user.fill("#models-name", "no-such-model")
    page.locator("#models-load").click()
    user.toasts.get_by_text("neither a known model").first.wait_for()
    user.tab("Image")


@pytest.mark.parametrize(("width", "height"), [(1440, 900), (390, 844)])
def test_light_and_dark_at_both_sizes(user, width, height, tmp_path):
    page = user.page
    page.set_viewport_size({"width": width, "height": height})
    for scheme in ("dark", "light"):
        page.locator("#mt-theme").click()
        for tab in TABS:
            place = page.get_by_role("tab", name=tab, exact=True).bounding_box()
            assert place, f"{tab} is hidden"
            assert 0 <= place["x"] <= width - place["width"], f"{tab} is cut off"
            user.tab(tab)
            path = tmp_path / f"{tab.lower()}-{width}-{scheme}.png"
            page.screenshot(path=path)
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            with Image.open(path) as image:
                brightness = np.asarray(image.convert("L"), dtype=float).mean()
            assert brightness > 150 if scheme == "light" else brightness < 110
    user.tab("Image")
    page.set_viewport_size({"width": 1440, "height": 900})
