"""Parts of the studio without a server: jobs and device, the model shelf, sessions, access, code, drawings."""

import copy
import dataclasses
import re
import shlex
import threading
import time

import mediatok as mt
import pytest
import torch
from mediatok.app import cli, studio_actions, studio_code, studio_plots, studio_views
from mediatok.app.studio import check_access, launch
from mediatok.app.studio_code import generation_command, generation_python
from mediatok.app.studio_gallery import waiting_grid
from mediatok.app.studio_generate import Numbers
from mediatok.app.studio_generation import Gallery, Made, Recipe, make_pictures
from mediatok.app.studio_models import Catalogue
from mediatok.app.studio_session import Session
from mediatok.app.studio_worker import Device, Job, ModelShelf, newest
from mediatok.evaluation.rate import RatePoint
from PIL import Image, ImageChops


def test_device_serves_in_order():
    device, order = Device(), []

    def work(name):
        with device.hold(Job()):
            order.append(name)

    with device.hold(Job()):
        threads = []
        for name in range(4):
            threads.append(threading.Thread(target=work, args=[name]))
            threads[-1].start()
            while device.num_jobs < name + 2:
                time.sleep(0.001)
    for thread in threads:
        thread.join(10)
    assert order == [0, 1, 2, 3]
    assert device.num_jobs == 0


def test_stop_frees_a_waiting_job_and_leaves_others():
    device, waiting, outcome = Device(), Job(), []

    def work():
        try:
            with device.hold(waiting):
                outcome.append("ran")
        except mt.Cancelled:
            outcome.append("cancelled")

    with device.hold(Job()) as running:
        thread = threading.Thread(target=work)
        thread.start()
        while device.num_jobs < 2:
            time.sleep(0.001)
        waiting.stop()
        thread.join(10)
        running.check()  # not stopped
    assert outcome == ["cancelled"]
    with device.hold(Job()):
        pass


def test_full_queue_is_refused():
    device = Device(max_waiting=0)
    with device.hold(Job()), pytest.raises(mt.LimitExceeded, match="busy"), device.hold(Job()):
        pass


def test_failed_job_frees_the_device():
    device = Device()
    with pytest.raises(RuntimeError), device.hold(Job()):
        raise RuntimeError
    assert device.num_jobs == 0


def test_on_step_raises_when_stopped():
    job = Job()
    job.on_step(1, 2)
    job.stop()
    with pytest.raises(mt.Cancelled):
        job.on_step(2, 2, preview=None)


def test_newest_skips_what_nobody_waited_for_and_gives_the_result_last():
    seen = threading.Event()

    def work(emit):
        emit(1)
        seen.wait(10)
        for number in range(2, 50):
            emit(number)
        return "result"

    stream = newest(work)
    assert next(stream) == 1
    seen.set()
    time.sleep(0.2)
    assert list(stream) == [49, "result"]


def test_newest_raises_what_the_work_raises():
    def work(emit):
        raise mt.InvalidInput("no")

    with pytest.raises(mt.InvalidInput, match="no"):
        list(newest(work))


def test_stopped_run_keeps_finished_batches():
    generator, job, seen = mt.load("xar-tiny"), Job(), []

    def emit(progress):
        seen.append(progress)
        if len(progress.gallery.pictures) == 4:
            job.stop()

    gallery = make_pictures(generator, "xar-tiny", ["flags"] * 9, 1, 2, 3.0, job, emit)
    assert (len(gallery.pictures), gallery.asked) == (4, 9)
    assert [picture.recipe.seed for picture in gallery.pictures] == [1, 2, 3, 4]
    assert any(progress.previews is not None for progress in seen)
    shares = [progress.share for progress in seen]
    assert shares == sorted(shares)


