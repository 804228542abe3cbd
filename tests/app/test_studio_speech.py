"""The Speech tab in a browser, with small random models: what a person records, hears, reads and downloads."""

import importlib.util
import io
import json
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
import soundfile
import torch
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from PIL import Image

START_SECONDS = 240
# A studio with sample clips, and without the speech models that ship: the tests know what these ones can do.
SERVE = """
import sys
from pathlib import Path
from mediatok.app import studio, studio_context, studio_models
known = studio_models.models
studio_models.models = lambda: [entry for entry in known() if entry.modality == "image"]
studio_context.SAMPLES = studio_context.CLIPS = Path(sys.argv[3])
studio.launch(port=int(sys.argv[1]), models_dir=sys.argv[2], max_upload_mb=1, device="cpu")
"""


def load_beside(name):
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


beside = load_beside("studio_speech_models")
RATE, vowels = beside.RATE, beside.vowels


@pytest.fixture(scope="module")
def models_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    beside.save_speech_models(folder)
    return folder


@pytest.fixture(scope="module")
def studio_url(models_dir, tmp_path_factory):
    """Address of a running studio that accepts uploads of 1 MiB."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder, samples = tmp_path_factory.mktemp("studio"), tmp_path_factory.mktemp("samples")
    shutil.copy(Path(mt.__file__).parent / "docs" / "samples" / "tiger.png", samples)
    for name, seconds in (("first_voice", 2), ("second_voice", 3)):
        mt.Waveform(vowels(seconds), RATE).save(samples / f"{name}.flac")
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
    """The same browser with a microphone that beeps."""
    flags = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-background-networking"]
    flags += ["--use-fake-ui-for-media-stream", "--use-fake-device-for-media-stream", "--mute-audio"]
    path = next(path for path in ("/usr/bin/chromium", shutil.which("chromium"), shutil.which("google-chrome")) if path)
    listening = browser.browser_type.launch(executable_path=path, args=flags)
    yield listening
    listening.close()


@pytest.fixture
def speech(user):
    """The first user, in the Speech tab on a laptop's screen."""
    user.page.set_viewport_size({"width": 1440, "height": 900})
    user.tab("Speech")
    user.tab("Codec")
    wait_for(user, "codec", "Tokens", r"^\d+$")
    return user


def number(user, task: str, name: str) -> str:
    return user.page.locator(f'#speech-{task}-numbers [data-name="{name}"] .value').inner_text()


def facts(user) -> list[str]:
    """What the codec's numbers say of the clip, whatever the time it took."""
    return [number(user, "codec", name) for name in ("Tokens", "Bytes", "Bit rate", "STOI")]


def wait_for(user, task: str, name: str, pattern: str) -> None:
    """Wait until a number of a sub-tab is like that, and nothing runs there."""
    user.page.wait_for_function(
        "([task, name, pattern]) => new RegExp(pattern).test("
        "document.querySelector(`#speech-${task}-numbers [data-name='${name}'] .value`).innerText)"
        " && !document.querySelector(`#speech-${task}-progress .mt-progress span`)",
        arg=[task, name, pattern],
    )


def emptied(user):
    """The codec's input, ready for another clip."""
    box = user.page.locator("#speech-codec-clip")
    if box.get_by_label("Clear").count():
        box.get_by_label("Clear").click()
    box.get_by_label("Upload file").wait_for()
    return box


def upload(user, data: bytes, name: str) -> None:
    box = emptied(user)
    box.get_by_label("Upload file").click()
    file = {"name": name, "mimeType": "audio/wav", "buffer": data}
    box.locator("input[type=file]").first.set_input_files(file)


def wav(samples: torch.Tensor, kind: str = "WAV") -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, samples.numpy(), RATE, format=kind, subtype="PCM_16")
    return buffer.getvalue()


def downloaded(user, selector: str) -> bytes:
    with user.page.expect_download() as download:
        user.page.locator(selector).click()
    return download.value.path().read_bytes()


