"""The 3D tab's parts without a server: reading what is sent, results, code, numbers, handlers."""

import copy
import importlib.util
import json
import shlex
import shutil
import struct
from pathlib import Path

import mediatok as mt
import numpy as np
import pytest
import torch
import trimesh
from mediatok.app import cli, studio_context, studio_shapes_reader
from mediatok.app import studio_shapes_actions as actions
from mediatok.app import studio_shapes_code as code
from mediatok.app import studio_shapes_views as views
from mediatok.app.studio_context import SHAPES, Studio
from mediatok.app.studio_models import GENERATOR, SHAPE_GENERATOR, SHAPE_TOKENIZER, TOKENIZER, Catalogue
from mediatok.app.studio_shapes import NUM_OUTPUTS, NUM_TAKEN, ShapeEvents, ShapeSession
from mediatok.app.studio_shapes_reader import read_mesh_file
from mediatok.app.studio_worker import Job
from mediatok.core.meshes import read_mesh, write_mesh


def load_beside(name):
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


beside = load_beside("studio_shape_models")
SCALES, CLASSES = beside.SCALES, beside.CLASSES


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    beside.save_shape_models(folder)
    return folder


@pytest.fixture(scope="module")
def catalogue(models):
    return Catalogue(models, device="cpu")


@pytest.fixture
def studio(catalogue, tmp_path, monkeypatch):
    samples = tmp_path / "from"
    samples.mkdir()
    beside.save_samples(samples)
    monkeypatch.setattr(studio_context, "SHAPES", samples)
    return Studio(catalogue, tmp_path)


@pytest.fixture
def subject(tmp_path):
    """The mesh of a file called "my box.obj"."""
    folder = tmp_path / "subject"
    folder.mkdir()
    trimesh.creation.box((1, 2, 0.5)).apply_translation((10, 0, 0)).export(tmp_path / "my box.obj")
    return read_mesh_file(tmp_path / "my box.obj", folder, is_ours=True)


def run_python(text: str) -> None:
    exec(compile(text, "shown", "exec"), {})


def run_commands(text: str) -> None:
    for line in text.splitlines():
        with pytest.raises(SystemExit) as ended:
            cli.main(shlex.split(line)[1:])
        assert not ended.value.code


def same(one, other) -> bool:
    """Whether two meshes are equal, up to how their files round."""
    return np.array_equal(one.faces, other.faces) and np.allclose(one.vertices, other.vertices, atol=1e-5)


# Reading.


@pytest.mark.parametrize("suffix", [".obj", ".stl", ".ply", ".off", ".glb"])
def test_what_is_read_is_what_the_library_reads(suffix, tmp_path):
    source, folder = tmp_path / f"a ball{suffix}", tmp_path / "into"
    folder.mkdir()
    trimesh.creation.icosphere(2, 3.0).apply_translation((7, 0, 0)).export(source)
    found = read_mesh_file(source, folder, is_ours=True)
    truth = read_mesh(source)
    assert (found.name, found.num_faces, found.notes) == (source.name, 320, ())
    assert found.frame[0] == pytest.approx(7)
    assert np.array_equal(found.mesh().vertices, truth.vertices)
    assert np.array_equal(found.mesh().faces, truth.faces)
    assert same(read_mesh(found.view), truth)


def test_own_process_reads_the_same_and_says_what_is_odd(tmp_path):
    ball = trimesh.creation.icosphere(1)
    open_ball = trimesh.Trimesh(ball.vertices, ball.faces[4:], process=False)
    open_ball.export(tmp_path / "open.ply")
    (tmp_path / "into").mkdir()
    found = read_mesh_file(tmp_path / "open.ply", tmp_path / "into")
    assert found.num_faces == 76
    assert any("open edges" in note for note in found.notes)
    assert same(found.mesh(), read_mesh(tmp_path / "open.ply"))


def glb(gltf: dict, data: bytes = b"") -> bytes:
    text = json.dumps(gltf).encode()
    text += b" " * (-len(text) % 4)
    chunks = struct.pack("<I4s", len(text), b"JSON") + text
    chunks += struct.pack("<I4s", len(data), b"BIN\0") + data if data else b""
    return struct.pack("<4sII", b"glTF", 2, 12 + len(chunks)) + chunks


