"""Making the faces of a mesh agree on which side is out, as far as they can.

A patch is a set of faces joined over edges that have exactly two faces. Within a patch the faces are turned to agree;
each patch is then turned as a whole.

Shape suffixes: V vertices, F triangles, H half-edges (3 a triangle), E edges, Q patches, 3 coordinates or corners.
"""

from __future__ import annotations

import numpy as np

from .mesh_winding import Winding, half_edges, open_edges

# A patch holds a volume if it has this share of its area ** 1.5: a sphere has 0.09, a hemisphere's shell 0.1, a box
# without lid 0.07, a flat sheet nothing. An open patch below it may face either way: its neighbours decide.
OPEN_VOLUME, CLOSED_VOLUME = 0.02, 1e-9
MOST_RIM = 12.0  # square of the rim's length to area: a hemisphere has 6, a Moebius strip as wide as its radius 25
MAX_PROBES = 2**14


def drop_repeated_faces(faces_F3: np.ndarray, num_vertices: int) -> tuple[np.ndarray, list[str]]:
    """Keep one of several equal triangles, and neither of two that face opposite ways; what was done is in the notes.

    Solids that touch share such pairs, and without them they are one solid. But where most faces of a part have an
    opposite, as some programs write them to be seen from both sides, one of each is its surface and kept.
    """
    sorted_F3 = np.sort(faces_F3, axis=1)
    order_F = np.lexsort(sorted_F3.T)
    is_new_F = np.ones(len(order_F), bool)
    is_new_F[1:] = (sorted_F3[order_F[1:]] != sorted_F3[order_F[:-1]]).any(axis=1)
    if is_new_F.all():
        return faces_F3, []
    group_F = np.empty(len(order_F), np.int64)
    group_F[order_F] = np.cumsum(is_new_F) - 1
    first_G = order_F[is_new_F]  # the sort is stable: the first of a group in the order of the faces
    # A triangle runs through its corners in rising order, or the other way.
    rising_F = np.roll(faces_F3, -1, axis=1) - faces_F3 > 0
    is_even_F = rising_F.sum(axis=1) == 2
    even_G, odd_G = (np.bincount(group_F, weights=way, minlength=len(first_G)) for way in (is_even_F, ~is_even_F))
    has_both_G = (even_G > 0) & (odd_G > 0)
    part_G = _parts(faces_F3[first_G], num_vertices)
    is_two_sided_part = np.bincount(part_G, weights=has_both_G) > 0.5 * np.bincount(part_G)
    keep_G = ~has_both_G | is_two_sided_part[part_G]
    notes = []
    if two_sided := int((has_both_G & keep_G).sum()):
        notes.append(f"faces there for both sides, of which one was kept: {two_sided:,}")
    if inner := int((~keep_G).sum()):
        notes.append(f"pairs of faces between touching solids dropped: {inner:,}")
    if repeated := len(faces_F3) - len(first_G) - two_sided - inner:
        notes.append(f"repeated faces dropped: {repeated:,}")
    return faces_F3[np.sort(first_G[keep_G])], notes