def code(user, task: str, kind: str) -> str:
    return user.page.locator(f"#speech-{task}-{kind} .cm-content").inner_text()


def heard(user, selector: str) -> list[float]:
    """Length of the sound of each player, once the browser has read it."""
    user.page.wait_for_function(
        "selector => [...document.querySelectorAll(`${selector} audio`)].every((a) => !a.src || a.readyState > 0)",
        arg=selector,
    )
    players = user.page.locator(f"{selector} audio")
    return players.evaluate_all("players => players.map((player) => player.src ? player.duration : 0)")


def test_tab_opens_with_a_sample(speech):
    page = speech.page
    assert number(speech, "codec", "Tokens") == "100"
    assert number(speech, "codec", "Bit rate").endswith("bit/s")
    assert re.fullmatch(r"0\.\d{3}", number(speech, "codec", "STOI"))
    assert heard(speech, "#speech-codec-player") == pytest.approx([2.0, 2.0])
    assert page.locator("#speech-codec-player .mt-lane").count() == 3  # before, tokens, after
    assert page.locator("#speech-codec-samples [aria-pressed=true]").inner_text() == "first voice"
    assert "undefined" not in page.locator("body").inner_text()
    assert page.evaluate("document.documentElement.scrollHeight") <= 900


def test_players_share_a_position(speech):
    """Before plays, then after goes on where before was; the mark follows; a click and the arrow keys move both."""
    page = speech.page
    figure = page.locator("#speech-codec-player .mt-sound")
    times = page.evaluate(
        """async () => {
          const [before, after] = document.querySelectorAll('#speech-codec-player audio');
          const reach = async (player, time) => {
            while (player.currentTime < time) await new Promise((done) => setTimeout(done, 20));
          };
          await before.play(); await reach(before, 0.3);
          await after.play(); await reach(after, 0.35);
          after.pause();
          return [before.paused, before.currentTime, after.currentTime];
        }"""
    )
    assert times[0]
    assert times[2] > times[1] >= 0.3
    place = page.locator("#speech-codec-player .mt-drawn").first.bounding_box()
    page.mouse.click(place["x"] + place["width"] / 2, place["y"] + 20)
    assert figure.get_attribute("aria-valuetext") == "1.0 s"
    figure.press("ArrowRight")
    assert figure.get_attribute("aria-valuetext") == "1.5 s"
    assert float(figure.evaluate("figure => figure.style.getPropertyValue('--at')")) == pytest.approx(0.75, abs=0.01)


def test_upload_download_and_back(speech, other_user, models_dir, tmp_path):
    data = wav(vowels(1.5))
    upload(speech, data, "my voice.wav")
    wait_for(speech, "codec", "Tokens", "^75$")
    (tmp_path / "my voice.wav").write_bytes(data)
    codec = mt.load(models_dir / "random-codec")
    tokens = codec.encode(tmp_path / "my voice.wav")
    content = downloaded(speech, "#speech-codec-mtok")
    assert content == tokens.to_bytes()
    assert number(speech, "codec", "Bytes") == f"{len(content)} B"
    sound = mt.read_audio(downloaded(speech, "#speech-codec-wav"))
    assert torch.allclose(sound.samples, codec.decode(tokens).samples, atol=1e-4)
    assert "encode('my voice.wav')" in code(speech, "codec", "python")
    assert "mediatok encode 'my voice.wav'" in code(speech, "codec", "command")

    # The .mtok goes in on another user's page: the same tokens, without an original.
    other_user.tab("Speech")
    wait_for(other_user, "codec", "Tokens", "^100$")
    (tmp_path / "voice.mtok").write_bytes(content)
    other_user.page.locator("#speech-codec-open input, input[accept='.mtok']").last.set_input_files(
        tmp_path / "voice.mtok"
    )
    wait_for(other_user, "codec", "Tokens", "^75$")
    assert number(other_user, "codec", "STOI") == "–"
    assert "original" in other_user.page.locator("#speech-codec-player").inner_text()
    assert number(speech, "codec", "Tokens") == "75"


