"""Fits the polynomial of GELU for 16-bit storage (activation.h): gelu(x) = x·σ(x·P(x²)). Needs numpy.

    python tools/fit_cuda_gelu.py

P is chosen for the least relative error of gelu(x) where float16 has full precision (x > -4.4); below, for as little
in units of float16's smallest number. The fit is a Lawson iteration: weighted least squares of the logit of Φ, with
weights that grow where the error of gelu is largest.
"""

import math

import numpy as np

EDGE = 5.5  # P is held beyond
SMALLEST = 2.0**-14  # the smallest normal float16


def exact(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Φ(x) and its logit."""
    below, above = (np.array([0.5 * math.erfc(s * v / math.sqrt(2)) for v in x]) for s in (-1, 1))
    return below, np.log(below) - np.log(above)


def fit(degree: int) -> tuple[np.ndarray, float]:
    x = np.linspace(-EDGE, EDGE, 8002)
    phi, logit = exact(x)
    gelu = x * phi
    scale = np.maximum(np.abs(gelu), SMALLEST)
    basis = np.stack([x ** (2 * i + 1) for i in range(degree + 1)], 1)
    slope = np.abs(x * phi * (1 - phi)) / scale  # of the error, by that of the logit
    weight, best = slope.copy(), (np.zeros(degree + 1), math.inf)
    for _ in range(600):
        c = np.linalg.lstsq(basis * weight[:, None], logit * weight, rcond=None)[0]
        error = np.abs(x / (1 + np.exp(-(basis @ c))) - gelu) / scale
        if error.max() < best[1]:
            best = c, error.max()
        weight *= 0.7 + 0.6 * error / error.max()
        weight *= slope.max() / weight.max()
    return best


if __name__ == "__main__":
    for degree in (3, 4, 5):
        coefficients, error = fit(degree)
        print(f"degree {degree}: error {error:.2e} of the value:", ", ".join(f"{c:.8e}" for c in coefficients))
