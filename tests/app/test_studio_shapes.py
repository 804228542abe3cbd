"""The 3D tab in a browser, with small random models: what a person uploads, turns, reads, makes and downloads."""

import importlib.util
import io
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import mediatok as mt
import numpy as np
import pytest
import trimesh
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from mediatok.core.meshes import read_mesh
from PIL import Image, ImageChops

START_SECONDS = 240
# A studio with sample meshes, and without the shape models that ship: the tests know what these ones can do. Shapes of
# the last class take their time, so that there is something to stop.
SERVE = """
import sys, time
from pathlib import Path
from mediatok.app import studio, studio_context, studio_models, studio_shapes_actions as actions
known = studio_models.models
studio_models.models = lambda: [entry for entry in known() if entry.modality == "image"]
studio_context.SAMPLES = studio_context.SHAPES = Path(sys.argv[3])
make = actions.make_shape
def make_slowly(generator, source, label, seed, guidance, resolution, job, emit=None):
    def emit_and_wait(news):
        emit(news)
        time.sleep(1.5)
    slows = label == 2 and emit is not None
    return make(generator, source, label, seed, guidance, resolution, job, emit_and_wait if slows else emit)
actions.make_shape = make_slowly
studio.launch(port=int(sys.argv[1]), models_dir=sys.argv[2], max_upload_mb=1, device="cpu")
"""


def load_beside(name):
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


beside = load_beside("studio_shape_models")


@pytest.fixture(scope="module")
def all_models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("all")
    beside.save_shape_models(folder)
    return folder