def test_commands_of_an_edit(tmp_path, monkeypatch):
    generator = mt.load("maskgit-tiny")
    first = make_pictures(generator, "maskgit-tiny", ["flags"], 1, 3, 2.0, Job()).pictures[0]
    keep = (0, 1, 2, 9)
    gallery = make_pictures(generator, "maskgit-tiny", ["flags", "flags"], 5, 4, 2.5, Job(), None, first, keep)
    assert [picture.content[0, list(keep)].tolist() for picture in gallery.pictures] == [
        first.content[0, list(keep)].tolist()
    ] * 2
    monkeypatch.chdir(tmp_path)
    for line in generation_command(gallery).splitlines():
        with pytest.raises(SystemExit) as ended:
            cli.main(shlex.split(line)[1:])
        assert not ended.value.code
    for picture in gallery.pictures:
        made = mt.read_image(tmp_path / "generated" / f"flags-{picture.recipe.seed}.png")
        assert made.tobytes() == picture.image.tobytes()


@pytest.mark.parametrize("name", ["xar-tiny", "maskgit-tiny"])
def test_shown_code_makes_the_same_pictures(name, tmp_path, monkeypatch):
    """The Python and the commands run as they are shown, and write what the tab shows."""
    wanted = ["flags", "flags", "smileys & emotion", None]
    gallery = make_pictures(mt.load(name), name, wanted, 5, 3, 2.0, Job())
    assert "['flags'] * 2 + ['smileys & emotion'] + [None]" in generation_python(gallery)
    monkeypatch.chdir(tmp_path)
    exec(compile(generation_python(gallery), "shown", "exec"), {})
    for line in generation_command(gallery).splitlines():
        with pytest.raises(SystemExit) as ended:
            cli.main(shlex.split(line)[1:])
        assert not ended.value.code
    for picture, word in zip(gallery.pictures, ("flags", "flags", "smileys-emotion", "none"), strict=True):
        seed = picture.recipe.seed
        assert mt.read_image(tmp_path / f"{seed}.png").tobytes() == picture.image.tobytes()
        by_command = mt.read_image(tmp_path / "generated" / f"{word}-{seed}.png")  # in batches of other sizes
        difference = ImageChops.difference(by_command, picture.image)
        assert max(high for _, high in difference.getextrema()) <= 2


def test_labels_in_code_are_names_where_these_are_clear():
    names = ("tiger", "hot dog", "it's", "7", "none", "-x", "", "twice", "Twice")
    gallery = Gallery("a", "a", names, "1", 1.0, "CPU", 4, None, len(names) + 1)
    made = [Made(None, torch.zeros(1, 4), Recipe(number, 3, 1, 1.0), 0.1) for number in (*range(len(names)), None)]
    gallery = dataclasses.replace(gallery, pictures=tuple(made))
    assert """sample(['tiger', 'hot dog', "it's", 3, 4, 5, 6, 7, 8, None], seed=3""" in generation_python(gallery)
    words = shlex.split(generation_command(gallery))
    assert words[3 : words.index("--seed")] == ["tiger", "hot dog", "it's", "3", "4", "5", "6", "7", "8", "none"]


def test_number_fields_are_checked():
    sound = Numbers(2, 7, False, 20.0, 4.5)
    assert sound.checked() == (2, 7, 20, 4.5)
    nan, infinite = float("nan"), float("inf")
    for field, values in (
        ("count", (0, 17, 1.5, None, "2", True)),
        ("seed", (-1, 2**53, 1e30, 0.5, nan, infinite, None)),
        ("steps", (0, 1001, 2.5, nan, None, [3])),
        ("guidance", (-0.1, 101, nan, infinite, None, "3")),
    ):
        for value in values:
            with pytest.raises(mt.InvalidInput, match=r"must be a (whole )?number from \d to "):
                dataclasses.replace(sound, **{field: value}).checked()
    drawn = dataclasses.replace(sound, seed=None, fresh=True)  # the field is not read then
    assert drawn.checked()[1] != drawn.checked()[1]


def test_gallery_grid_wastes_no_place():
    sizes = {
        count: re.search(r"--columns:(\d+);--rows:(\d+)", waiting_grid(count, 1)) for count in (1, 2, 4, 8, 16, 32)
    }
    assert {count: (int(found[1]), int(found[2])) for count, found in sizes.items()} == {
        1: (1, 1), 2: (2, 1), 4: (2, 2), 8: (4, 2), 16: (4, 4), 32: (7, 5)
    }  # fmt: skip


