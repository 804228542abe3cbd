"""Two users of one studio: what goes wrong for one is told to that one, and leaves the other alone."""

import io
import re
import zlib

import numpy as np
import pytest
from PIL import Image


def png(size=(90, 60), color="teal") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, color).save(buffer, "PNG")
    return buffer.getvalue()


def damaged_png() -> bytes:
    data = bytearray(png())
    data[60:80] = bytes(20)
    return bytes(data)


def huge_png() -> bytes:
    """20,000 x 20,000 px in a few hundred bytes, with a correct header."""
    header = b"IHDR" + (20_000).to_bytes(4, "big") * 2 + bytes([8, 2, 0, 0, 0])
    return png()[:8] + (13).to_bytes(4, "big") + header + zlib.crc32(header).to_bytes(4, "big") + png()[33:]


@pytest.mark.parametrize(
    ("data", "reason"),
    [(b"GIF89a but no picture", "not a sound"), (damaged_png(), "damaged"), (huge_png(), "pixels")],
    ids=["not a picture", "damaged", "huge"],
)
def test_bad_picture_is_a_message_and_changes_nothing(user, other_user, data, reason):
    page = user.page
    user.tab("Image")
    before, numbers = user.picture(), page.locator("#image-numbers").inner_text()
    others = other_user.page.locator("#image-numbers").inner_text()
    user.upload(data)
    user.toasts.get_by_text(reason).first.wait_for()
    message = user.toasts.first.inner_text()
    assert "photo.png" in message
    assert "Traceback" not in message
    assert "/served/" not in message  # where uploads lie is not shown
    assert (user.picture(), page.locator("#image-numbers").inner_text()) == (before, numbers)
    page.locator("#image-picture img").wait_for()  # the input is back at the picture that works
    assert other_user.page.locator("#image-numbers").inner_text() == others
    assert other_user.toasts.count() == 0


def test_stop_ends_this_users_work_alone(user, other_user):
    page, other = user.page, other_user.page
    user.tab("Image")
    user.choose("#image-model", "random-tiles (local)")
    user.settle()
    before = user.picture()
    user.upload(png((1600, 1600)))
    before = user.wait_for_other(before)
    user.settle()
    numbers = page.locator("#image-numbers").inner_text()
    page.locator("#image-tile input").check()  # 13,000 tiles: long work
    page.wait_for_timeout(1500)
    shown = other_user.picture()
    other_user.sample(2)  # waits for the device
    other.wait_for_timeout(1500)
    assert other_user.picture() == shown
    page.keyboard.press("Escape")
    other_user.wait_for_other(shown)
    assert (user.picture(), page.locator("#image-numbers").inner_text()) == (before, numbers)
    page.locator("#image-tile input").uncheck()
    user.sample(0)
    user.wait_for_other(before)


def test_upload_limit_is_told(user):
    numbers = user.page.locator("#image-numbers").inner_text()
    user.upload(np.random.default_rng(0).bytes(2**20 + 1))
    user.page.get_by_text(re.compile("too large|larger than|maximum|exceeds", re.IGNORECASE)).first.wait_for()
    assert user.page.locator("#image-numbers").inner_text() == numbers