def test_record_and_transcribe(speech):
    """A recording of the codec's sub-tab is what the others work on, too."""
    page = speech.page
    box = emptied(speech)
    box.get_by_label("Record audio").click()
    box.locator(".record-button").click()
    page.wait_for_timeout(1200)
    box.locator(".stop-button").first.click()
    page.locator("#speech-codec-python").get_by_text("recording.wav").first.wait_for()
    wait_for(speech, "codec", "Tokens", r"^\d+$")
    assert 30 < int(number(speech, "codec", "Tokens")) < 200

    speech.tab("Transcribe")
    wait_for(speech, "transcribe", "Words", r"^\d+$")
    assert "recording.wav" in page.locator("#speech-transcribe-numbers").inner_text()
    words = page.locator("#speech-transcribe-player .mt-word")
    assert words.count() == int(number(speech, "transcribe", "Words")) > 3
    transcript = json.loads(downloaded(speech, "#speech-transcribe-json"))
    assert [word["text"] for word in transcript["words"]] == words.all_inner_texts()
    assert " --> " in downloaded(speech, "#speech-transcribe-srt").decode()

    # The word of the moment is marked, and a click on a word goes there.
    third = transcript["words"][2]
    page.locator("#speech-transcribe-player audio").evaluate(
        "(player, time) => { player.currentTime = time; }", (third["start"] + third["end"]) / 2
    )
    page.locator("#speech-transcribe-player .mt-word.now").wait_for()
    assert [word.evaluate("w => w.classList.contains('now')") for word in words.all()].index(True) == 2
    words.first.click()
    page.wait_for_function("document.querySelector('#speech-transcribe-player audio').currentTime > 0")
    page.locator("#speech-transcribe-player audio").evaluate("player => player.pause()")


def test_hotwords_are_for_models_that_take_them(speech):
    page = speech.page
    speech.tab("Transcribe")
    page.locator("#speech-transcribe-samples button").nth(1).click()
    wait_for(speech, "transcribe", "Audio", "^3.0 s$")
    page.locator("#speech-transcribe-more button").first.click()
    box = page.locator("#speech-transcribe-hotwords textarea")
    speech.choose("#speech-transcribe-model", "random-recogniser (local)")
    page.get_by_text("random-recogniser takes none").wait_for()
    assert box.is_disabled()
    speech.choose("#speech-transcribe-model", "random-listener (local)")
    page.get_by_text("separated by commas").wait_for()
    box.fill("cedar, ember")
    box.press("Enter")
    page.locator("#speech-transcribe-command").get_by_text("--hotwords").first.wait_for()
    box.fill("zebra")
    box.press("Enter")
    speech.toasts.get_by_text("cannot be written").first.wait_for()
    box.fill("")
    speech.forget_toasts()


def test_noise_then_enhance(speech, models_dir):
    page = speech.page
    page.locator("#speech-codec-samples button").first.click()
    wait_for(speech, "codec", "Tokens", "^100$")
    speech.tab("Enhance")
    wait_for(speech, "enhance", "Noise", "^5 dB$")  # samples are clean: noise comes with them
    assert "Press Enhance" in page.locator("#speech-enhance-player").inner_text()
    quiet = speech.page.locator("#speech-enhance-player .spectrum").first.get_attribute("src")
    speech.fill("#speech-enhance-snr", -5, then="Tab")
    page.locator("#speech-enhance-snr input[type=range]").press("ArrowRight")
    wait_for(speech, "enhance", "Noise", "^-4 dB$")
    assert speech.page.locator("#speech-enhance-player .spectrum").first.get_attribute("src") != quiet
    page.locator("#speech-enhance-fresh input").uncheck()
    speech.fill("#speech-enhance-seed", 12)  # Enter
    wait_for(speech, "enhance", "Seed", "^12$")
    assert re.fullmatch(r"\d\.\d\d → \d\.\d\d", number(speech, "enhance", "STOI"))
    wait_for(speech, "enhance", "DNSMOS", r"^(\d\.\d\d → \d\.\d\d|–)$")
    assert heard(speech, "#speech-enhance-player") == pytest.approx([2.0, 2.0])
    noisy = downloaded(speech, "#speech-enhance-noisy")
    clean = mt.read_audio(downloaded(speech, "#speech-enhance-wav"))
    again = mt.load(models_dir / "random-enhancer").enhance(noisy, seed=12)
    assert torch.allclose(clean.samples, again.samples, atol=1e-4)
    assert "seed=12" in code(speech, "enhance", "python")
    assert "--seed 12" in code(speech, "enhance", "command")
    speech.fill("#speech-enhance-seed", -1)
    speech.toasts.get_by_text("Seed must be a whole number").first.wait_for()
    assert number(speech, "enhance", "Seed") == "12"
    speech.forget_toasts()

    page.locator("#speech-enhance-use").click()  # and on to the codec
    speech.tab("Codec")
    page.locator("#speech-codec-python").get_by_text("first_voice-enhanced.wav").first.wait_for()


