"""Small next-scale generators with random weights, and a tokenizer whose shapes are balls."""

import torch
from diffusers.configuration_utils import register_to_config
from mediatok.core.shape_tokenizer import ShapeField, ShapeTokenizer
from mediatok.generators.next_scale import NextScale
from mediatok.nn.multiscale_vq import MultiScaleQuantizer

SCALES = (1, 3, 6)
NAMES = ("chair", "table", "lamp")
ENCODER = {
    "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 112, "patch_size": 56
}  # fmt: skip


class Balls(ShapeField):
    """Balls of radii [B]."""

    def __init__(self, radius_B):
        self.radius_B, self.device = radius_B, radius_B.device

    def __len__(self):
        return len(self.radius_B)

    def __getitem__(self, index):
        return Balls(self.radius_B[index : index + 1])

    def occupancy(self, xyz_BP3):
        return self.radius_B[:, None] - xyz_BP3.norm(dim=-1)


class BallTokenizer(ShapeTokenizer):
    """Any ids are a ball, whose radius follows from the sum of the codes."""

    fingerprint_weights = ("quantize.",)

    @register_to_config
    def __init__(self, scales: tuple[int, ...] = SCALES, codebook_size: int = 20, code_width: int = 4, seed: int = 0):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.quantize = MultiScaleQuantizer(codebook_size, code_width, scales)

    @property
    def vocab_size(self):
        return self.config.codebook_size

    def encode_points(self, points_BN3, normals_BN3):
        size_B11 = points_BN3.abs().amax(dim=(1, 2))[:, None, None]
        return self.quantize.encode(size_B11.expand(-1, self.scales[-1], self.config.code_width))

    def decode_ids(self, ids_BL):
        self.check_ids(ids_BL)
        return Balls(0.4 + 0.2 * self.quantize.sum_of(ids_BL).mean(dim=(1, 2)).tanh())


def small(tokenizer=None, **changes):
    """A generator whose weights are so large that ids depend on what is asked for, with its tokenizer."""
    tokenizer = BallTokenizer().eval() if tokenizer is None else tokenizer
    torch.manual_seed(0)
    sizes = {
        "scales": tokenizer.scales, "codebook_size": tokenizer.vocab_size, "code_width": tokenizer.quantize.code_width,
        "width": 32, "depth": 2, "num_heads": 2, "num_classes": 3, "label_names": NAMES,
        "tokenizer_fingerprint": tokenizer.fingerprint,
    }  # fmt: skip
    generator = NextScale(**(sizes | changes)).eval()
    for parameter in generator.transformer.parameters():
        if parameter.ndim > 1 and parameter.shape[-1] > 1:
            torch.nn.init.normal_(parameter, std=0.5)
    generator.use_tokenizer(tokenizer)
    return generator


def rngs(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]
