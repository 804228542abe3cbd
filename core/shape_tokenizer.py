"""What every shape tokenizer is: meshes in, tokens between, meshes out, in their own place and scale.

A mesh is moved into the box [-1, 1]^3 and sampled on its surface, and becomes tokens over scales, coarse ones first.
Tokens become a field, which says for any point of the box whether it lies inside; the mesh is the field's surface.

Shape suffixes: B items, N points of a surface, P points asked for, L tokens (of some scales, S of all).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from itertools import accumulate

import torch
from torch import Tensor

from .base import OnStep, Tokenizer, check_callback, report
from .errors import InvalidInput
from .isosurface import check_resolution, extract_surface
from .meshes import normalise, read_mesh, restore
from .sizes import check_whole
from .surfaces import sample_surface
from .tokens import ShapeFrame, Tokens


class ShapeField(ABC):
    """B shapes as functions of space: where in the box [-1, 1]^3 their insides are."""

    device: torch.device

    @abstractmethod
    def __len__(self) -> int:
        """Number of shapes."""

    @abstractmethod
    def __getitem__(self, index: int) -> ShapeField:
        """One shape, as a field of one."""

    @abstractmethod
    def occupancy(self, xyz_BP3: Tensor) -> Tensor:
        """Logits fp32 [B, P] of points fp32 [B, P, 3] of the box: positive inside."""

    @torch.inference_mode()
    def to_mesh(self, resolution: int = 128, index: int = 0, on_step: OnStep | None = None):
        """The surface of shape `index` as a `trimesh.Trimesh` in the box's coordinates; see `extract_surface`."""
        shape = self[index]

        def values_of(points_N3: Tensor) -> Tensor:
            return shape.occupancy(points_N3[None].to(shape.device))[0].float().cpu()

        return extract_surface(values_of, resolution, on_step=on_step)


