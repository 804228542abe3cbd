"""encode, decode, reconstruct, evaluate, rate, generate and info of meshes."""

import json
from dataclasses import replace
from functools import partial

import mediatok as mt
import numpy as np
import pytest
import trimesh
from mediatok.app import cli_codec, cli_media, cli_shapes
from mediatok.core import isosurface, meshes, registry
from mediatok.core.meshes import normalise, read_mesh, write_mesh
from mediatok.evaluation import shapes
from mediatok.evaluation.shape_distances import SurfacePoints, surface_figures
from mediatok.generators.maskgit import MaskGIT
from mediatok.generators.next_scale import NextScale
from PIL import Image

SMALL = ("--resolution", "16")


def names(folder, pattern="*"):
    return {str(path.relative_to(folder)) for path in folder.rglob(pattern) if path.is_file()}


def records(result):
    assert result.code == 0, result.err
    return json.loads(result.out)["results"]


def check_refused(result, *words):
    assert result.code == 2
    assert len(result.error_lines) == 1, result.err
    assert result.error_lines[0].startswith("error: ")
    for word in words:
        assert word in result.error_lines[0]
    assert result.out == ""


def file_of(mesh, folder, suffix):
    """The bytes of a mesh as the library writes it."""
    write_mesh(mesh, folder / f"expected{suffix}")
    return (folder / f"expected{suffix}").read_bytes()


def test_what_is_said_here_without_loading_is_so():
    assert cli_media.MESHES.suffixes == meshes.MESH_SUFFIXES
    assert cli_media.MESHES.outputs == meshes.WRITABLE_SUFFIXES
    (resolution,) = cli_shapes.Resolution.__metadata__
    assert (resolution.min, resolution.max) == (2, isosurface.MAX_RESOLUTION)
    assert cli_codec.choose_model(None, cli_media.MESHES, {}) == cli_shapes.DEFAULT_MODEL
    for medium in cli_media.MEDIA:
        suffixes = set(medium.suffixes + medium.foreign)
        assert not any(suffixes & set(other.suffixes + other.foreign) for other in cli_media.MEDIA if other != medium)


def test_encode_then_decode_one_file(run, solids):
    result = run("encode", solids / "a.obj")
    assert result.code == 0
    assert result.error_lines == []
    assert "12 faces  14 tokens in 3 scales" in result.out
    tokens = mt.Tokens.load(solids / "a.mtok")
    assert tokens == mt.load("vat-tiny").encode(solids / "a.obj")
    assert (tokens.modality, tokens.tokenizer) == ("shape", "vat-tiny")
    result = run("decode", solids / "a.mtok", *SMALL)
    assert result.code == 0
    assert result.error_lines == []
    back = read_mesh(solids / "a.decoded.glb")
    frame = tokens.frames[0]
    assert np.abs((back.vertices - (frame.x, frame.y, frame.z)) / frame.scale).max() <= 1 + 1e-6
    assert frame.x == 10


@pytest.mark.parametrize("suffix", [".glb", ".obj", ".stl", ".ply"])
def test_files_equal_those_of_the_library(run, solids, tmp_path, suffix):
    assert run("encode", solids, "--out", "tokens").code == 0
    tokenizer = mt.load("vat-tiny")
    for name in ("a.obj", "b.stl", "more/c.ply"):
        path = (tmp_path / "tokens" / name).with_suffix(".mtok")
        tokens = tokenizer.encode(solids / name)
        assert path.read_bytes() == tokens.to_bytes()
        assert run("decode", path, "--out", f"back{suffix}", *SMALL).code == 0
        expected = tokenizer.decode(tokens, resolution=16)
        assert (tmp_path / f"back{suffix}").read_bytes() == file_of(expected, tmp_path, suffix)


def test_folder_keeps_its_structure(run, solids, tmp_path):
    assert run("encode", solids).code == 0
    assert names(tmp_path, "*.mtok") == {"solids-tokens/a.mtok", "solids-tokens/b.mtok", "solids-tokens/more/c.mtok"}
    result = run("decode", "solids-tokens", "--out", "back", *SMALL)
    assert result.code == 0
    assert names(tmp_path / "back") == {"a.glb", "b.glb", "more/c.glb"}
    assert "decoded 3 meshes with vat-tiny: " in result.out
    assert run("reconstruct", solids, *SMALL).code == 0
    assert names(tmp_path / "solids-reconstructed") == {"a.glb", "b.glb", "more/c.glb"}