@pytest.mark.parametrize(
    ("data", "name", "reason"),
    [
        (b"", "empty.obj", "empty"),
        (b"PK\x03\x04" + bytes(60), "scan.obj", "ZIP archive"),
        (b"v 0 0 0\nv nan 0 0\nv 0 1 0\nf 1 2 3\n", "nan.obj", "NaN"),
        (b"v 0 0 0\nv 1 0 0\nv 2 0 0\nf 1 2 3\n", "flat.obj", "area"),
        (bytes(80) + struct.pack("<I", 50_000_000) + bytes(100), "huge.stl", "50,000,000"),
        (glb({"asset": {"version": "2.0"}, "buffers": [{"byteLength": 4, "uri": "file:///etc/passwd"}]}), "x.glb", "."),
    ],
)  # fmt: skip
def test_bad_meshes_are_refused_and_leave_nothing(data, name, reason, tmp_path):
    path = tmp_path / name
    path.write_bytes(data)
    session = ShapeSession(tmp_path)
    with pytest.raises(mt.InvalidInput, match=reason):
        ShapeEvents._read(session, path, is_ours=True)
    assert not list((session.folder / "mesh").iterdir())


def test_refusal_and_crash_of_the_process(tmp_path, monkeypatch):
    (tmp_path / "into").mkdir()
    (tmp_path / "no mesh.obj").write_bytes(b"PK\x03\x04" + bytes(60))
    with pytest.raises(mt.InvalidInput, match=r"no mesh\.obj.*ZIP archive"):
        read_mesh_file(tmp_path / "no mesh.obj", tmp_path / "into")
    monkeypatch.setattr(studio_shapes_reader.sys, "executable", shutil.which("false"))
    with pytest.raises(mt.InvalidInput, match="limits of time and memory"):
        read_mesh_file(tmp_path / "no mesh.obj", tmp_path / "into")


def test_too_many_faces_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(studio_shapes_reader, "MAX_FACES", 10)
    trimesh.creation.box().export(tmp_path / "box.glb")
    (tmp_path / "into").mkdir()
    with pytest.raises(mt.LimitExceeded, match="12 faces; at most 10"):
        read_mesh_file(tmp_path / "box.glb", tmp_path / "into", is_ours=True)


# Models.


def test_kinds_of_models_are_apart(catalogue):
    assert [label for label, _ in catalogue.choices(SHAPE_TOKENIZER)][-2:] == [
        "random-shapes (local)", "random-solids (local)"
    ]  # fmt: skip
    assert "random-sculptor (local)" in [label for label, _ in catalogue.choices(SHAPE_GENERATOR)]
    for kind in (TOKENIZER, GENERATOR):
        assert not [label for label, _ in catalogue.choices(kind) if label.startswith("random")]
    with pytest.raises(mt.InvalidInput, match="not a shape tokenizer"):
        catalogue.get("random-sculptor (local)", SHAPE_TOKENIZER)


# What is done.


def test_scales_share_tokens(catalogue, subject):
    source = "random-shapes (local)"
    tokenizer = catalogue.get(source, SHAPE_TOKENIZER)
    seen = []
    coded = actions.code_shape(tokenizer, source, subject, None, 32, Job(), seen.append)
    assert {news.what for news in seen} == {"encoding", "decoding"}
    assert (coded.num_scales, coded.max_scales, coded.done) == (3, 3, "encode + decode")
    assert coded.tokens == tokenizer.encode(subject.mesh())
    assert same(coded.mesh, tokenizer.decode(coded.tokens, resolution=32))
    first = actions.code_shape(tokenizer, source, subject, 2, 64, Job(), None, coded.codes)
    assert (first.num_scales, first.done, int(first.tokens.lengths[0])) == (2, "decode", 5)
    assert first.tokens.num_bytes < coded.tokens.num_bytes
    assert same(first.mesh, tokenizer.decode(coded.tokens, resolution=64, up_to_scale=2))
    with pytest.raises(mt.InvalidInput, match="32, 64, 128"):
        actions.code_shape(tokenizer, source, subject, None, 500, Job())


def test_stop_is_heard(catalogue, subject):
    tokenizer, generator = (
        catalogue.get(f"random-{name} (local)", kind)
        for name, kind in (("shapes", SHAPE_TOKENIZER), ("sculptor", SHAPE_GENERATOR))
    )
    job = Job()
    with pytest.raises(mt.Cancelled):
        actions.code_shape(tokenizer, "", subject, None, 32, job, lambda news: job.stop())
    job, seen = Job(), []

    def stop_at_first(news):
        seen.append(news)
        job.stop()

    with pytest.raises(mt.Cancelled):
        actions.make_shape(generator, "", None, 1, 2.0, 32, job, stop_at_first)
    assert [preview.num_scales for preview in seen] == [1]


def test_quick_figures_agree_with_the_full_ones():
    ball = read_mesh(trimesh.creation.icosphere(3, 5.0))
    assert actions.quick_figures(ball, ball)["F-score at 0.05"] > 0.99
    smaller = ball.copy()
    smaller.vertices = 0.9 * smaller.vertices
    figures = actions.quick_figures(ball, smaller)
    assert figures["Chamfer L1"] == pytest.approx(0.095, abs=0.01)
    assert figures["F-score at 0.05"] < 0.05
    nothing = actions.quick_figures(ball, trimesh.Trimesh())
    assert views.scores(nothing)[0] == "0.000"