@pytest.fixture(scope="module")
def models_dir(all_models, tmp_path_factory):
    """The folder that the studio is given: the tokenizers alone."""
    folder = tmp_path_factory.mktemp("models")
    for name in ("random-shapes", "random-solids"):
        shutil.copytree(all_models / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def studio_url(models_dir, tmp_path_factory):
    """Address of a running studio that accepts uploads of 1 MiB."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder, samples = tmp_path_factory.mktemp("studio"), tmp_path_factory.mktemp("samples")
    shutil.copy(Path(mt.__file__).parent / "docs" / "samples" / "tiger.png", samples)
    beside.save_samples(samples)
    log = open(folder / "log", "w")  # noqa: SIM115 - lives as long as the process
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TMPDIR": str(folder), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", SERVE, str(port), str(models_dir), str(samples)]
    process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, cwd=folder)
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(START_SECONDS * 4):
            time.sleep(0.25)
            assert process.poll() is None, (folder / "log").read_text()
            try:
                urllib.request.urlopen(url, timeout=5).read()
                break
            except OSError:
                continue
        else:
            pytest.fail(f"the studio did not start: {(folder / 'log').read_text()}")
        yield url
        assert "/app/studio" not in (folder / "log").read_text(), (folder / "log").read_text()
    finally:
        process.terminate()
        process.wait(20)
        log.close()


@pytest.fixture(scope="module")
def browser(browser):
    """The same browser with WebGL, drawn by the processor."""
    flags = ["--no-sandbox", "--disable-dev-shm-usage", "--disable-background-networking", "--use-gl=angle"]
    flags += ["--use-angle=swiftshader", "--enable-unsafe-swiftshader"]
    path = next(path for path in ("/usr/bin/chromium", shutil.which("chromium"), shutil.which("google-chrome")) if path)
    drawing = browser.browser_type.launch(executable_path=path, args=flags)
    yield drawing
    drawing.close()


@pytest.fixture
def shapes(user):
    """The first user, in the 3D tab on a laptop's screen."""
    user.page.set_viewport_size({"width": 1440, "height": 900})
    user.tab("3D")
    subtab(user, "Codec")
    wait_for(user, "codec", "Tokens", r"^\d+$")
    return user


def subtab(user, name: str) -> None:
    user.page.locator("#shapes-tabs").get_by_role("tab", name=name, exact=True).click()


def number(user, task: str, name: str) -> str:
    return user.page.locator(f'#shapes-{task}-numbers [data-name="{name}"] .value').inner_text()


def remark(user, task: str, name: str) -> str:
    return user.page.locator(f'#shapes-{task}-numbers [data-name="{name}"] .remark').inner_text()


def wait_for(user, task: str, name: str, pattern: str, part: str = "value") -> None:
    """Wait until a number of a sub-tab is like that, and nothing runs there."""
    user.page.wait_for_function(
        "([task, name, pattern, part]) => new RegExp(pattern).test("
        "document.querySelector(`#shapes-${task}-numbers [data-name='${name}'] .${part}`).innerText)"
        " && !document.querySelector(`#shapes-${task}-progress .mt-progress span`)",
        arg=[task, name, pattern, part],
    )


def canvas(user, name: str):
    return user.page.locator(f'.mt-viewers canvas[data-file="{name}"]')


def wait_for_faces(user, name: str, count: int) -> None:
    user.page.wait_for_function(
        "([name, count]) => document.querySelector(`.mt-viewers canvas[data-file='${name}']`).dataset.faces == count",
        arg=[name, count],
    )


def picture(user, name: str) -> Image.Image:
    """What a viewer shows."""
    user.page.wait_for_timeout(200)  # it draws in the next frame
    return Image.open(io.BytesIO(canvas(user, name).screenshot())).convert("RGB")


def differ(one: Image.Image, other: Image.Image) -> bool:
    return np.asarray(ImageChops.difference(one, other)).mean() > 0.5


def upload(user, data: bytes, name: str) -> None:
    box = user.page.locator("#shapes-codec-mesh")
    if box.get_by_label("Clear").count():
        box.get_by_label("Clear").click()
    file = {"name": name, "mimeType": "application/octet-stream", "buffer": data}
    box.locator("input[type=file]").first.set_input_files(file)


def downloaded(user, selector: str) -> bytes:
    with user.page.expect_download() as download:
        user.page.locator(selector).click()
    return download.value.path().read_bytes()


def code(user, task: str, kind: str) -> str:
    return user.page.locator(f"#shapes-{task}-{kind} .cm-content").inner_text()


def same(one, other) -> bool:
    return np.array_equal(one.faces, other.faces) and np.allclose(one.vertices, other.vertices, atol=1e-4)


def test_tab_opens_with_a_sample(shapes):
    page = shapes.page
    assert number(shapes, "codec", "Tokens") == "14"
    assert remark(shapes, "codec", "Tokens") == "3 of 3 scales"
    assert re.fullmatch(r"0\.\d{3}", number(shapes, "codec", "F-score"))
    wait_for_faces(shapes, "before", 12)
    wait_for_faces(shapes, "after", int(number(shapes, "codec", "Faces").replace(",", "")))
    assert page.locator("#shapes-codec-samples [aria-pressed=true]").inner_text() == "a box"
    for name in ("before", "after"):  # a shape on a plain ground
        low, high = zip(*picture(shapes, name).getextrema(), strict=True)
        assert min(high) - min(low) > 60
    assert "undefined" not in page.locator("body").inner_text()
    assert page.evaluate("document.documentElement.scrollHeight") <= 900


def test_viewers_share_a_camera_that_stays(shapes):
    page, before, after = shapes.page, picture(shapes, "before"), picture(shapes, "after")
    place = canvas(shapes, "after").bounding_box()
    x, y = place["x"] + place["width"] / 2, place["y"] + place["height"] / 2
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x + 80, y + 30, steps=4)
    page.mouse.up()
    turned = picture(shapes, "before")
    assert differ(before, turned)
    assert differ(after, picture(shapes, "after"))
    page.locator("#shapes-codec-samples button").nth(1).click()
    wait_for_faces(shapes, "before", 320)
    page.locator("#shapes-codec-samples button").first.click()
    wait_for_faces(shapes, "before", 12)
    assert not differ(turned, picture(shapes, "before"))
    canvas(shapes, "before").press("+")
    assert differ(turned, picture(shapes, "before"))
    canvas(shapes, "before").dblclick()
    assert not differ(before, picture(shapes, "before"))
    wait_for(shapes, "codec", "Tokens", "^14$")


