"""The Generate tab in a browser, by two people at once, and its endpoint."""

import io
import re
import zipfile

import mediatok as mt
import pytest
from gradio_client import Client
from gradio_client.exceptions import AppError
from PIL import Image, ImageChops


def settle(user, model: str, *, steps: int, count: int, seed: int | None = None) -> None:
    """The tab with a generator and its settings."""
    user.tab("Generate")
    more = user.page.locator("#generate-steps")
    if not more.is_visible():
        user.page.locator("#generate-more button").first.click()
        more.wait_for()
    if user.page.locator("#generate-model input").input_value() != model:
        user.fill("#generate-steps", 987, then="Tab")
        user.choose("#generate-model", model)
        # The new model brings its own number of steps.
        user.page.wait_for_function("document.querySelector('#generate-steps input').value !== '987'")
    user.fill("#generate-steps", steps, then="Tab")
    user.fill("#generate-count", count, then="Tab")
    fresh = user.page.locator("#generate-fresh input")
    fresh.set_checked(seed is None)
    if seed is not None:
        user.fill("#generate-seed", seed, then="Tab")


def generate(user) -> None:
    user.forget_toasts()  # a new message joins those that are there, folded up
    user.page.locator("#generate-run").click()


def labels(user) -> list[str]:
    """What is to be made."""
    return user.page.locator("#generate-labels .mt-chip span").all_inner_texts()


def type_label(user, text: str, then: str = "Enter") -> None:
    user.fill("#generate-labels", text, then=then)


def difference(a: Image.Image, b: Image.Image) -> int:
    """The largest difference of two pictures in any pixel and channel, of 255."""
    return max(high for _, high in ImageChops.difference(a.convert("RGB"), b.convert("RGB")).getextrema())


def code(user, kind: str) -> str:
    return user.page.locator(f"#generate-{kind} .cm-content").inner_text().replace("\n", "\n")


def downloaded(user, selector: str) -> bytes:
    with user.page.expect_download() as download:
        user.page.locator(selector).click()
    return download.value.path().read_bytes()


def test_tab_is_full_before_anything_is_asked(user):
    user.tab("Generate")
    assert len(user.made(4)) == 4
    assert user.page.locator("#generate-numbers .value").count() == 6
    assert user.page.locator("#generate-panel .mt-canvas img").is_visible()
    assert "mediatok generate" in code(user, "command")
    assert user.page.evaluate("document.documentElement.scrollHeight") <= 900


def test_previews_then_pictures_that_the_shown_code_makes_again(user):
    settle(user, "maskgit-tiny", steps=40, count=1, seed=31)
    before = user.made(4)
    generate(user)
    making = user.page.locator("#generate-grid .making img")
    making.first.wait_for()
    first = making.first.get_attribute("src")
    user.page.wait_for_function(
        "before => { const shown = document.querySelector('#generate-grid .making img');"
        " return shown && shown.getAttribute('src') !== before; }",
        arg=first,
    )
    assert not set(user.made(2)) & set(before)
    archive = zipfile.ZipFile(io.BytesIO(downloaded(user, "#generate-zip")))
    names = [name for name in archive.namelist() if name.endswith(".png")]
    assert [name.rsplit("-", 1)[1] for name in names] == ["31.png", "32.png"]
    pictures = [Image.open(io.BytesIO(archive.read(name))) for name in names]
    assert "mediatok generate maskgit-tiny" in pictures[0].text["command"]
    space = {}
    exec(code(user, "python").split("for image")[0], space)
    for picture, image in zip(pictures, space["made"].images, strict=True):
        assert difference(picture, image) <= 2


def test_vary_keeps_what_was_marked(user):
    settle(user, "maskgit-tiny", steps=8, count=2, seed=5)
    generate(user)
    user.page.get_by_text("seed 5 ·").first.wait_for()
    user.made(4)
    user.page.locator("#generate-grid .mt-made").nth(1).click()
    user.page.locator("#generate-panel").get_by_text("seed 6").wait_for()
    user.page.locator('#generate-panel [data-act="all"]').click()
    user.page.locator("#generate-redo").click()
    user.toasts.get_by_text("nothing to redo").first.wait_for()
    for unit in range(10, 64):
        user.page.locator("#generate-panel .mt-unit").nth(unit).click()
    assert "10 of 64 tokens kept" in user.page.locator("#generate-panel output").inner_text()
    user.fill("#generate-seed", 90, then="Tab")
    user.page.locator("#generate-redo").click()
    user.page.get_by_text("seed 90 ·").wait_for()
    assert len(set(user.made(3))) == 3  # the one before, and two others
    text = code(user, "python")
    assert "start=start, keep=[0, 1, 2, 3, 4, 5, 6, 7, 8, 9]" in re.sub(r"\s+", " ", text)
    space = {}
    exec(text.split("for image")[0], space)
    start, made = space["start"].content, space["made"].content
    assert (made[:, :10] == start[:, :10]).all()
    assert (made[:, 10:] != start[:, 10:]).any(dim=1).all()
    picture = Image.open(io.BytesIO(downloaded(user, "#generate-png")))
    assert difference(picture, space["made"].images[0]) <= 2
    assert "--edit start-1.mtok --keep 0-9" in code(user, "command")


