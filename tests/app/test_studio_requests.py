"""The studio over HTTP: endpoints for programs, and requests that a page would never make."""

import io
import json
import urllib.error
import urllib.parse
import urllib.request

import pytest
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from mediatok import Tokens
from PIL import Image

MIB = 2**20

# The file route with places outside the studio's folder, in every spelling that has worked somewhere once.
TRAVERSAL = [
    "/etc/passwd",
    "//etc/passwd",
    "///etc/passwd",
    "../../../../etc/passwd",
    "/../../../../etc/passwd",
    "..%2f..%2f..%2f..%2fetc%2fpasswd",
    "..%252f..%252f..%252fetc%252fpasswd",
    "%2e%2e/%2e%2e/%2e%2e/etc/passwd",
    "%2e%2e%2f%2e%2e%2f%2e%2e%2fetc%2fpasswd",
    "....//....//....//etc/passwd",
    "..;/..;/etc/passwd",
    "..\\..\\..\\etc\\passwd",
    "..%5c..%5c..%5cetc%5cpasswd",
    "/etc/passwd%00.png",
    "%00/etc/passwd",
    "/proc/self/environ",
    "/proc/self/cwd/../../etc/passwd",
    "file:///etc/passwd",
    "file%3A%2F%2F%2Fetc%2Fpasswd",
    "./././etc/passwd",
    "~/.bashrc",
    "/etc/./passwd",
]
INTERNAL = [
    "http://127.0.0.1:22/",
    "http://localhost/",
    "http://169.254.169.254/latest/meta-data/",
    "http://[::1]/",
    "http://0.0.0.0/",
    "http://2130706433/",
    "http://10.0.0.1/",
    "https://example.com/",
    "HTTP://127.0.0.1/",
    "http%3A%2F%2F127.0.0.1%2F",
    "http%253A%252F%252F127.0.0.1%252F",
    "ftp://127.0.0.1/",
    "//127.0.0.1/x",
]


def ask(url: str, data: bytes | None = None, headers: dict | None = None) -> tuple[int, bytes]:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data, headers or {}), timeout=60) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def multipart(*files: bytes) -> tuple[bytes, dict]:
    parts = [
        b'--edge\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n'
        b"Content-Type: image/png\r\n\r\n" + data + b"\r\n"
        for data in files
    ]
    return b"".join(parts) + b"--edge--\r\n", {"Content-Type": "multipart/form-data; boundary=edge"}


@pytest.fixture(scope="module")
def client(studio_url):
    return Client(studio_url, verbose=False)


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    path = tmp_path_factory.mktemp("photos") / "photo.png"
    Image.linear_gradient("L").resize((90, 60)).convert("RGB").save(path)
    return path


@pytest.mark.parametrize("path", TRAVERSAL)
@pytest.mark.parametrize("route", ["gradio_api/file=", "file="])
def test_file_route_serves_nothing_else(studio_url, route, path):
    status, body = ask(f"{studio_url}/{route}{urllib.parse.quote(path, safe='%/:;~.')}")
    assert b"root:" not in body
    assert b"PATH=" not in body
    assert status in (400, 403, 404), (status, body[:200])


@pytest.mark.parametrize("address", INTERNAL)
def test_file_route_fetches_nothing(studio_url, address):
    status, body = ask(f"{studio_url}/gradio_api/file={address}")
    assert status in (400, 403, 404), (status, body[:200])