def test_generation_shows_every_scale(catalogue):
    source, seen = "random-sculptor (local)", []
    generator = catalogue.get(source, SHAPE_GENERATOR)
    made = actions.make_shape(generator, source, 1, 5, 2.0, 32, Job(), seen.append)
    previews = [news for news in seen if isinstance(news, actions.Preview)]
    assert [(preview.num_scales, preview.total_scales) for preview in previews] == [(1, 3), (2, 3), (3, 3)]
    truth = generator.sample("lamp", seed=5, guidance=2.0, resolution=32)
    assert same(made.mesh, truth.meshes[0])
    assert torch.equal(made.tokens.ids, truth.tokens.ids)
    assert same(previews[0].mesh, generator.tokenizer.decode(made.tokens, resolution=32, up_to_scale=1))
    assert actions.class_choices(generator) == [("any", -1), ("chair", 0), ("lamp", 1), ("none", 2)]
    assert actions.checked_label(generator, -1) is None
    with pytest.raises(mt.InvalidInput, match="no class 3"):
        actions.checked_label(generator, 3)
    for guidance in (-1, 101, None, "2", True, float("nan")):
        with pytest.raises(mt.InvalidInput, match="Guidance must be"):
            actions.checked_guidance(guidance)


# Code.


@pytest.mark.parametrize("num_scales", [None, 2])
def test_shown_code_repeats_the_codec(num_scales, catalogue, models, subject, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = str(models / "random-shapes")
    tokenizer = catalogue.get(source, SHAPE_TOKENIZER)
    coded = actions.code_shape(tokenizer, source, subject, num_scales, 32, Job())
    assert ("--up-to-scale 2" in code.coded_command(coded)) == (num_scales == 2)
    for repeat, shown in ((run_python, code.coded_python(coded)), (run_commands, code.coded_command(coded))):
        repeat(shown)
        assert mt.Tokens.load("my_box.mtok").ids.tolist() == coded.tokens.ids.tolist()
        assert same(read_mesh("my_box-decoded.glb"), read_mesh(coded.mesh))
        for name in ("my_box.mtok", "my_box-decoded.glb"):
            (tmp_path / name).unlink()

    coded.codes.save("a file.mtok")
    opened = actions.tokens_file(mt.Tokens.load("a file.mtok"), "a file.mtok")
    coded = actions.code_shape(tokenizer, source, opened, num_scales, 32, Job())
    for repeat, shown in ((run_python, code.coded_python(coded)), (run_commands, code.coded_command(coded))):
        repeat(shown)
        assert same(read_mesh("a_file-decoded.glb"), read_mesh(coded.mesh))
        (tmp_path / "a_file-decoded.glb").unlink()


@pytest.mark.parametrize(("label", "word"), [(1, "'lamp'"), (None, "None"), (2, "2")])
def test_shown_code_repeats_the_generation(label, word, catalogue, models, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = str(models / "random-sculptor")
    made = actions.make_shape(catalogue.get(source, SHAPE_GENERATOR), source, label, 3, 1.5, 32, Job())
    assert f"sample({word}, seed=3, guidance=1.5" in code.made_python(made)
    run_python(code.made_python(made))
    assert same(read_mesh(f"{code.made_stem(made)}.glb"), read_mesh(made.mesh))
    assert mt.Tokens.load(f"{code.made_stem(made)}.mtok").ids.tolist() == made.tokens.ids.tolist()
    (tmp_path / f"{code.made_stem(made)}.glb").unlink()
    run_commands(code.made_command(made))
    assert same(read_mesh(f"{code.made_stem(made)}.glb"), read_mesh(made.mesh))


# Handlers.


def outputs_of(run, count):
    shown = list(run)
    assert all(len(outputs) == count for outputs in shown)
    return shown


def test_page_follows_the_mesh(studio, tmp_path, recwarn):
    events, session, source = ShapeEvents(studio), ShapeSession(tmp_path), "random-shapes (local)"
    assert len(events.open(session)) == NUM_TAKEN
    assert session.subject.name == "a_box.glb"
    shown = outputs_of(events.follow_codec(session, source, 32), NUM_OUTPUTS["codec"])
    assert "progressbar" in shown[0][0]
    assert shown[-1][2]["files"]["before"]["path"] == str(session.subject.view)
    assert Path(shown[-1][2]["files"]["after"]["path"]).stat().st_size > 1000
    assert len(outputs_of(events.follow_codec(session, source, 32), NUM_OUTPUTS["codec"])) == 1  # shown already
    outputs_of(events.show_scales(session, source, 1, 32), NUM_OUTPUTS["codec"])
    result = session.results["codec"]
    assert (result.num_scales, result.done) == (1, "decode")
    outputs_of(events.run_codec(session, "random-solids (local)", 32), NUM_OUTPUTS["codec"])
    assert (session.results["codec"].max_scales, session.results["codec"].done) == (2, "encode + decode")

    # A .mtok file has no original, and brings its tokenizer along.
    result.codes.save(tmp_path / "box.mtok")
    shown = outputs_of(events.open_tokens(session, str(tmp_path / "box.mtok"), 32), NUM_OUTPUTS["codec"] + 3)
    assert shown[0][0].endswith("random-shapes")
    assert "does not hold the original" in shown[-1][5]["hints"]["before"]
    assert "no original" in shown[-1][4]
    before = dict(session.results)
    torch.save({}, tmp_path / "no.mtok")
    outputs_of(events.open_tokens(session, str(tmp_path / "no.mtok"), 32), NUM_OUTPUTS["codec"] + 3)
    assert session.results == before
    assert [message for message in recwarn if "no.mtok" in str(message.message)]
    folder = session.folder
    session.close()
    assert not folder.exists()


def test_page_generates_and_mistakes_change_nothing(studio, tmp_path, recwarn):
    events, session, source = ShapeEvents(studio), ShapeSession(tmp_path), "random-sculptor (local)"
    chosen, menu, guidance, _ = events.adapt(source, -1, None)
    assert (chosen, guidance) == (source, 2.0)
    assert menu.choices == [("any", -1), ("chair", 0), ("lamp", 1), ("none", 2)]
    run = (session, source, 1, 5, False, 2.0, 32)
    shown = outputs_of(events.run_generate(*run), NUM_OUTPUTS["generate"])
    assert shown[0][8] == 5
    assert "lamp" in shown[-1][1]
    assert session.results["generate"].seed == 5
    before = dict(session.results)
    for wrong in ((9, 5, False, 2.0, 32), (1, -1, False, 2.0, 32), (1, 5, False, 101, 32), (1, 5, False, 2.0, 7)):
        outputs_of(events.run_generate(session, source, *wrong), NUM_OUTPUTS["generate"])
    assert session.results == before
    assert {str(message.message)[:8] for message in recwarn} == {"random-s", "Seed mus", "Guidance", "The reso"}
    assert len(events.use(session)) == NUM_TAKEN
    assert session.subject.name == "lamp-5.glb"
    assert same(session.subject.mesh(), read_mesh(before["generate"].mesh))


def test_empty_results_are_said(catalogue, subject, tmp_path):
    """A shape may have no inside at a coarse scale: no file is offered, and the page says why."""
    tokenizer = copy.deepcopy(catalogue.get("random-shapes (local)", SHAPE_TOKENIZER))
    with torch.no_grad():
        tokenizer.head.last.bias.sub_(1e6)
    coded = actions.code_shape(tokenizer, "", subject, None, 32, Job())
    assert not len(coded.mesh.faces)
    files = ShapeEvents._save(ShapeSession(tmp_path), "codec", coded.mesh, coded.tokens, "a-decoded", "a")
    assert files[:2] == [None, None]
    assert views.coded_viewers(coded, None)["hints"]["after"] == views.NOTHING
    assert "0.000" in views.coded_numbers(coded)


def test_missing_models_are_said_with_a_way_out():
    for kind, recipe in ((SHAPE_TOKENIZER, "vat-tiny.yaml"), (SHAPE_GENERATOR, "vat-gen-tiny.yaml")):
        assert recipe in views.missing(kind, public=False)
        assert "Models tab" in views.missing(kind, public=False)
        assert "Models tab" not in views.missing(kind, public=True)


def test_pages_are_apart(tmp_path, subject):
    one, two = (copy.deepcopy(ShapeSession(tmp_path)) for _ in range(2))
    one.subject = subject
    one.start("codec")
    assert two.subject is None
    assert not two.stop("codec")


def test_shipped_samples_are_small_and_closed():
    samples = sorted(SHAPES.glob("*.glb"))
    assert [path.stem for path in samples] == ["chair", "mug", "table"]
    for path in samples:
        assert path.stat().st_size < 20_000
        assert read_mesh(path).is_watertight


def test_views_escape(subject, tmp_path):
    odd = studio_shapes_reader.MeshFile("<i>.obj", tmp_path, 3, (0, 0, 0, 1), ("open edges: 3",))
    assert views.notes_line(odd) == "<i>.obj: open edges: 3."  # set as text, not as HTML, by the viewers
    write_mesh(trimesh.creation.box(), tmp_path / "box.glb")
    assert views.viewers({"made": tmp_path / "box.glb"})["files"]["made"]["orig_name"] == "box.glb"