def test_cells_of_xar_are_kept_in_place(user):
    settle(user, "xar-tiny", steps=4, count=1, seed=3)
    generate(user)
    user.page.get_by_text("seed 3 ·").wait_for()
    user.made(2)
    user.page.locator("#generate-panel .over .mt-unit").nth(3).click()
    user.fill("#generate-seed", 70, then="Tab")
    user.page.locator("#generate-redo").click()
    user.page.get_by_text("seed 70 ·").wait_for()
    space = {}
    exec(code(user, "python").split("for image")[0], space)
    half = mt.load("xar-tiny").config.grid // 2
    start, made = space["start"].content, space["made"].content
    assert (made[:, :, half:, half:] == start[:, :, half:, half:]).all()
    assert (made[:, :, :half, :half] != start[:, :, :half, :half]).any()


def test_generated_picture_goes_to_the_image_tab(user):
    settle(user, "xar-tiny", steps=4, count=1, seed=3)
    before = user.picture()
    user.page.locator("#generate-to-image").click()
    user.wait_for_other(before)
    assert user.page.locator("#image-numbers").is_visible()
    user.wait_for_number("PSNR", "dB$")
    user.tab("Generate")


def test_two_people_at_once(user, other_user, studio_url):
    """One stops a run, then asks for nonsense, while the other's run waits and works."""
    client = Client(studio_url, verbose=False)
    alone, _ = client.predict("xar-tiny", ["smileys & emotion", "flags"], 50, 30, 3.0, api_name="/generate")
    settle(user, "xar-tiny", steps=8, count=1, seed=1)
    generate(user)
    user.page.get_by_text("seed 1 ·").first.wait_for()
    before = user.made(2)
    user.fill("#generate-steps", 1000, then="Tab")  # 4,000 steps: long work
    generate(user)
    user.page.locator("#generate-grid .mt-progress").get_by_text("%").wait_for()
    settle(other_user, "xar-tiny", steps=30, count=1, seed=50)
    user_labels = labels(other_user)
    other_user.fill("#generate-guidance", 3, then="Tab")
    generate(other_user)
    other_user.page.get_by_text("waiting for 1 other job").wait_for()
    user.page.keyboard.press("Escape")
    assert user.made(2) == before  # nothing was finished: what was there is back
    assert user.toasts.count() == 0

    other_user.page.get_by_text("waiting for 1 other job").wait_for(state="detached")  # its turn, or done already
    type_label(user, "no such thing")
    generate(user)
    user.toasts.get_by_text("Unknown label 'no such thing'").wait_for()
    user.tab("Image")
    user.upload(b"no picture at all")
    user.toasts.get_by_text("not a sound").wait_for()

    other_user.page.get_by_text("seed 50 ·").first.wait_for()
    other_user.made(2)
    assert labels(other_user) == user_labels
    archive = zipfile.ZipFile(io.BytesIO(downloaded(other_user, "#generate-zip")))
    pictures = [Image.open(io.BytesIO(archive.read(name))) for name in archive.namelist() if name.endswith(".png")]
    assert [difference(*pair) for pair in zip(pictures, map(Image.open, alone), strict=True)] == [0, 0]
    assert other_user.toasts.count() == 0

    user.tab("Generate")
    user.page.get_by_role("button", name="Remove no such thing").click()
    settle(user, "xar-tiny", steps=4, count=1, seed=77)
    generate(user)
    user.page.get_by_text("seed 77 ·").first.wait_for()


def test_stop_keeps_finished_pictures(user):
    settle(user, "maskgit-tiny", steps=100, count=4, seed=200)  # two batches; the first is finished when Stop comes
    generate(user)
    user.page.locator("#generate-grid .mt-made").nth(3).wait_for()
    user.page.locator("#generate-stop").click()
    assert len(user.made(4)) == 4
    assert "stopped, 8 asked" in user.page.locator("#generate-numbers").inner_text()


def test_newer_run_replaces_the_one_under_way(user):
    settle(user, "maskgit-tiny", steps=1000, count=1, seed=300)
    generate(user)
    user.page.locator("#generate-grid .mt-progress").get_by_text("%").wait_for()
    type_label(user, "no such thing")
    generate(user)
    user.toasts.get_by_text("Unknown label").wait_for()
    assert user.page.locator("#generate-grid .mt-progress span").count() == 1  # a mistake ends nothing
    user.page.get_by_role("button", name="Remove no such thing").click()
    user.fill("#generate-seed", 310, then="Tab")
    user.fill("#generate-steps", 4)  # Enter
    user.page.get_by_text("seed 310 ·").first.wait_for()
    assert len(user.made(2)) == 2