def face_outward(vertices_V3: np.ndarray, faces_F3: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """Turn faces until patches agree in themselves and face outward; what was done is in the notes.

    A patch that faces inward is turned unless others go around all of it: it is then the wall of a hollow. A patch
    with one side only is left out if it is more rim than surface, like a Moebius strip.
    """
    notes = []
    patch_F, is_turned_F, is_one_sided_Q = _agree(faces_F3)
    volume_Q, rim_Q = _volumes(vertices_V3, _turned(faces_F3, is_turned_F), patch_F)
    if is_one_sided_Q.any():
        notes.append(f"surfaces with one side only: {int(is_one_sided_Q.sum()):,}")
    is_kept_F = ~(is_one_sided_Q & (rim_Q > MOST_RIM))[patch_F]
    if volume_Q.sum() < 0:
        is_turned_F = ~is_turned_F
        volume_Q = -volume_Q
    faces_now_F3 = _turned(faces_F3, is_turned_F)
    inward_Q = np.flatnonzero(volume_Q < 0)
    is_outward_F = volume_Q[patch_F] > 0
    if len(inward_Q) and is_outward_F.any():
        # Some faces of each: a body turned inside out may begin in another one and end outside it.
        face_N = np.flatnonzero(np.isin(patch_F, inward_Q))
        _, first_N = np.unique(patch_F[face_N], return_index=True)
        face_N = face_N[np.union1d(first_N, np.arange(0, len(face_N), 1 + len(face_N) // MAX_PROBES))]
        winding_N = Winding(vertices_V3, faces_now_F3[is_outward_F]).at(vertices_V3[faces_now_F3[face_N]].mean(axis=1))
        is_bare_Q = np.zeros(len(volume_Q), bool)
        is_bare_Q[patch_F[face_N[winding_N <= 0.5]]] = True
        if hollows := int((~is_bare_Q[inward_Q]).sum()):
            notes.append(f"hollows: {hollows:,}")
        inward_Q = inward_Q[is_bare_Q[inward_Q]]
    is_turned_F = is_turned_F ^ np.isin(patch_F, inward_Q)
    if is_turned_F.any():
        notes.append(f"faces turned to face outward: {int(is_turned_F.sum()):,} of {len(faces_F3):,}")
    if (bodies := int((rim_Q == 0).sum())) > 1:
        notes.append(f"closed bodies: {bodies:,}")
    return _turned(faces_F3, is_turned_F)[is_kept_F], notes


def _turned(faces_F3: np.ndarray, is_turned_F: np.ndarray) -> np.ndarray:
    return np.where(is_turned_F[:, None], faces_F3[:, ::-1], faces_F3)


def _agree(faces_F3: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Number the patches, int64 [F], and say which faces to turn, bool [F], so that neighbours run along their edge in
    opposite ways; the third, bool [Q], which patches cannot agree.

    Every face is two nodes of a graph, as it is and turned; neighbours are joined as they fit. A patch then falls into
    two halves, one the reverse of the other, of which the one that turns fewer faces is taken.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    num_faces = len(faces_F3)
    a_H, b_H = half_edges(faces_F3)
    key_H = np.minimum(a_H, b_H) * (int(faces_F3.max()) + 1) + np.maximum(a_H, b_H)
    order_H = np.argsort(key_H, kind="stable")
    start_E = np.flatnonzero(np.diff(key_H[order_H], prepend=-1))
    start_E = start_E[np.diff(start_E, append=len(order_H)) == 2]
    one_E, other_E = order_H[start_E], order_H[start_E + 1]
    is_clash_E = (a_H[one_E] < b_H[one_E]) == (a_H[other_E] < b_H[other_E])
    face_E, near_E = one_E // 3, other_E // 3 + num_faces * is_clash_E
    far_E = other_E // 3 + num_faces * ~is_clash_E
    rows, columns = np.concatenate([face_E, face_E + num_faces]), np.concatenate([near_E, far_E])
    graph = coo_array((np.ones(len(rows), np.int8), (rows, columns)), shape=(2 * num_faces, 2 * num_faces))
    _, label = connected_components(graph, directed=False)
    as_is_F, turned_F = label[:num_faces], label[num_faces:]
    size = np.bincount(as_is_F, minlength=label.max() + 1)  # faces that a half leaves as they are
    is_turned_F = (size[turned_F] > size[as_is_F]) | ((size[turned_F] == size[as_is_F]) & (turned_F < as_is_F))
    _, patch_F = np.unique(np.minimum(as_is_F, turned_F), return_inverse=True)
    is_one_sided_Q = np.zeros(patch_F.max() + 1, bool)
    is_one_sided_Q[patch_F[as_is_F == turned_F]] = True
    return patch_F, is_turned_F, is_one_sided_Q


def _volumes(vertices_V3: np.ndarray, faces_F3: np.ndarray, patch_F: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Volume that each patch holds, seen from its middle, fp64 [Q], 0 if too flat to tell; and the square of its rim's
    length by its area, fp64 [Q], 0 if it is closed."""
    a_F3, b_F3, c_F3 = (vertices_V3[faces_F3[:, corner]] for corner in range(3))
    cross_F3 = np.cross(b_F3 - a_F3, c_F3 - a_F3)
    area_F = np.sqrt((cross_F3**2).sum(axis=1)) / 2
    area_Q = np.bincount(patch_F, weights=area_F)
    middle_F3 = (a_F3 + b_F3 + c_F3) / 3
    weighted = [np.bincount(patch_F, weights=area_F * middle_F3[:, axis]) for axis in range(3)]
    centre_Q3 = np.stack(weighted, axis=1) / np.maximum(area_Q, 1e-300)[:, None]
    volume_F = ((middle_F3 - centre_Q3[patch_F]) * cross_F3).sum(axis=1) / 6
    volume_Q = np.bincount(patch_F, weights=volume_F)
    # Edges between patches have other than two faces; with vertices numbered apart, they end each patch.
    num_vertices = len(vertices_V3)
    corners, local_F3 = np.unique(patch_F[:, None] * num_vertices + faces_F3, return_inverse=True)
    ends_E2 = corners[open_edges(local_F3.reshape(-1, 3), len(corners))[0]]
    from_E3, to_E3 = (vertices_V3[ends_E2[:, end] % num_vertices] for end in range(2))
    length_E = np.sqrt(((to_E3 - from_E3) ** 2).sum(axis=1))
    length_Q = np.bincount(ends_E2[:, 0] // num_vertices, weights=length_E, minlength=len(area_Q))
    least_Q = np.where(length_Q == 0, CLOSED_VOLUME, OPEN_VOLUME) * area_Q**1.5
    return np.where(np.abs(volume_Q) > least_Q, volume_Q, 0.0), length_Q**2 / np.maximum(area_Q, 1e-300)


def _parts(faces_F3: np.ndarray, num_vertices: int) -> np.ndarray:
    """Number the parts of a mesh that share no vertex, [F]."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    rows, columns = np.concatenate([faces_F3[:, 0]] * 2), np.concatenate([faces_F3[:, 1], faces_F3[:, 2]])
    graph = coo_array((np.ones(len(rows), np.int8), (rows, columns)), shape=(num_vertices, num_vertices))
    return connected_components(graph, directed=False)[1][faces_F3[:, 0]]
