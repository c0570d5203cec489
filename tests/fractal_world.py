"""Small fractal coasts for tests of places."""

import numpy as np
from numpy.typing import NDArray

SHAPE = (180, 210)  # of the images; their coasts are REACH larger each way
REACH = 60


def fractal(rng: np.random.Generator, shape: tuple[int, int], slope: float) -> NDArray:
    k = np.hypot(np.fft.fftfreq(shape[0])[:, None], np.fft.rfftfreq(shape[1])[None])
    k[0, 0] = np.inf
    field = np.fft.irfft2(np.fft.rfft2(rng.standard_normal(shape)) * k**-slope, shape)
    return field / field.std()


def coast(
    seed: int, land: float = 0.5, shape: tuple[int, int] = (SHAPE[0] + REACH, SHAPE[1] + REACH)
) -> NDArray[np.float32]:
    """Whole metres of a fractal coast, 0 = sea."""
    rng = np.random.default_rng(seed)
    large = (shape[0] + 40, shape[1] + 40)  # its edges repeat: leave them out
    field = fractal(rng, large, 1.8)[: shape[0], : shape[1]]
    hills = np.exp(0.4 * fractal(rng, large, 1.6)[: shape[0], : shape[1]])
    above = np.clip(field - np.quantile(field, 1 - land), 0, None)
    return np.where(above > 0, np.ceil(60 * above * hills), 0).astype(np.float32)