def test_shelf_keeps_what_fits():
    loads = []

    def load(name):
        loads.append(name)
        return torch.nn.Linear(256, 256, bias=False)  # 256 KiB

    shelf = ModelShelf(load, max_bytes=600 * 1024)
    for name in ("a", "b", "a", "c"):
        shelf.get(name)
    assert loads == ["a", "b", "c"]
    assert list(shelf.loaded()) == ["a", "c"]  # b was the least recently used
    assert shelf.unload("a")
    assert not shelf.unload("a")
    assert shelf.used_bytes == 256 * 1024


def test_shelf_loads_once_for_many_users():
    loads = []

    def load(name):
        loads.append(name)
        time.sleep(0.05)
        return torch.nn.Linear(2, 2)

    shelf = ModelShelf(load, max_bytes=2**20)
    threads = [threading.Thread(target=shelf.get, args=["a"]) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert loads == ["a"]


def test_shelf_failed_load_can_be_tried_again():
    def load(name):
        raise mt.ModelNotFound(name)

    shelf = ModelShelf(load, max_bytes=1)
    for _ in range(2):
        with pytest.raises(mt.ModelNotFound):
            shelf.get("a")


def test_sessions_are_apart_and_leave_nothing(tmp_path):
    prototype = Session(tmp_path, tmp_path / "sample.png")
    one, two = copy.deepcopy(prototype), copy.deepcopy(prototype)
    assert one.folder != two.folder
    (one.folder / "file").write_text("x")
    mine, yours = one.start("image"), two.start("image")
    newer = one.start("image")
    assert mine.is_stopped  # a newer job of the same tab replaces it
    assert one.stop("image")
    assert newer.is_stopped
    assert not yours.is_stopped
    one.close()
    assert [path.name for path in tmp_path.iterdir()] == [two.folder.name]


def test_session_goes_back_to_a_sound_picture(tmp_path):
    session = Session(tmp_path, tmp_path / "sample.png")
    for name in ("bad", "worse"):  # two bad ones, the second before the first is known to be bad
        session.pictures["image"] = tmp_path / name
    assert [session.revert("image"), session.revert("image")] == [tmp_path / "sample.png"] * 2
    assert session.picture == tmp_path / "sample.png"
    session.accept("image", tmp_path / "good.png")
    assert session.revert("image") == tmp_path / "good.png"


def test_new_result_stops_what_looked_at_the_old_one(tmp_path):
    session = Session(tmp_path, tmp_path / "sample.png")
    effect, other_tab = session.start("image", "effect"), session.start("compare")
    session.start("image", "curves")
    assert not effect.is_stopped
    session.start("image")
    assert effect.is_stopped
    assert not other_tab.is_stopped


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.5", "::"])
def test_other_machines_need_a_password_or_an_explicit_no(host):
    with pytest.raises(mt.InvalidInput, match="--no-auth"):
        check_access(host, None, False)
    assert check_access(host, None, True) is None
    assert check_access(host, "me:secret:word", False) == ("me", "secret:word")


def test_access_on_this_machine_is_free():
    assert check_access("127.0.0.1", None, False) is None
    for broken in ("me", "me:", ":secret"):
        with pytest.raises(mt.InvalidInput):
            check_access("127.0.0.1", broken, False)


def test_launch_refuses_before_it_starts(tmp_path):
    for options in ({"port": 0}, {"max_upload_mb": 0}, {"models_dir": tmp_path / "none"}, {"host": "0.0.0.0"}):
        with pytest.raises(mt.MediatokError):
            launch(**options)


def test_catalogue_gives_only_what_it_lists(models_dir):
    catalogue = Catalogue(models_dir, device="cpu")
    model = catalogue.get("random-piece (local)")
    assert model is catalogue.get(str(models_dir / "random-piece"))
    assert catalogue.source_of("random-piece") == str(models_dir / "random-piece")
    for name in ("/etc", "..", str(models_dir), "titok-l32", "owner/name", ""):
        with pytest.raises(mt.ModelNotFound):
            catalogue.get(name)
    with pytest.raises(mt.InvalidInput):
        catalogue.load_by_name("  ")


@pytest.fixture(scope="module")
def result(models_dir):
    model = mt.load(models_dir / "random-piece")
    picture = Image.linear_gradient("L").resize((80, 80)).convert("RGB")
    budget = studio_actions.Budget("tokens", 12)
    return model, studio_actions.encode_picture(model, "one", picture, "my photo.png", budget, Job())


def test_encode_change_and_undo(result):
    model, first = result
    assert len(first.ids()) == 12
    assert first.bits_per_pixel == pytest.approx(8 * first.tokens.num_bytes / 64**2)
    code = (first.ids()[5] + 1) % 1024
    edited = studio_actions.change_token(model, first, 5, code, Job())
    assert edited.ids()[5] == code
    assert edited.edits == {5: code}
    assert first.ids()[5] != code  # results never change
    back = studio_actions.change_token(model, edited, 5, first.ids()[5], Job())
    assert back.edits == {}
    assert back.psnr == first.psnr
    for position, wrong in ((12, 0), (-1, 0), (0, 1024), (0, -1)):
        with pytest.raises(mt.InvalidInput):
            studio_actions.change_token(model, first, position, wrong, Job())


def test_token_effect_is_a_picture_of_change(result):
    model, first = result
    assert studio_actions.token_effect(model, first, 0, Job()).size == first.image.size
    stopped = Job()
    stopped.stop()
    with pytest.raises(mt.Cancelled):
        studio_actions.token_effect(model, first, 0, stopped)


def test_budget_refuses_nonsense(result):
    model, _ = result
    for kind, amount in (("tokens", 0), ("bytes", float("nan")), ("quality", None), ("weight", 3)):
        with pytest.raises(mt.InvalidInput):
            studio_actions.Budget(kind, amount).options(model)


def test_code_repeats_the_action(result, tmp_path, monkeypatch):
    """The Python that the page shows runs, and gives the tokens that the page shows."""
    model, first = result
    edited = studio_actions.change_token(model, first, 2, 7, Job())
    monkeypatch.chdir(tmp_path)
    Image.linear_gradient("L").resize((80, 80)).convert("RGB").save("my photo.png")
    code = studio_code.python_code(edited)
    monkeypatch.setattr(mt, "load", lambda name: model)
    exec(compile(code, "shown", "exec"), {})
    assert mt.Tokens.load("my_photo.mtok").ids[0].tolist() == edited.ids()
    command = studio_code.command_code(first)
    assert "mediatok encode 'my photo.png' --model one --num-tokens 12 --out my_photo.mtok" in command


def test_colours_are_stable_and_spread():
    assert [studio_views.hue(code) for code in (0, 1, 2)] == [0, 222, 84]
    assert len({studio_views.hue(code) // 30 for code in range(24)}) >= 11


def test_html_is_escaped(result):
    _, first = result
    evil = studio_actions.replace(first, model_name="<img src=x onerror=alert(1)>", device="<b>")
    page = studio_views.numbers(evil) + studio_views.compare_table([evil, evil], ["<script>"])
    assert "<img" not in page
    assert "<b>" not in page
    assert "<script>" not in page


def test_plot_marks_the_point_and_survives_extremes():
    points = [RatePoint(60, 0.1, 18.0, 8, "8 tokens"), RatePoint(120, 0.2, 24.0, 16, "16 tokens")]
    svg = studio_plots.rate_plot({"tiny": points, "JPEG": [RatePoint(700, 1, float("inf"))]}, "tiny", (60, 18.0))
    assert svg.count('class="mark"') == 2  # one a width
    assert "inf" not in svg.replace("info", "")
    assert "measuring" in studio_plots.rate_plot({}, "tiny", None, "measuring")


def test_sizes_and_times_read_well():
    assert studio_views.file_size(84) == "84 B"
    assert studio_views.file_size(5 * 2**20) == "5.0 MiB"
    assert studio_views.seconds(0.0421) == "42 ms"
    assert studio_views.decibels(float("inf")) == "exact"
