"""Metrics against their definitions, other implementations and closed forms."""

import mediatok as mt
import numpy as np
import pytest
import torch
from mediatok.evaluation import metrics
from mediatok.nn.efficientnet_lite import EfficientNetLite0
from scipy.linalg import sqrtm


@pytest.fixture
def pictures():
    generator = torch.Generator().manual_seed(0)
    return torch.rand(3, 3, 64, 64, generator=generator), torch.rand(3, 3, 64, 64, generator=generator)


def test_psnr_of_each_picture(pictures):
    a, b = pictures
    values = metrics.psnr_per_image(a, b)
    assert values.tolist() == pytest.approx([mt.psnr(x, y) for x, y in zip(a, b, strict=True)], abs=1e-6)
    assert metrics.psnr_per_image(a, a).tolist() == [100.0] * 3


def test_psnr_of_a_known_error():
    a = torch.zeros(1, 3, 8, 8)
    assert metrics.psnr_per_image(a, a + 0.1).item() == pytest.approx(20.0, abs=1e-4)


def test_ssim_agrees_with_scikit_image(pictures):
    from skimage.metrics import structural_similarity

    a, b = pictures
    b = 0.7 * a + 0.3 * b
    expected = [
        structural_similarity(
            x.numpy(), y.numpy(), channel_axis=0, data_range=1.0, gaussian_weights=True, sigma=1.5,
            use_sample_covariance=False,
        )
        for x, y in zip(a, b, strict=True)
    ]  # fmt: skip
    assert metrics.ssim_per_image(a, b).tolist() == pytest.approx(expected, abs=2e-2)
    assert metrics.ssim_per_image(a, a).tolist() == pytest.approx([1.0] * 3)
    with pytest.raises(mt.InvalidInput, match="11x11"):
        metrics.ssim_per_image(a[..., :8, :8], b[..., :8, :8])


def test_frechet_distance_of_known_gaussians():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(500, 6)), rng.normal(size=(400, 6)) @ rng.normal(size=(6, 6)) + 1
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    difference = a.mean(0) - b.mean(0)
    expected = difference @ difference + np.trace(cov_a + cov_b - 2 * sqrtm(cov_a @ cov_b).real)
    assert metrics.frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)
    assert metrics.frechet_distance(a, a) == pytest.approx(0, abs=1e-6)
    assert metrics.frechet_distance(a, a + 2) == pytest.approx(24, rel=1e-6)


def test_fd_lite0_grows_with_damage_and_needs_enough_pictures():
    rng = np.random.default_rng(0)
    features = rng.normal(size=(200, 96)) * np.linspace(3, 0.1, 96)
    near, far = (features + rng.normal(size=features.shape) * noise for noise in (0.1, 1.0))
    same, slight, strong = (metrics.fd_lite0(features, other) for other in (features, near, far))
    assert same.distance == pytest.approx(0, abs=1e-6)
    assert same.distance < slight.distance < strong.distance
    assert same.floor == slight.floor > slight.distance
    assert same.num_samples == 200
    assert metrics.fd_lite0(features[:129], near[:129]) is None


def test_lite0_features_and_hash_do_not_depend_on_the_file(tmp_path, pictures, monkeypatch):
    def from_file(path):
        network = EfficientNetLite0()
        network.load_state_dict(torch.load(path, weights_only=True))
        return network

    torch.manual_seed(0)
    monkeypatch.setattr(EfficientNetLite0, "from_file", from_file)
    torch.save(EfficientNetLite0().state_dict(), tmp_path / "a.pth")
    (tmp_path / "b.pth").write_bytes((tmp_path / "a.pth").read_bytes())
    first, second = (metrics.load_lite0(tmp_path / name) for name in ("a.pth", "b.pth"))
    assert first.sha256 == second.sha256
    assert first.run(pictures[0]).shape == (3, 1280)


def alexnet_file(path):
    from torchvision.models import alexnet

    torch.manual_seed(0)
    torch.save(alexnet(weights=None).state_dict(), path)
    return path


def test_lpips_from_a_weights_file(tmp_path, pictures):
    a, b = pictures
    lpips = metrics.load_lpips(alexnet_file(tmp_path / "alexnet.pth"))
    assert lpips.name == "LPIPS-alex"
    distances = lpips.run(a, b)
    assert distances.shape == (3,)
    assert (distances > 0).all()
    assert lpips.run(a, a).tolist() == pytest.approx([0.0] * 3, abs=1e-6)
    # The trunk is the file's: its last convolution is torchvision's features.10.
    trunk = next(cell.cell_contents for cell in lpips.run.__closure__ if hasattr(cell.cell_contents, "net")).net
    state = torch.load(tmp_path / "alexnet.pth", weights_only=True)
    assert torch.equal(trunk.slice5[0].weight, state["features.10.weight"])
    with pytest.raises(mt.InvalidInput, match="64x64"):
        lpips.run(a[..., :32, :32], b[..., :32, :32])


class Payload:
    def __reduce__(self):
        return (exec, ("raise SystemExit('code ran')",))


def test_weights_are_never_unpickled(tmp_path):
    torch.save({"features.0.weight": Payload()}, tmp_path / "evil.pth")
    for load in (metrics.load_lpips, metrics.load_inception, metrics.load_lite0):
        with pytest.raises(mt.InvalidCheckpoint):
            load(tmp_path / "evil.pth")


@pytest.mark.parametrize("load", [metrics.load_lpips, metrics.load_inception, metrics.load_lite0])
def test_wrong_weights(tmp_path, load):
    with pytest.raises(mt.ModelNotFound, match=r"none\.pth"):
        load(tmp_path / "none.pth")
    torch.save({"weight": torch.zeros(3)}, tmp_path / "other.pth")
    with pytest.raises(mt.InvalidCheckpoint, match=r"other\.pth"):
        load(tmp_path / "other.pth")
    (tmp_path / "text.safetensors").write_text("no weights")
    with pytest.raises(mt.InvalidCheckpoint, match="text"):
        load(tmp_path / "text.safetensors")


def test_inception_takes_torch_fidelitys_weights(tmp_path, pictures, monkeypatch):
    from torch_fidelity import feature_extractor_inceptionv3 as fidelity

    seen = []

    class Small(torch.nn.Module):
        def __init__(self, name, features, feature_extractor_weights_path):
            super().__init__()
            seen.append(torch.load(feature_extractor_weights_path, weights_only=True))

        def forward(self, pixels):
            assert pixels.dtype == torch.uint8
            return (pixels.float().mean(dim=(2, 3)),)

    monkeypatch.setattr(fidelity, "FeatureExtractorInceptionV3", Small)
    torch.save({"fc.weight": torch.ones(2)}, tmp_path / "inception.pth")
    net = metrics.load_inception(tmp_path / "inception.pth")
    assert list(seen[0]) == ["fc.weight"]
    assert net.run(pictures[0]).shape == (3, 3)
