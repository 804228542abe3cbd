"""A studio in a process of its own, with two small random models, and a browser; shared by the tests of this folder."""

import importlib.util
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

BROWSERS = ("/usr/bin/chromium", "/usr/bin/chromium-browser", "/usr/bin/google-chrome")
BROWSER_OPTIONS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
]  # fmt: skip
START_SECONDS = 240  # importing gradio, diffusers and torch on a busy machine


def save_random_models(folder: Path) -> None:
    """Tokenizers with random weights whose pictures differ: variable-length, fixed-length, and 16 px small."""
    import torch
    from mediatok.tokenizers.image.one_d_piece import OneDPiece
    from mediatok.tokenizers.image.titok import TiTok

    torch.manual_seed(0)
    variants = ((OneDPiece, 64, 64, "random-piece"), (TiTok, 32, 64, "random-titok"), (TiTok, 4, 16, "random-tiles"))
    for cls, num_tokens, image_size, name in variants:
        patch = image_size // 4
        model = cls(
            image_size=image_size, encoder_patch_size=patch, decoder_patch_size=patch, num_latent_tokens=num_tokens,
            token_size=8, codebook_size=1024, is_legacy=False, has_pixel_decoder=False, encoder_width=64,
            encoder_depth=2, encoder_heads=2, decoder_width=64, decoder_depth=2, decoder_heads=2,
        )  # fmt: skip
        with torch.no_grad():
            model.decoder.ffn[0].weight.mul_(6)
            model.decoder.conv_out.bias.fill_(0.5)
            model.quantize.embedding.weight.normal_()
        model.save_pretrained(folder / name)


def save_random_generator(folder: Path) -> None:
    """A generator with as many labels as people may bring; only its controls are looked at."""
    from mediatok.generators.xar import XAR

    names = [f"category {number}" for number in range(9)] + [f"name {number}" for number in range(1791)]
    XAR(
        grid=8, latent_channels=8, layout="cell", layout_size=4, embed_dim=16, num_heads=2, encoder_depth=1,
        decoder_depth=1, num_classes=len(names), label_names=names, tokenizer="kl-tiny",
    ).save_pretrained(folder / "random-names")  # fmt: skip