def test_scales_and_resolution(shapes):
    page, full = shapes.page, picture(shapes, "after")
    wait_for(shapes, "codec", "Tokens", "^14$")
    faces, size = number(shapes, "codec", "Faces"), number(shapes, "codec", "Bytes")
    page.locator("#shapes-codec-scales input[type=range]").press("Home")
    wait_for(shapes, "codec", "Tokens", "^1$")
    assert remark(shapes, "codec", "Time") == "decode"
    assert int(number(shapes, "codec", "Bytes").split()[0]) < int(size.split()[0])
    assert "up_to_scale(1)" in code(shapes, "codec", "python")
    wait_for_faces(shapes, "after", int(number(shapes, "codec", "Faces").replace(",", "")))
    assert differ(full, picture(shapes, "after"))
    assert len(downloaded(shapes, "#shapes-codec-mtok")) == int(number(shapes, "codec", "Bytes").split()[0])
    page.locator("#shapes-codec-resolution").get_by_text("32", exact=True).click()
    page.locator("#shapes-codec-command").get_by_text("--resolution").first.wait_for()
    page.wait_for_function(
        "faces => document.querySelector('#shapes-codec-numbers [data-name=Faces] .value').innerText != faces",
        arg=faces,
    )
    wait_for(shapes, "codec", "Tokens", "^1$")
    shapes.choose("#shapes-codec-model", "random-solids (local)")  # another model: all of its scales
    wait_for(shapes, "codec", "Tokens", "2 of 2", part="remark")
    assert page.locator("#shapes-codec-scales input[type=range]").get_attribute("max") == "2"
    shapes.choose("#shapes-codec-model", "random-shapes (local)")
    wait_for(shapes, "codec", "Tokens", "3 of 3", part="remark")


def test_upload_download_and_back(shapes, other_user, models_dir, tmp_path):
    ball = trimesh.creation.icosphere(1, 2.0).apply_translation((3, 4, 5))
    data = trimesh.Trimesh(ball.vertices, ball.faces[1:], process=False).export(file_type="obj").encode()
    (tmp_path / "my ball.obj").write_bytes(data)
    upload(shapes, data, "my ball.obj")
    shapes.page.locator("#shapes-codec-python").get_by_text("my ball.obj").first.wait_for()
    wait_for(shapes, "codec", "Tokens", "^14$")
    assert "open edges: 3" in shapes.page.locator("#shapes-codec-viewers .mt-notes").inner_text()
    tokenizer = mt.load(models_dir / "random-shapes")
    tokens = tokenizer.encode(tmp_path / "my ball.obj")
    content = downloaded(shapes, "#shapes-codec-mtok")
    assert content == tokens.to_bytes()
    assert number(shapes, "codec", "Bytes") == f"{len(content)} B"
    decoded = tokenizer.decode(tokens, resolution=32)
    for kind in ("glb", "stl"):
        assert same(read_mesh(downloaded(shapes, f"#shapes-codec-{kind}")), read_mesh(decoded))
    assert "mediatok encode 'my ball.obj'" in code(shapes, "codec", "command")

    # The .mtok goes in on another user's page: the same shape, without an original.
    other_user.tab("3D")
    wait_for(other_user, "codec", "Tokens", "^14$")
    (tmp_path / "ball.mtok").write_bytes(tokens.up_to_scale(2).to_bytes())
    with other_user.page.expect_file_chooser() as chooser:
        other_user.page.locator("#shapes-codec-open").click()
    chooser.value.set_files(tmp_path / "ball.mtok")
    wait_for(other_user, "codec", "Tokens", "2 of 2", part="remark")
    assert number(other_user, "codec", "F-score") == "–"
    wait_for_faces(other_user, "before", 0)
    assert "original" in other_user.page.locator("#shapes-codec-viewers").inner_text()
    assert number(shapes, "codec", "Tokens") == "14"