@pytest.mark.parametrize(
    "address", ["http://127.0.0.1:22/", "http://169.254.169.254/", "/etc/passwd", "file:///etc/passwd"]
)
def test_endpoint_reads_no_address_and_no_path(studio_url, address):
    """A picture given by address or by a path that was never uploaded."""
    body = {
        "data": [{"path": address, "url": address, "meta": {"_type": "gradio.FileData"}}, "", None, None, None, False]
    }
    status, answer = ask(
        f"{studio_url}/gradio_api/call/encode_image", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    if status == 200:
        _, answer = ask(f"{studio_url}/gradio_api/call/encode_image/{json.loads(answer)['event_id']}")
        assert b"event: error" in answer
    assert b"root:" not in answer
    assert b"complete" not in answer


def test_upload_limit_to_the_byte(studio_url):
    body, headers = multipart(bytes(MIB))
    assert ask(f"{studio_url}/gradio_api/upload", body, headers)[0] == 200
    body, headers = multipart(bytes(MIB + 1))
    assert ask(f"{studio_url}/gradio_api/upload", body, headers)[0] == 413
    body, headers = multipart(bytes(3 * MIB))
    status, answer = ask(f"{studio_url}/gradio_api/upload", body, headers)
    assert status == 413
    assert b"1 MiB" in answer


def test_one_file_a_request(studio_url):
    body, headers = multipart(b"one", b"two")
    assert ask(f"{studio_url}/gradio_api/upload", body, headers)[0] == 400


def test_page_forbids_other_hosts_and_frames(studio_url):
    with urllib.request.urlopen(studio_url, timeout=30) as answer:
        assert "default-src 'self'" in answer.headers["content-security-policy"]
        assert answer.headers["x-content-type-options"] == "nosniff"


def test_strangers_pages_may_not_call(studio_url):
    """Cross-origin requests from another site's page get no permission."""
    request = urllib.request.Request(f"{studio_url}/config", headers={"Origin": "https://evil.example"})
    with urllib.request.urlopen(request, timeout=30) as answer:
        assert answer.headers.get("access-control-allow-origin") in (None, "")


def test_endpoints(client, models_dir, photo):
    piece, titok = str(models_dir / "random-piece"), str(models_dir / "random-titok")
    path, numbers = client.predict(handle_file(photo), piece, 16, api_name="/encode_image")
    with open(path, "rb") as file:
        tokens = Tokens.from_bytes(file.read())
    assert tokens.ids[0].tolist() == numbers["tokens"]
    assert (numbers["num_tokens"], numbers["bytes"]) == (16, tokens.num_bytes)

    picture, decoded = client.predict(handle_file(path), "", api_name="/decode_tokens")
    with Image.open(picture) as image:
        assert image.size == (64, 64)
    assert decoded["psnr"] is None

    pair = client.predict(handle_file(photo), piece, titok, None, 100, api_name="/compare")
    assert all(numbers["bytes"] <= 100 for numbers in pair)
    names = {row["name"]: row for row in client.predict(api_name="/models")}
    assert names["random-piece (local)"]["status"] == "local"
    assert names["titok-l32"]["licence"] == "Apache-2.0"


def test_endpoint_errors_are_messages(client, models_dir, photo, tmp_path):
    piece = str(models_dir / "random-piece")
    with pytest.raises(AppError, match="at most one"):
        client.predict(handle_file(photo), piece, 16, 30.0, api_name="/encode_image")
    with pytest.raises(AppError, match="not a model of this studio"):
        client.predict(handle_file(photo), "/etc", api_name="/encode_image")
    broken = tmp_path / "broken.mtok"
    broken.write_bytes(b"no tokens at all")
    with pytest.raises(AppError) as caught:
        client.predict(handle_file(broken), "", api_name="/decode_tokens")
    assert "Traceback" not in str(caught.value)


def test_private_events_are_not_endpoints(client):
    named = set(client.view_api(return_format="dict")["named_endpoints"])
    speech = {"/encode_audio", "/decode_audio", "/enhance", "/transcribe", "/speak"}
    shapes = {"/encode_mesh", "/decode_mesh", "/generate_shape"}
    assert named == {"/encode_image", "/decode_tokens", "/compare", "/generate", "/models"} | speech | shapes


def test_upload_is_not_an_image_for_its_name(client, models_dir, tmp_path):
    """A text file named .png, and an SVG, are refused by content."""
    for content in (b"hello", b'<svg xmlns="http://www.w3.org/2000/svg"><image href="http://127.0.0.1/"/></svg>'):
        path = tmp_path / "photo.png"
        path.write_bytes(content)
        with pytest.raises(AppError):
            client.predict(handle_file(path), str(models_dir / "random-piece"), api_name="/encode_image")


def test_photo_is_kept_from_others(client, studio_url, photo, models_dir):
    """The folder of sessions, where files have plain names, is not served; nor can a served folder be listed."""
    path, _ = client.predict(handle_file(photo), str(models_dir / "random-piece"), api_name="/encode_image")
    assert path
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "PNG")
    body, headers = multipart(buffer.getvalue())
    _, answer = ask(f"{studio_url}/gradio_api/upload", body, headers)
    served = json.loads(answer)[0]
    assert ask(f"{studio_url}/gradio_api/file={served}")[0] == 200
    root = served.rsplit("/", 3)[0]
    for place in (
        served.rsplit("/", 1)[0],
        served.rsplit("/", 2)[0],
        root,
        f"{root}/sessions",
        f"{root}/sessions/samples/cupcake.png",
    ):
        assert ask(f"{studio_url}/gradio_api/file={place}")[0] in (403, 404), place