def test_reconstruct_tells_how_near_it_comes(run, solids, tmp_path):
    result = run("reconstruct", solids / "a.obj", *SMALL)
    assert result.code == 0
    assert "F-score at 0.05" in result.out
    (record,) = records(run("reconstruct", solids / "a.obj", *SMALL, "--json"))
    tokenizer = mt.load("vat-tiny")
    expected = tokenizer.reconstruct(solids / "a.obj", resolution=16)
    assert (solids / "a.reconstructed.glb").read_bytes() == file_of(expected, tmp_path, ".glb")
    boxed, frame = normalise(read_mesh(solids / "a.obj"))
    expected.vertices = (expected.vertices - (frame.x, frame.y, frame.z)) / frame.scale
    figures = surface_figures(*(SurfacePoints.of(mesh, 10_000, seed) for mesh, seed in ((boxed, 7), (expected, 8))))
    assert record["chamfer_l1"] == pytest.approx(figures["Chamfer L1"], rel=0.05)
    assert record["f_score"] == pytest.approx(figures["F-score at 0.05"], abs=0.02)
    assert record["faces"] == len(expected.faces)
    assert records(run("reconstruct", solids / "a.obj", *SMALL, "--json")) == [record]


def test_own_results_are_not_read_again(run, solids):
    run("encode", solids / "a.obj")
    run("decode", solids / "a.mtok", *SMALL)
    run("reconstruct", solids / "a.obj", *SMALL)
    assert names(solids, "a.*") == {"a.obj", "a.mtok", "a.decoded.glb", "a.reconstructed.glb"}
    assert len(records(run("encode", solids, "--json"))) == 3


def test_first_scales_alone(run, solids, tmp_path):
    tokens = mt.load("vat-tiny").encode(solids / "a.obj")
    expected = mt.load("vat-tiny").decode(tokens, resolution=16, up_to_scale=2)
    (record,) = records(run("encode", solids / "a.obj", "--up-to-scale", "2", "--out", "short.mtok", "--json"))
    assert (record["scales"], record["tokens"]) == (2, 5)
    assert mt.Tokens.load("short.mtok") == tokens.up_to_scale(2)
    tokens.save("whole.mtok")
    assert run("decode", "short.mtok", *SMALL, "--out", "short.ply").code == 0
    assert run("decode", "whole.mtok", *SMALL, "--out", "whole.ply", "--up-to-scale", "2").code == 0
    assert run("reconstruct", solids / "a.obj", *SMALL, "--out", "both.ply", "--up-to-scale", "2").code == 0
    for name in ("short.ply", "whole.ply", "both.ply"):
        assert (tmp_path / name).read_bytes() == file_of(expected, tmp_path, ".ply")
    before = names(tmp_path)
    for command, path in (("encode", solids / "a.obj"), ("reconstruct", solids / "a.obj"), ("decode", "whole.mtok")):
        check_refused(run(command, path, "--up-to-scale", "4"), "--up-to-scale 4", "3 scales of vat-tiny")
        check_refused(run(command, path, "--up-to-scale", "0"), "--up-to-scale")
    assert names(tmp_path) == before


def test_seed_and_resolution(run, solids, tmp_path):
    tokenizer = mt.load("vat-tiny")
    assert run("encode", solids / "b.stl", "--seed", "3", "--out", "3.mtok").code == 0
    assert mt.Tokens.load("3.mtok") == tokenizer.encode(solids / "b.stl", seed=3) != tokenizer.encode(solids / "b.stl")
    assert run("encode", solids / "b.stl", "--seed", "0", "--out", "0.mtok").code == 0
    assert mt.Tokens.load("0.mtok") == tokenizer.encode(solids / "b.stl")
    coarse, fine = (records(run("decode", "0.mtok", "--resolution", n, "--json"))[0] for n in (16, 32))
    assert fine["faces"] > 3 * coarse["faces"]
    before = names(tmp_path)
    for value in ("1", "513", "many"):
        check_refused(run("decode", "0.mtok", "--resolution", value), "--resolution")
    check_refused(run("encode", solids / "a.obj", "--seed", "-1"), "--seed")
    assert names(tmp_path) == before