@pytest.fixture(scope="session")
def picture_models(tmp_path_factory) -> Path:
    """A folder with small models of FlexTok, TokenFlow and SEED, and their generators; see picture_models.py."""
    spec = importlib.util.spec_from_file_location("picture_models", Path(__file__).with_name("picture_models.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    folder = tmp_path_factory.mktemp("pictures")
    module.save_picture_models(folder)
    return folder


@pytest.fixture(scope="session")
def models_dir(picture_models, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    shutil.copytree(picture_models, folder, dirs_exist_ok=True)
    save_random_models(folder)
    save_random_generator(folder)
    return folder


@pytest.fixture(scope="session")
def studio_url(models_dir, tmp_path_factory):
    """Address of a running studio that accepts uploads of 1 MiB."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder = tmp_path_factory.mktemp("studio")
    log = open(folder / "log", "w")  # noqa: SIM115 - lives as long as the process
    command = [sys.executable, "-m", "mediatok.app.studio", "--port", str(port), "--models", str(models_dir)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TMPDIR": str(folder), "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(
        [*command, "--max-upload-mb", "1", "--device", "cpu"], stdout=log, stderr=log, env=environment, cwd=folder
    )
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
        # Gradio logs hostile requests with a traceback; none may come from our code.
        assert "/app/studio" not in (folder / "log").read_text(), (folder / "log").read_text()
    finally:
        process.terminate()
        process.wait(20)
        log.close()


@pytest.fixture(scope="session")
def browser():
    from playwright.sync_api import sync_playwright

    path = next((path for path in BROWSERS if Path(path).exists()), None) or shutil.which("chromium")
    assert path, "Chromium is not installed (Debian: apt-get install chromium)"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=BROWSER_OPTIONS)
        yield browser
        browser.close()


class User:
    """A person with a browser of their own: the page, and what the tests read from and do on it."""

    def __init__(self, browser, url: str):
        self.context = browser.new_context(viewport={"width": 1440, "height": 900})
        self.errors: list[str] = []
        self.page = self.context.new_page()
        self.page.set_default_timeout(60_000)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.goto(url)
        self.page.locator("#image-numbers .mt-number").first.wait_for()
        self.page.locator("#image-slider img").first.wait_for()
        self.page.wait_for_timeout(500)

    def number(self, name: str) -> str:
        """A value of the strip of numbers."""
        return self.page.locator(f'#image-numbers [data-name="{name}"] .value').inner_text()

    def wait_for_number(self, name: str, pattern: str) -> None:
        self.page.wait_for_function(
            "([name, pattern]) => new RegExp(pattern).test("
            'document.querySelector(`#image-numbers [data-name="${name}"] .value`).innerText)',
            arg=[name, pattern],
        )

    def picture(self, selector: str = "#image-slider img") -> str:
        """Address of a picture; Gradio's addresses carry a hash of the content. Of a slider's pair, the second."""
        return self.page.locator(selector).last.get_attribute("src")

    def wait_for_other(self, before: str, selector: str = "#image-slider img") -> str:
        self.page.wait_for_function(
            "([selector, before]) => { const all = [...document.querySelectorAll(selector)];"
            " return all.length && all.at(-1).getAttribute('src') !== before; }",
            arg=[selector, before],
        )
        return self.picture(selector)

    def fill(self, selector: str, value, then: str = "Enter") -> None:
        self.page.locator(f"{selector} input").first.fill(str(value))
        self.page.locator(f"{selector} input").first.press(then)

    def choose(self, selector: str, label: str) -> None:
        """Pick an option of a dropdown."""
        self.page.locator(f"{selector} input").first.click()
        self.page.get_by_role("option", name=label).first.click()

    def tab(self, name: str) -> None:
        self.page.get_by_role("tab", name=name, exact=True).click()

    def upload(self, data: bytes, name: str = "photo.png") -> None:
        file = {"name": name, "mimeType": "image/png", "buffer": data}
        self.page.locator("#image-picture input[type=file]").first.set_input_files(file)

    def sample(self, index: int) -> None:
        self.page.locator("#image-samples button").nth(index).click()

    def use_flexible_model(self) -> None:
        """The Image tab with the variable-length model, choosing by tokens."""
        self.tab("Image")
        self.choose("#image-model", "random-piece (local)")
        self.settle()
        self.page.locator("#image-kind").get_by_text("Tokens", exact=True).click()
        self.page.locator("#image-count").wait_for()
        self.settle()

    def settle(self) -> None:
        """Wait until no result is under way."""
        for _ in range(2):  # a change of model is two events
            self.page.wait_for_timeout(200)
            self.page.locator("#image-slider [data-testid=status-tracker]:not(.hide)").wait_for(state="detached")

    def made(self, count: int) -> list[str]:
        """The Generate tab's finished pictures, when there are `count` and the run has ended."""
        self.page.wait_for_function(
            "count => document.querySelectorAll('#generate-grid .mt-made').length === count"
            " && !document.querySelector('#generate-grid .mt-progress span')",
            arg=count,
        )
        images = self.page.locator("#generate-grid .mt-made img")
        return [images.nth(index).get_attribute("src") for index in range(count)]

    def forget_toasts(self) -> None:
        """Close all messages."""
        self.page.wait_for_function(
            "() => { const all = [...document.querySelectorAll('[data-testid=toast-close]')];"
            " all.forEach((close) => close.click()); return !all.length; }"
        )

    @property
    def toasts(self):
        """Messages on the page."""
        return self.page.locator("[data-testid=toast-body]")


@pytest.fixture(scope="module")
def user(browser, studio_url):
    """One user, for all tests of a file: loading the page is what takes longest."""
    user = User(browser, studio_url)
    yield user
    user.context.close()
    assert not user.errors


@pytest.fixture(scope="module")
def other_user(browser, studio_url):
    user = User(browser, studio_url)
    yield user
    user.context.close()
    assert not user.errors