class ShapeTokenizer(Tokenizer):
    """Base of shape tokenizers. Subclasses implement `encode_points` and `decode_ids`, and say `vocab_size`."""

    modality = "shape"
    is_variable_length = True  # any whole number of scales decodes
    is_continuous = False

    @property
    def scales(self) -> tuple[int, ...]:
        """Tokens of each scale, coarse to fine."""
        return tuple(self.config.scales)

    @property
    def max_tokens(self) -> int:
        return sum(self.scales)

    @property
    def num_points(self) -> int:
        """Points of a surface that the encoder reads."""
        return self.config.num_points

    @abstractmethod
    def encode_points(self, points_BN3: Tensor, normals_BN3: Tensor) -> Tensor:
        """Ids int64 [B, S] of points on surfaces in the box [-1, 1]^3 and their unit normals, both fp32 [B, N, 3]."""

    @abstractmethod
    def decode_ids(self, ids_BL: Tensor) -> ShapeField:
        """The shapes of ids int64 [B, L]; L ends with any scale."""

    @torch.inference_mode()
    def encode(self, meshes, *, seed: int = 0, batch_size: int = 8, on_step: OnStep | None = None) -> Tokens:
        """Turn one mesh or a list of them into `Tokens`.

        Args:
            meshes: path, bytes of a file, `trimesh.Trimesh` or (vertices, faces) (see `read_mesh`), or a list of these.
            seed: of the points drawn on each surface. Every mesh has its own draw, whatever its company.
            batch_size: meshes that go through together.
            on_step: called after each batch with the number of finished meshes and the total.

        Raises:
            InvalidInput: unreadable meshes.
        """
        check_callback(on_step)
        batch_size = check_whole(batch_size, "batch_size", 1)
        sources, is_batch = as_list(meshes)
        ids, frames = [], []
        for start in range(0, len(sources), batch_size):
            points, normals = [], []
            for source in sources[start : start + batch_size]:
                boxed, frame = normalise(read_mesh(source))
                points_N3, normals_N3 = surface_points(boxed, self.num_points, seed)
                points.append(points_N3)
                normals.append(normals_N3)
                frames.append(frame)
            ids.append(self.encode_points(*(torch.stack(part).to(self.device) for part in (points, normals))).cpu())
            report(on_step, len(frames), len(sources))
        return self.tokens_of(torch.cat(ids), frames, is_batch)

    def tokens_of(self, ids_BL: Tensor, frames: list[ShapeFrame] | None = None, is_batch: bool = True) -> Tokens:
        """`Tokens` of ids [B, L] of some scales; without frames the shapes stay in the box."""
        self.check_ids(ids_BL)
        frames = [ShapeFrame(0.0, 0.0, 0.0, 1.0)] * len(ids_BL) if frames is None else frames
        return Tokens(
            ids=ids_BL, lengths=torch.full((len(ids_BL),), ids_BL.shape[1]), tokenizer=self.name,
            fingerprint=self.fingerprint, vocab_size=self.vocab_size, modality=self.modality, frames=tuple(frames),
            is_batch=is_batch, scales=self.scales,
        )  # fmt: skip

    @torch.inference_mode()
    def decode(
        self, tokens: Tokens, *, resolution: int = 128, up_to_scale: int | None = None, on_step: OnStep | None = None
    ):
        """Turn `Tokens` back into a `trimesh.Trimesh` in its own place and scale; a list when they came from a list.

        Args:
            tokens: of this tokenizer.
            resolution: cells a side of the grid over the box, 2 to 512; detail finer than a cell is lost.
            up_to_scale: decode the first scales alone.
            on_step: called with the steps that are finished, several a shape, and their total.

        Raises:
            TokenizerMismatch: tokens of another model.
            InvalidInput: a resolution or scale out of range.
        """
        check_callback(on_step)
        check_resolution(resolution)
        meshes = []
        for index, ids_L in enumerate(self._rows(tokens, up_to_scale)):
            field = self.decode_ids(ids_L[None].to(self.device))
            mesh = field.to_mesh(resolution, on_step=_part_of(on_step, index, len(tokens)))
            meshes.append(restore(mesh, tokens.frames[index]))
        return meshes if tokens.is_batch else meshes[0]

    @torch.inference_mode()
    def decode_fields(self, tokens: Tokens, *, up_to_scale: int | None = None) -> list[ShapeField]:
        """A field of one shape for each item, in the box's coordinates."""
        return [self.decode_ids(ids_L[None].to(self.device)) for ids_L in self._rows(tokens, up_to_scale)]

    def reconstruct(
        self, meshes, *, resolution: int = 128, seed: int = 0, batch_size: int = 8, on_step: OnStep | None = None
    ):
        """Encode and decode in one call."""
        check_resolution(resolution)
        tokens = self.encode(meshes, seed=seed, batch_size=batch_size)
        return self.decode(tokens, resolution=resolution, on_step=on_step)

    def _rows(self, tokens: Tokens, up_to_scale: int | None) -> list[Tensor]:
        """The ids [L] of each item."""
        tokens.check(self.name, self.fingerprint)
        tokens = tokens if up_to_scale is None else tokens.up_to_scale(up_to_scale)
        return [ids_L[:length] for ids_L, length in zip(tokens.ids, tokens.lengths.tolist(), strict=True)]

    # Checks that the tensor level of every shape tokenizer shares.

    def check_points(self, points_BN3: Tensor, normals_BN3: Tensor) -> None:
        """Refuse points and normals of a wrong shape or dtype."""
        for name, x in (("points", points_BN3), ("normals", normals_BN3)):
            if x.ndim != 3 or x.shape[2] != 3 or not x.shape[1] or not x.is_floating_point():
                raise InvalidInput(f"{self.name} reads float {name} [B, N, 3], got {x.dtype} {list(x.shape)}")
        if points_BN3.shape != normals_BN3.shape:
            raise InvalidInput(
                f"{list(points_BN3.shape)} points and {list(normals_BN3.shape)} normals: every point needs its normal"
            )

    def check_ids(self, ids_BL: Tensor) -> None:
        """Refuse ids of a wrong shape, dtype or range, and those that end within a scale."""
        if ids_BL.ndim != 2 or ids_BL.dtype != torch.int64 or not ids_BL.numel():
            raise InvalidInput(f"ids of {self.name} must be int64 [B, L], got {ids_BL.dtype} {list(ids_BL.shape)}")
        ends = list(accumulate(self.scales))
        if ids_BL.shape[1] not in ends:
            raise InvalidInput(
                f"{ids_BL.shape[1]} ids end within a scale; those of {self.name} end at {', '.join(map(str, ends))}"
            )
        if not 0 <= int(ids_BL.min()) <= int(ids_BL.max()) < self.vocab_size:
            raise InvalidInput(
                f"ids must lie in [0, {self.vocab_size}), got {int(ids_BL.min())} to {int(ids_BL.max())}"
            )


def surface_points(boxed, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Points and normals fp32 [N, 3] of a mesh in the box, as an encoder reads them: normals look outward.

    A mesh all of whose faces look inward encloses a negative volume.
    """
    points_N3, normals_N3 = sample_surface(boxed, count, seed)
    return points_N3, -normals_N3 if boxed.volume < 0 else normals_N3


def as_list(meshes) -> tuple[list, bool]:
    """The meshes as a list, and whether a list was given; a pair of arrays is one mesh."""
    is_arrays = isinstance(meshes, tuple) and len(meshes) == 2 and all(hasattr(part, "shape") for part in meshes)
    if not isinstance(meshes, (list, tuple)) or is_arrays:
        return [meshes], False
    if not meshes:
        raise InvalidInput("the list of meshes is empty")
    return list(meshes), True


def _part_of(on_step: OnStep | None, index: int, count: int) -> Callable | None:
    """`on_step` for item `index` of `count`, each of which has as many steps."""
    if on_step is None:
        return None
    return lambda step, total, preview=None: on_step(index * total + step, count * total, preview=preview)