def test_file_with_several_meshes(run, solids, tmp_path):
    mt.load("vat-tiny").encode([solids / "a.obj", solids / "b.stl"]).save("both.mtok")
    assert run("decode", "both.mtok", *SMALL).code == 0
    assert names(tmp_path, "both.*") == {"both.mtok", "both.decoded-1.glb", "both.decoded-2.glb"}
    mt.load("vat-tiny").encode([solids / "a.obj"]).save("list.mtok")
    assert run("decode", "list.mtok", *SMALL, "--out", "one.stl").code == 0


def test_all_media_decode_in_one_call(run, solids, photos, sounds):
    for path in (photos / "a.png", sounds / "a.wav", solids / "a.obj"):
        assert run("encode", path, "--out", f"t/{path.name}.mtok").code == 0
    result = run("decode", "t")
    assert result.code == 0
    assert names(solids.parent / "t-decoded") == {"a.png.png", "a.wav.wav", "a.obj.glb"}
    for words in ("bits/pixel", "bits/s", "faces"):
        assert words in result.out
    for name, out in (("a.png", "x.glb"), ("a.wav", "x.glb"), ("a.obj", "x.png"), ("a.obj", "x.off")):
        check_refused(run("decode", f"t/{name}.mtok", "--out", out), out)
    check_refused(run("decode", "t/a.obj.mtok", "--text", "a chair"), "--text cannot be used with meshes")
    for name in ("a.png", "a.wav"):
        check_refused(run("decode", f"t/{name}.mtok", *SMALL), "--resolution cannot be used with")
    check_refused(run("decode", "t/a.obj.mtok", "--model", "titok-tiny"), "titok-tiny is not a shape tokenizer")


def test_the_model_chooses_what_a_folder_means(run, solids, photos):
    (photos / "a.png").rename(solids / "texture.png")
    check_refused(run("encode", solids), "pictures and meshes; give them in two calls", "--model")
    assert len(records(run("encode", solids, "--model", "vat-tiny", "--json"))) == 3
    assert len(records(run("encode", solids, "--model", "titok-tiny", "--json"))) == 1


def test_other_media_are_refused(run, solids, photos, sounds):
    cases = {
        ("encode", photos / "a.png", "--model", "vat-tiny"): "this is a picture, and vat-tiny reads meshes",
        ("encode", sounds / "a.wav", "--model", "vat-tiny"): "this is audio, and vat-tiny reads meshes",
        ("encode", solids / "a.obj", "--model", "titok-tiny"): "this is a mesh, and titok-tiny reads pictures",
        ("evaluate", solids / "a.obj", "--model", "simcodec-tiny"): "this is a mesh, and simcodec-tiny reads audio",
        ("rate", solids / "a.obj", photos / "a.png", sounds / "a.wav"): "pictures, audio files and meshes; give them",
        ("encode", solids / "a.obj", "--model", "vat-gen-tiny"): "`mediatok generate` makes shapes with it",
        ("enhance", solids / "a.obj"): "this is a mesh",
        ("generate", "vat-tiny"): "vat-tiny is a tokenizer, and this takes a generator that makes shapes",
        ("generate", "vat-gen-tiny", "--tokenizer", "titok-tiny"): "titok-tiny is not a shape tokenizer",
        ("evaluate-generator", "vat-gen-tiny", "--train", photos, "--val", photos): "pictures alone",
    }
    before = names(photos.parent)
    for arguments, words in cases.items():
        check_refused(run(*arguments), words)
    assert names(photos.parent) == before


@pytest.mark.parametrize("command", ["encode", "reconstruct", "evaluate", "rate"])
def test_options_of_other_media_are_refused(run, solids, photos, sounds, command):
    before = names(solids.parent)
    others = [("--num-tokens", "3"), ("--target-psnr", "20"), ("--max-bytes", "99"), ("--tile",), ("--text", "a"),
              ("--lengths", "1,2"), ("--dnsmos",), ("--split", "val"), ("--recogniser", "x")]  # fmt: skip
    for option in others:
        check_refused(run(command, solids / "a.obj", *option), option[0])
    for path in (photos / "a.png", sounds / "a.wav"):
        for option in (("--seed", "0"), SMALL):
            check_refused(run(command, path, *option), option[0].strip("-"))
    assert names(solids.parent) == before