def test_bad_settings_are_messages(user):
    settle(user, "maskgit-tiny", steps=8, count=1, seed=9)
    generate(user)
    user.page.get_by_text("seed 9 ·").first.wait_for()
    before = user.made(2)
    steps, guidance, seed = "Steps must be a whole number", "Guidance must be a number", "Seed must be a whole number"
    for field, values, message in (
        ("steps", ("0", "-3", "", "2.5", "5000", "1e30"), steps),
        ("guidance", ("", "-1", "1e9", "1e999"), guidance),
        ("seed", ("-1", "", "1e30"), seed),
    ):
        box = user.page.locator(f"#generate-{field} input")
        sound = box.input_value()
        for value in values:
            user.fill(f"#generate-{field}", value, then="Tab")
            generate(user)
            user.toasts.get_by_text(message).first.wait_for()
        user.fill(f"#generate-{field}", sound, then="Tab")
    settle(user, "maskgit-tiny", steps=8, count=16, seed=9)
    user.choose("#generate-labels", "objects")
    generate(user)
    user.toasts.get_by_text("at most 32").first.wait_for()
    user.page.get_by_role("button", name="Remove objects").click()
    assert user.made(2) == before
    assert "Traceback" not in user.page.locator("body").inner_text()
    settle(user, "maskgit-tiny", steps=8, count=1, seed=10)
    generate(user)
    user.page.get_by_text("seed 10 ·").first.wait_for()


def test_labels_are_typed(user):
    settle(user, "maskgit-tiny", steps=4, count=1, seed=400)
    while labels(user):
        user.page.locator("#generate-labels .mt-chip button").first.click()
    type_label(user, "fla")  # the first that begins with it
    type_label(user, "Objects", then="Tab")  # left without Enter, it counts, too
    assert labels(user) == ["flags", "objects"]
    type_label(user, "symbolz")
    assert user.page.locator("#generate-labels .unknown").inner_text().startswith("symbolz")
    generate(user)
    user.toasts.get_by_text("Did you mean").first.wait_for()
    user.page.locator("#generate-labels input").press("Backspace")
    user.page.locator("#generate-labels input").fill("symbolz")
    offered = user.page.locator("#generate-labels [role=option]")
    assert offered.first.inner_text() == "symbols"
    offered.first.click()
    assert labels(user) == ["flags", "objects", "symbols"]
    user.page.locator("#generate-labels input").press("Enter")  # without a word: Generate
    user.page.get_by_text("seed 402 ·").wait_for()
    assert "['flags', 'objects', 'symbols']" in code(user, "python")


def test_many_labels_are_searched(user):
    user.tab("Generate")
    user.choose("#generate-model", "random-names (local)")
    box, offered = user.page.locator("#generate-labels input"), user.page.locator("#generate-labels [role=option]")
    user.page.wait_for_function("!document.querySelector('#generate-labels .mt-chip')")  # it has none of these labels
    box.click()
    user.page.get_by_text("1800 labels: type to search").wait_for()
    assert offered.all_inner_texts()[:2] == ["category 0", "category 1"]
    assert offered.count() == 200
    box.fill("name 17")
    assert offered.first.inner_text() == "name 17"
    box.press("ArrowDown")
    box.press("Enter")
    assert labels(user) == ["name 170"]
    box.press("Escape")
    settle(user, "xar-tiny", steps=4, count=1, seed=1)


def test_endpoint(studio_url, tmp_path):
    client = Client(studio_url, verbose=False, download_files=str(tmp_path))
    files, facts = client.predict("xar-tiny", ["flags", 6, None], 11, 4, 3.0, api_name="/generate")
    assert facts["labels"] == ["flags", "smileys & emotion", "no class"]
    assert facts["seeds"] == [11, 12, 13]
    expected = mt.load("xar-tiny").generate(["flags", 6, None], seed=11, steps=4, guidance=3.0)
    for file, image in zip(files, expected, strict=True):
        assert difference(Image.open(file), image) <= 2
    for arguments, reason in (
        (("xar-tiny", ["flagz"], 0, 4, 3.0), "Did you mean"),
        (("xar-tiny", "flags", 0, 4, 3.0), "list"),
        (("xar-tiny", ["flags"], -1, 4, 3.0), "Seeds are"),
        (("xar-tiny", ["flags"], 0, 0, 3.0), "from 1 to 1000"),
        (("xar-tiny", ["flags"] * 33, 0, 4, 3.0), "to 32"),
        (("titok-tiny", ["flags"], 0, 4, 3.0), "is a tokenizer, not a generator"),
        (("/etc", ["flags"], 0, 4, 3.0), "not a model of this studio"),
    ):
        with pytest.raises(AppError, match=reason):
            client.predict(*arguments, api_name="/generate")
