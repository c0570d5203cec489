"""How well does `kelp metadata` find images of one place? Recall, precision, time.

    python benchmarks/places.py [--places 1000] [--noise 0.0] [--seed 0]

Draws the terrain of `kelp simulate`, and of each place one or more 350 x 350 images at offsets of
0-200 px, with the DEM 0-2 px off; beside the gaps of the simulator, a straight part of the sea is
unknown in 8 % of the images and the whole DEM in 3.3 %. `--noise` adds what resampling does: every
image is moved by up to half a pixel (bilinear) and its heights get normal noise of that many
metres. Pairs are counted where the DEM can place both images.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from kelp.data_prep.sites import DEFAULT_THRESHOLD, Terrain, embed, match
from kelp.simulation.terrain import make_terrain

SIZE, REACH, EDGE = 350, 200, 4
SIDE = SIZE + REACH + 2 * EDGE
COMPETITION = 7061
DEM = NDArray[np.float32]


def image(rng: np.random.Generator, terrain: DEM, noise: float) -> DEM:
    """The DEM of one image of a coast."""
    y, x = rng.integers(0, REACH + 1, 2) + EDGE + rng.integers(-2, 3, 2)
    if noise:
        known = np.maximum(terrain, 0)
        moved = ndimage.shift(known, rng.uniform(-0.5, 0.5, 2), order=1, mode="nearest")
        rough = np.rint(moved + noise * rng.standard_normal(moved.shape))
        rough = np.where(moved > 0.3, np.maximum(1, rough), 0)
        terrain = np.where(terrain < 0, terrain, rough).astype(np.float32)
    dem = terrain[y : y + SIZE, x : x + SIZE].copy()
    kind, cut = rng.random(), rng.integers(50, 300)
    if kind < 0.033:
        dem[:] = np.nan
    elif kind < 0.113:
        beyond = np.zeros(dem.shape, bool)
        beyond[:cut] = True
        beyond = beyond.T if rng.random() < 0.5 else beyond
        dem[beyond & (dem <= 0)] = np.nan
    return dem


def archive(rng: np.random.Generator, places: int, noise: float) -> Iterator[tuple[int, DEM]]:
    """Place and DEM of every image: half of the places have one, the others 2 to 6."""
    for place in range(places):
        terrain = make_terrain(rng, (SIDE, SIDE)).dem.astype(np.float32)
        for _ in range(rng.choice([1, 2, 3, 4, 6], p=[0.5, 0.3, 0.1, 0.06, 0.04])):
            yield place, image(rng, terrain, noise)


def pairs_within(labels: NDArray[np.int64]) -> int:
    """Number of pairs of equal labels."""
    counts = np.unique(labels, return_counts=True)[1]
    return int((counts * (counts - 1) // 2).sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--places", type=int, default=1000)
    parser.add_argument("--noise", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    terrains: list[Terrain] = []
    truth = []
    embedding = 0.0
    for place, dem in archive(np.random.default_rng(args.seed), args.places, args.noise):
        start = time.perf_counter()
        terrains.append(embed(dem))
        embedding += time.perf_counter() - start
        truth.append(place)
    place = np.array(truth)
    start = time.perf_counter()
    pairs, scores = match(terrains)
    matching = time.perf_counter() - start
    same = place[pairs[:, 0]] == place[pairs[:, 1]]
    seen = np.array([terrain.placeable for terrain in terrains])
    real = pairs_within(place[seen])
    print(f"{len(place)} images of {args.places} places, noise {args.noise} m")
    print(f"{seen.mean():.3f} of them placeable, {real} pairs to find")
    print("similarity of true pairs, 1/5/25/50 %: ", np.percentile(scores[same], [1, 5, 25, 50]))
    print("highest similarities of false pairs:   ", np.sort(scores[~same])[-8:])
    print("threshold  recall  precision  (of pairs as grouped)")
    for threshold in sorted({0.3, 0.4, DEFAULT_THRESHOLD, 0.6, 0.7, 0.8, 0.9}):
        ids = group_from(pairs, scores, threshold, len(place))[seen]
        both = pairs_within(ids * args.places + place[seen])
        print(f"{threshold:9.2f}  {both / real:.4f}  {both / max(1, pairs_within(ids)):.4f}")
    ratio = COMPETITION / len(place)
    print(f"seconds: {embedding:.1f} landmarks, {matching:.1f} matching")
    print(f"for {COMPETITION} images about {(embedding + matching) * ratio:.0f} s, if it grows so")


def group_from(
    pairs: NDArray[np.int64], scores: NDArray[np.float64], threshold: float, images: int
) -> NDArray[np.int64]:
    """Connected components of the pairs from `threshold` on."""
    kept = pairs[scores >= threshold]
    links = coo_array((np.ones(len(kept), bool), (kept[:, 0], kept[:, 1])), (images, images))
    return connected_components(links, directed=False)[1].astype(np.int64)


if __name__ == "__main__":
    main()