def test_models_that_do_not_ship_are_named_with_the_way_to_them(run, solids, monkeypatch, shipped):
    run("encode", solids / "a.obj", "--out", "a.mtok")
    for name in ("vat-tiny", "vat-gen-tiny"):
        monkeypatch.delitem(registry.ENTRIES, name)
    before = names(solids.parent)
    for command in ("encode", "reconstruct", "evaluate", "rate"):
        check_refused(run(command, solids / "a.obj"), "vat-tiny", "mediatok train vat-tiny", "--model FOLDER")
    check_refused(run("generate", "vat-gen-tiny"), "mediatok train vat-gen-tiny", "folder")
    check_refused(run("decode", "a.mtok"), "'vat-tiny' is not a known model; give its folder with --model")
    assert names(solids.parent) == before
    assert run("decode", "a.mtok", *SMALL, "--model", shipped / "vat-tiny").code == 0


BAD = {
    "empty.obj": b"",
    "text.ply": b"this is no mesh",
    "nan.obj": b"v 0 0 nan\nv 1 0 0\nv 0 1 0\nf 1 2 3\n",
    "points.obj": b"v 0 0 0\nv 1 0 0\nv 0 1 0\n",
    "line.obj": b"v 0 0 0\nv 1 0 0\nv 2 0 0\nf 1 2 3\n",
    "beyond.off": b"OFF\n3 1 0\n0 0 0\n1 0 0\n0 1 0\n3 0 1 7\n",
    "lying.stl": bytes(80) + (50_000_000).to_bytes(4, "little") + bytes(50),
    "far.obj": b"v 1000000033 0 0\nv 1000000033 0 1\nv 1000000033 1 0\nf 1 2 3\n",
    "archive.glb": b"PK\x03\x04" + bytes(60),
    "json.gltf": b'{"asset": {"version": "2.0"}, "buffers": [{"uri": "/etc/passwd"}]}',
}


@pytest.mark.parametrize("command", ["encode", "reconstruct", "evaluate", "rate"])
def test_one_bad_mesh(run, tmp_path, command):
    for name, data in BAD.items():
        (tmp_path / name).write_bytes(data)
    before = names(tmp_path)
    for name in (*BAD, "missing.obj"):
        check_refused(run(command, name), name)
    assert names(tmp_path) == before


@pytest.mark.parametrize("command", ["encode", "reconstruct"])
def test_folder_goes_on_past_bad_files(run, solids, command):
    for name, data in BAD.items():
        (solids / name).write_bytes(data)
    result = run(command, solids, "--out", "out", *(SMALL if command == "reconstruct" else ()))
    assert result.code == 2
    assert len(names(solids.parent / "out")) == 3
    in_folder = [name for name in BAD if not name.endswith(".gltf")]  # which is nothing to look for
    assert result.error_lines[-1] == f"{len(in_folder)} of {len(in_folder) + 3} inputs failed"
    for name in in_folder:
        assert any(name in line for line in result.error_lines)


@pytest.mark.parametrize("change", [lambda data: b"", lambda data: data[:-1], lambda data: data[:9] + b"x" + data[10:]])
def test_bad_token_files(run, solids, tmp_path, change):
    run("encode", solids / "a.obj", "--out", "a.mtok")
    (tmp_path / "a.mtok").write_bytes(change((tmp_path / "a.mtok").read_bytes()))
    before = names(tmp_path)
    check_refused(run("decode", "a.mtok"), "a.mtok")
    check_refused(run("info", "a.mtok"), "a.mtok")
    assert names(tmp_path) == before


def test_token_files_that_do_not_say_their_scales(run, solids, tmp_path):
    tokens = replace(mt.load("vat-tiny").encode(solids / "a.obj"), scales=())
    tokens.save("a.mtok")
    assert run("decode", "a.mtok", *SMALL).code == 0
    assert run("info", "a.mtok").code == 0
    check_refused(run("decode", "a.mtok", "--up-to-scale", "1"), "--up-to-scale")
    tokens[:, :3].save("b.mtok")
    check_refused(run("decode", "b.mtok"), "end at 1, 5, 14")


@pytest.fixture
def hollow(shipped, tmp_path):
    """A tokenizer that sees nothing inside anything, and a generator over it."""
    vat = mt.load(shipped / "vat-tiny")
    vat.head.last.bias.data.fill_(-1e6)
    vat.save_pretrained(tmp_path / "hollow")
    config = {key: value for key, value in mt.load("vat-gen-tiny").config.items() if not key.startswith("_")}
    changes = {"tokenizer": str(tmp_path / "hollow"), "num_classes": 0, "label_names": ()}
    NextScale(**config | changes).save_pretrained(tmp_path / "hollow-gen")
    return tmp_path