def test_missing_model_is_said_loaded_and_speaks(speech, models_dir, tmp_path):
    page = speech.page
    speech.tab("Speak")
    notice = page.locator("#speech-speak-missing")
    assert "No model that speaks a text is here" in notice.inner_text()
    assert not page.locator("#speech-speak-run").is_visible()
    notice.get_by_role("button").click()
    page.locator("#models-table").get_by_text("random-codec (local)").wait_for()
    beside.save_voice(tmp_path, models_dir / "random-codec")
    speech.fill("#models-name", tmp_path / "random-voice", then="Tab")
    page.locator("#models-load").click()
    page.locator("#models-table").get_by_text("random-voice").wait_for()

    speech.tab("Speech")
    page.locator("#speech-speak-fresh input").uncheck()
    speech.fill("#speech-speak-seed", 4, then="Tab")
    page.locator("#speech-speak-text textarea").fill("Hello there.")
    page.locator("#speech-speak-text textarea").press("Enter")
    wait_for(speech, "speak", "Seed", "^4$")
    spoken = mt.load(tmp_path / "random-voice").speak("Hello there.", seed=4)
    sound = mt.read_audio(downloaded(speech, "#speech-speak-wav"))
    assert torch.allclose(sound.samples, spoken.samples, atol=1e-4)
    assert "mediatok speak 'Hello there.'" in code(speech, "speak", "command")
    page.locator("#speech-speak-text textarea").fill("5 %")
    page.locator("#speech-speak-run").click()
    speech.toasts.get_by_text("cannot say").first.wait_for()
    speech.forget_toasts()
    page.locator("#speech-speak-use").click()
    speech.tab("Transcribe")
    page.locator("#speech-transcribe-numbers").get_by_text("spoken-4.wav").wait_for()


def test_bad_clip_is_a_message_and_changes_nothing(speech):
    page = speech.page
    page.locator("#speech-codec-samples button").first.click()
    page.locator("#speech-codec-samples [aria-pressed=true]").get_by_text("first voice").wait_for()
    wait_for(speech, "codec", "Tokens", "^100$")
    before = facts(speech)
    for data, reason in (
        (b"ID3 no sound", "no audio file"),
        (wav(vowels(1))[:9000], "announces"),
        (wav(torch.zeros(611 * RATE), "FLAC"), "10 minutes"),
    ):
        upload(speech, data, "talk.wav")
        toast = speech.toasts.filter(has_text=reason).first
        toast.wait_for()
        message = toast.inner_text()
        assert "talk.wav" in message
        assert "Traceback" not in message
        speech.forget_toasts()
    assert facts(speech) == before
    page.locator("#speech-codec-clip").get_by_label("Record audio").wait_for()  # ready for another one