def test_bad_mesh_is_a_message_and_changes_nothing(shapes):
    page = shapes.page
    page.locator("#shapes-codec-samples button").first.click()
    wait_for_faces(shapes, "before", 12)
    wait_for(shapes, "codec", "Tokens", "^14$")
    before = [number(shapes, "codec", name) for name in ("Tokens", "Bytes", "F-score", "Faces")]
    for data, reason in ((b"PK\x03\x04" + bytes(60), "ZIP archive"), (b"v 0 0 0\n" * 3, "no mesh|no faces")):
        upload(shapes, data, "scan.obj")
        toast = shapes.toasts.filter(has_text=re.compile(reason)).first
        toast.wait_for()
        message = toast.inner_text()
        assert "scan.obj" in message
        assert "/" not in message.replace("STL, PLY", "")
        shapes.forget_toasts()
    assert [number(shapes, "codec", name) for name in ("Tokens", "Bytes", "F-score", "Faces")] == before
    assert page.locator("#shapes-codec-mesh").get_by_text("Click to Upload").is_visible()  # ready for another one


def test_missing_generator_is_said_loaded_and_makes(shapes, all_models):
    page = shapes.page
    subtab(shapes, "Generate")
    notice = page.locator("#shapes-generate-missing")
    assert "No model that makes new shapes is here" in notice.inner_text()
    assert "recipes/vat-gen-tiny.yaml" in notice.inner_text()
    assert not page.locator("#shapes-generate-run").is_visible()
    notice.get_by_role("button").click()
    page.locator("#models-table").get_by_text("random-shapes (local)").wait_for()
    shapes.fill("#models-name", all_models / "random-sculptor", then="Tab")
    page.locator("#models-load").click()
    page.locator("#models-table").get_by_text("random-sculptor").wait_for()

    shapes.tab("3D")
    subtab(shapes, "Generate")
    page.locator("#shapes-generate-run").wait_for()
    page.locator("#shapes-generate-resolution").get_by_text("32", exact=True).click()
    page.locator("#shapes-generate-fresh input").uncheck()
    shapes.choose("#shapes-generate-label", "lamp")
    shapes.fill("#shapes-generate-seed", 12)  # Enter
    wait_for(shapes, "generate", "Seed", "^12$")
    made = mt.load(all_models / "random-sculptor").sample("lamp", seed=12, guidance=2.0, resolution=32)
    assert same(read_mesh(downloaded(shapes, "#shapes-generate-glb")), read_mesh(made.meshes[0]))
    assert mt.Tokens.from_bytes(downloaded(shapes, "#shapes-generate-mtok")) == made.tokens[0]
    wait_for_faces(shapes, "made", len(made.meshes[0].faces))
    assert "sample('lamp', seed=12" in code(shapes, "generate", "python")
    assert "--seed 12" in code(shapes, "generate", "command")
    shapes.fill("#shapes-generate-seed", -1)
    shapes.toasts.get_by_text("Seed must be a whole number").first.wait_for()
    assert number(shapes, "generate", "Seed") == "12"
    shapes.forget_toasts()
    page.locator("#shapes-generate-fresh input").check()
    page.locator("#shapes-generate-run").click()
    wait_for(shapes, "generate", "Seed", "^(?!12$)")
    assert page.locator("#shapes-generate-seed input").input_value() == number(shapes, "generate", "Seed")

    name = f"lamp-{number(shapes, 'generate', 'Seed')}.glb"
    page.locator("#shapes-generate-use").click()
    shapes.toasts.get_by_text("shape of Codec").first.wait_for()
    shapes.forget_toasts()
    subtab(shapes, "Codec")
    page.locator("#shapes-codec-python").get_by_text(name).first.wait_for()