def test_empty_shapes_are_refused(run, hollow, solids):
    run("encode", solids / "a.obj", "--model", "hollow", "--out", "a.mtok")
    before = names(hollow)
    check_refused(run("decode", "a.mtok", "--model", "hollow", *SMALL), "a.mtok", "empty", "--resolution 16")
    check_refused(run("reconstruct", solids / "a.obj", "--model", "hollow", *SMALL), "a.obj", "empty")
    result = run("generate", "hollow-gen", "-n", 2, "--seed", 4, *SMALL)
    assert result.code == 2
    assert "generated/none-4.glb, generated/none-5.glb: this shape came out empty" in result.error_lines[0]
    assert names(hollow) == before


# Figures.


def test_evaluate(run, solids, tmp_path, monkeypatch):
    monkeypatch.setattr(shapes, "evaluate_shapes", partial(shapes.evaluate_shapes, num_points=2000))
    result = run("evaluate", solids, *SMALL, "--out", "first.json")
    assert result.code == 0
    for words in ("IoU (uniform)", "Chamfer L1", "F-score at 0.02", "bytes (.mtok file)", "vat-tiny"):
        assert words in result.out
    report = json.loads((tmp_path / "first.json").read_text())
    assert report["protocol"]["num_items"] == 3
    assert "16 cells" in report["protocol"]["postprocessing"]
    (solids / "bad.obj").write_bytes(b"")
    result = run("evaluate", solids, *SMALL, "--against", "first.json")
    assert result.code == 2
    assert "difference" in result.out
    assert "bad.obj" in result.error_lines[0]
    check_refused(run("evaluate", solids / "a.obj", *SMALL, "--against", "first.json"), "measured differently")


def test_rate(run, solids, tmp_path):
    (solids / "more/c.ply").unlink()
    result = run("rate", solids, *SMALL)
    assert result.code == 0
    assert "vat-tiny: 2 meshes" in result.out
    assert "decimated mesh" in result.out
    with Image.open(tmp_path / "solids-rate.png") as plot:
        plot.load()
    table = json.loads(run("rate", solids / "b.stl", *SMALL, "--json", "--out", "b.png").out)
    assert (table["model"], table["meshes"]) == ("vat-tiny", 1)
    assert [point["setting"] for point in table["points"] if point["codec"] == "vat-tiny"] == [
        "1 scale, 1 tokens", "2 scales, 5 tokens", "3 scales, 14 tokens",
    ]  # fmt: skip


# Generation.


def test_generate_names_files_by_label_and_seed(run, tmp_path):
    result = run("generate", "vat-gen-tiny", "lamp", "0", "none", "-n", 2, "--seed", 5, *SMALL, "--out", "out")
    assert result.code == 0, result.err
    files = ["lamp-5", "lamp-6", "armchair-7", "armchair-8", "none-9", "none-10"]
    assert names(tmp_path / "out") == {f"{name}.glb" for name in files}
    assert "made 6 meshes with vat-gen-tiny in out" in result.out
    assert "meshes/s" in result.out
    (expected,) = mt.load("vat-gen-tiny").generate("lamp", seed=6, resolution=16)
    assert (tmp_path / "out/lamp-6.glb").read_bytes() == file_of(expected, tmp_path, ".glb")


def test_generate_settings_and_tokens(run, tmp_path, shipped):
    options = ("--seed", 3, "--guidance", "4", "--set", "temperature=0.5", "--set", "top_k=7", *SMALL)
    (record,) = records(
        run("generate", "vat-gen-tiny", "table", *options, "--tokens", "--out", "t.stl", "--json")
    )  # fmt: skip
    chosen = {"seed": 3, "label": "table", "guidance": 4, "temperature": 0.5, "top_k": 7, "output": "t.stl"}
    assert {name: record[name] for name in chosen} == chosen
    made = mt.load("vat-gen-tiny").sample("table", seed=3, guidance=4.0, temperature=0.5, top_k=7, resolution=16)
    assert mt.Tokens.load("t.mtok") == made.tokens[0]
    assert (tmp_path / "t.stl").read_bytes() == file_of(made.meshes[0], tmp_path, ".stl")
    assert record["faces"] == len(made.meshes[0].faces)
    # The tokens are a file like any other, and another tokenizer may decode.
    assert run("decode", "t.mtok", *SMALL, "--out", "again.stl").code == 0
    assert (tmp_path / "again.stl").read_bytes() == (tmp_path / "t.stl").read_bytes()
    again = ("--tokenizer", shipped / "vat-tiny", "--out", "u.stl")
    assert run("generate", "vat-gen-tiny", "table", *options, *again).code == 0
    assert (tmp_path / "u.stl").read_bytes() == (tmp_path / "t.stl").read_bytes()