def test_stop_ends_this_users_work_alone(speech, other_user):
    speech.forget_toasts()
    page, before = speech.page, facts(speech)
    upload(speech, wav(torch.zeros(590 * RATE), "FLAC"), "long.flac")
    page.locator("#speech-codec-progress").get_by_text("of 590.0 s").wait_for()
    other_user.tab("Speech")
    other_user.tab("Transcribe")  # waits for the device
    other_user.page.locator("#speech-transcribe-samples button").nth(1).click()
    page.keyboard.press("Escape")
    page.locator("#speech-codec-progress .mt-progress span").wait_for(state="detached", timeout=5000)
    assert facts(speech) == before
    wait_for(other_user, "transcribe", "Audio", "^3.0 s$")
    assert speech.toasts.count() == 0
    assert other_user.toasts.count() == 0


@pytest.mark.parametrize(("width", "height"), [(1440, 900), (390, 844)])
def test_both_sizes_light_and_dark(speech, width, height, tmp_path):
    page = speech.page
    page.locator("#speech-codec-samples button").first.click()
    wait_for(speech, "codec", "Tokens", "^100$")
    page.set_viewport_size({"width": width, "height": height})
    for name in ("Image", "Compare", "Generate", "Speech", "Models", "Help"):
        place = page.get_by_role("tab", name=name, exact=True).bounding_box()
        assert 0 <= place["x"] <= width - place["width"], f"{name} is cut off"
    for scheme, tasks in (("dark", ("Codec",)), ("light", ("Codec", "Enhance", "Transcribe", "Speak"))):
        page.locator("#mt-theme").click()
        for task in tasks:
            speech.tab(task)
            path = tmp_path / f"{task.lower()}-{width}-{scheme}.png"
            page.screenshot(path=path, full_page=width < 760)
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            if width > 760:
                assert page.evaluate("document.documentElement.scrollHeight") <= height
            with Image.open(path) as image:
                brightness = np.asarray(image.convert("L"), dtype=float).mean()
            assert brightness > 150 if scheme == "light" else brightness < 110


def test_endpoints(studio_url, models_dir, tmp_path):
    client = Client(studio_url, verbose=False, download_files=str(tmp_path))
    source = tmp_path / "voice.flac"
    mt.Waveform(vowels(1), RATE).save(source)
    clip, codec = handle_file(source), mt.load(models_dir / "random-codec")
    path, facts = client.predict(clip, str(models_dir / "random-codec"), api_name="/encode_audio")
    tokens = codec.encode(source)
    assert mt.Tokens.load(path).ids.tolist() == tokens.ids.tolist() == [facts["tokens"]]
    assert (facts["num_tokens"], facts["bytes"]) == (50, tokens.num_bytes)
    path, facts = client.predict(handle_file(path), "", api_name="/decode_audio")
    assert torch.allclose(mt.read_audio(path).samples, codec.decode(tokens).samples, atol=1e-4)
    assert facts["stoi"] is None

    enhancer = models_dir / "random-enhancer"
    path, facts = client.predict(clip, str(enhancer), 5, 1.0, False, api_name="/enhance")
    assert facts["seed"] == 5
    assert torch.allclose(mt.read_audio(path).samples, mt.load(enhancer).enhance(source, seed=5).samples, atol=1e-4)
    recogniser = models_dir / "random-listener"
    path, facts = client.predict(clip, str(recogniser), "cedar", api_name="/transcribe")
    assert facts["text"] == mt.load(recogniser).transcribe(source, hotwords=["cedar"]).text
    assert [word for word, _, _ in facts["words"]] == facts["text"].split()
    assert "/speak" not in client.view_api(return_format="dict")["named_endpoints"]  # no model for it at the start

    (tmp_path / "bad.wav").write_bytes(b"RIFF but nothing else")
    for arguments, reason in (
        ((handle_file(tmp_path / "bad.wav"), str(models_dir / "random-codec")), "no audio file"),
        ((clip, "titok-tiny"), "not a speech codec"),
        ((clip, "/etc"), "not a model of this studio"),
    ):
        with pytest.raises(AppError, match=reason) as caught:
            client.predict(*arguments, api_name="/encode_audio")
        assert "Traceback" not in str(caught.value)