def test_previews_come_and_stop_ends_this_users_work_alone(shapes, other_user):
    subtab(shapes, "Generate")
    page = shapes.page
    page.locator("#shapes-generate-run").wait_for()
    seed, faces = number(shapes, "generate", "Seed"), canvas(shapes, "made").get_attribute("data-faces")
    shapes.choose("#shapes-generate-label", "none")  # the slow one
    page.locator("#shapes-generate-run").click()
    page.locator("#shapes-generate-progress").get_by_text("scale 1 of 3").wait_for()
    other_user.tab("3D")  # waits for the device
    other_user.page.locator("#shapes-codec-samples button").nth(1).click()
    page.keyboard.press("Escape")
    page.locator("#shapes-generate-progress .mt-progress span").wait_for(state="detached", timeout=10_000)
    wait_for_faces(shapes, "made", faces)  # what was there before the previews
    assert number(shapes, "generate", "Seed") == seed
    wait_for_faces(other_user, "before", 320)
    wait_for(other_user, "codec", "Tokens", "3 of 3", part="remark")
    assert shapes.toasts.count() == 0
    assert other_user.toasts.count() == 0


@pytest.mark.parametrize(("width", "height"), [(1440, 900), (390, 844)])
def test_both_sizes_light_and_dark(shapes, width, height, tmp_path):
    page = shapes.page
    page.set_viewport_size({"width": width, "height": height})
    for name in ("Image", "Compare", "3D", "Models", "Help"):
        place = page.locator("#tabs > .tab-wrapper").get_by_role("tab", name=name, exact=True).bounding_box()
        assert 0 <= place["x"] <= width - place["width"], f"{name} is cut off"
    for scheme in ("dark", "light"):
        page.locator("#mt-theme").click()
        for task in ("Codec", "Generate"):
            subtab(shapes, task)
            page.locator(f"#shapes-{task.lower()}-model").wait_for()
            path = tmp_path / f"{task.lower()}-{width}-{scheme}.png"
            page.screenshot(path=path, full_page=width < 760)
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            if width > 760:
                assert page.evaluate("document.documentElement.scrollHeight") <= height
            with Image.open(path) as image:
                brightness = np.asarray(image.convert("L"), dtype=float).mean()
            assert brightness > 150 if scheme == "light" else brightness < 110


def test_endpoints(studio_url, models_dir, tmp_path):
    client = Client(studio_url, verbose=False)
    trimesh.creation.box((1, 2, 3)).export(tmp_path / "box.ply")
    source = str(models_dir / "random-shapes")
    path, numbers = client.predict(handle_file(tmp_path / "box.ply"), source, api_name="/encode_mesh")
    tokenizer = mt.load(source)
    tokens = tokenizer.encode(tmp_path / "box.ply")
    assert Path(path).read_bytes() == tokens.to_bytes()
    assert numbers["tokens"] == tokens.ids[0].tolist()
    assert numbers["scales"] == list(beside.SCALES)
    assert 0 <= numbers["f_score"] <= 1
    decoded, numbers = client.predict(handle_file(path), "", 32, 2, api_name="/decode_mesh")
    assert same(read_mesh(decoded), read_mesh(tokenizer.decode(tokens, resolution=32, up_to_scale=2)))
    assert numbers["num_tokens"] == 5
    for wrong, reason in (((500, None), "32, 64, 128"), ((None, None), "32, 64, 128"), ((32, 4), "takes 1 to 3")):
        with pytest.raises(AppError, match=reason):
            client.predict(handle_file(path), "", *wrong, api_name="/decode_mesh")
    with pytest.raises(AppError, match="not a model of this studio"):
        client.predict(handle_file(tmp_path / "box.ply"), "/etc", api_name="/encode_mesh")