def test_generate_refuses(run, tmp_path, hollow):
    run("generate", "vat-gen-tiny", "lamp", "--seed", 1, *SMALL)
    (tmp_path / "p.png").write_bytes(b"")
    before = names(tmp_path)
    for arguments, words in {
        ("--steps", "3"): "--steps cannot be used with meshes",
        ("--grid",): "--grid cannot be used with meshes",
        ("--edit", "p.png", "--keep", "0"): "--edit, --keep cannot be used with meshes",
        ("--set", "steps=3"): "steps",
        ("--set", "top_k=-1"): "top_k",
        ("--out", "x.png"): ".glb, .obj, .stl, .ply",
        ("--out", "x.glb", "-n", "2"): "one file for 2 meshes; name a folder",
        ("lmp",): "lamp",
        ("lamp", "--seed", "1"): "--overwrite",
        ("--resolution", "1"): "--resolution",
        ("-n", "5000"): "5000 meshes are asked for",
    }.items():
        check_refused(run("generate", "vat-gen-tiny", *arguments), words)
    assert names(tmp_path) == before
    assert "armchair" in run("generate", "vat-gen-tiny", "--list-labels").out
    assert run("generate", "hollow-gen", "--list-labels").out == "hollow-gen has no classes\n"


def test_generators_of_pictures_refuse_what_is_for_meshes(run):
    MaskGIT(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, codebook_size=64,
        num_tokens=8, tokenizer="titok-tiny", num_classes=3,
    ).save_pretrained("maskgit")  # fmt: skip
    check_refused(run("generate", "maskgit", *SMALL), "--resolution cannot be used with pictures")
    check_refused(run("generate", "maskgit", "--out", "x.glb"), ".png")


def test_info_and_models(run, solids):
    run("encode", solids, "--out", "tokens")
    mt.load("vat-tiny").encode([solids / "a.obj", solids / "b.stl"]).up_to_scale(2).save("two.mtok")
    tokenizer, generator, file, two = records(
        run("info", "vat-tiny", "vat-gen-tiny", "tokens/a.mtok", "two.mtok", "--json")
    )
    assert (tokenizer["modality"], tokenizer["max_tokens"], tokenizer["tokens_of_scales"]) == ("shape", 14, [1, 4, 9])
    assert (generator["tokenizer"], generator["classes"], generator["scales"]) == ("vat-tiny", 3, 3)
    assert (file["modality"], file["tokens"], file["scales"]) == ("shape", 14, 3)
    assert file["centre"] == [10, -3, 7]
    assert file["longest_side"] == pytest.approx(4)
    assert file["fingerprint"] == tokenizer["fingerprint"]
    assert two["scales"] == [2, 2]
    assert len(two["centre"]) == 2
    listed = {row["name"]: row for row in json.loads(run("models", "--json").out)}
    assert listed["vat-gen-tiny"]["kind"] == "generator"
    assert listed["vat-tiny"]["modality"] == "shape"


def test_odd_meshes_work(run, tmp_path):
    box = trimesh.creation.box((1, 1, 1))
    soup = trimesh.Trimesh(box.triangles.reshape(-1, 3), np.arange(36).reshape(-1, 3), process=False)
    inside_out = box.copy()
    inside_out.invert()
    odd = {
        "one-triangle.obj": trimesh.Trimesh([[0, 0, 0], [1, 0, 0], [0, 1, 0]], [[0, 1, 2]]),
        "soup.stl": soup,
        "inside-out.ply": inside_out,
        "open.off": trimesh.Trimesh(box.vertices, box.faces[:-2], process=False),
        "two-bodies.glb": trimesh.util.concatenate([box, box.copy().apply_translation((3, 0, 0))]),
        "tiny.stl": trimesh.creation.box((1e-6, 1e-6, 1e-6)),
    }
    for name, mesh in odd.items():
        mesh.export(tmp_path / name)
        for command in ("encode", "reconstruct"):
            assert run(command, name, *(SMALL if command == "reconstruct" else ())).code == 0, name
