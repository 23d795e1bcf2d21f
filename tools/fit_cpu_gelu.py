"""Fits the coefficients of GELU(x) = x/2 + |x| H(|x|), H(t) = erf(t / sqrt 2) / 2, and of its derivative
GELU'(x) = 1/2 + sign(x) G(|x|), G(t) = H(t) + t phi(t), and writes gelu_coefficients.h.

    python tools/fit_cpu_gelu.py          # rewrites the header, prints the errors it reached

Two forms of H, for t = |x|; of G the table only:
  table     16 segments centred on k * WIDTH, a polynomial of degree 5 in the distance to the centre (AVX-512: one
            register holds one coefficient of all segments, so a look-up is one permute). The last segment of H is 1/2;
            t / WIDTH is capped at LAST, a little before its end.
  rational  t * P(t^2) / Q(t^2) up to LIMIT, where it reaches 1/2 (everything else).
Needs numpy and mpmath.
"""

from pathlib import Path

import mpmath
import numpy as np

WIDTH, DEGREE, SEGMENTS, LAST = 0.39, 5, 16, 15.49
LIMIT, P_DEGREE, Q_DEGREE = 5.6, 5, 5


def half_erf(t):
    return np.array([float(mpmath.erf(mpmath.mpf(float(v)) / mpmath.sqrt(2)) / 2) for v in np.ravel(t)]).reshape(
        np.shape(t)
    )


def slope(t):
    return half_erf(t) + t * np.exp(-t * t / 2) / np.sqrt(2 * np.pi)


def fit_table(function) -> np.ndarray:
    nodes = np.cos((np.arange(64) + 0.5) * np.pi / 64) / 2
    table = np.zeros((DEGREE + 1, SEGMENTS))
    for k in range(SEGMENTS):
        series = np.polynomial.chebyshev.Chebyshev.fit(nodes, function((nodes + k) * WIDTH), DEGREE, domain=[-0.5, 0.5])
        table[:, k] = series.convert(kind=np.polynomial.Polynomial).coef
    table[::2, 0] = 0  # both functions are odd: exactly 0 at 0
    return table.astype(np.float32)


def evaluate_table(table: np.ndarray, t: np.ndarray) -> np.ndarray:
    s = np.minimum(t.astype(np.float32) * np.float32(1 / WIDTH), np.float32(LAST))
    k = np.rint(s).astype(int)
    u = s - k.astype(np.float32)
    out = table[DEGREE][k]
    for d in range(DEGREE - 1, -1, -1):
        out = (out.astype(np.float64) * u + table[d][k]).astype(np.float32)  # a fused multiply-add
    return out


def fit_rational() -> tuple[np.ndarray, np.ndarray]:
    """Lawson's reweighted least squares on P(u) - (H(t)/t) Q(u) = 0, Q(0) = 1, u = t^2 scaled to [0, 1]."""
    t = LIMIT * np.sin(np.linspace(1e-4, 1, 3000) * np.pi / 2)
    u, target = (t / LIMIT) ** 2, half_erf(t) / t
    weight, q_value = np.ones_like(t), np.ones_like(t)
    for _ in range(200):
        rows = np.concatenate(
            [
                np.vander(u, P_DEGREE + 1, increasing=True),
                -target[:, None] * np.vander(u, Q_DEGREE + 1, increasing=True)[:, 1:],
            ],
            axis=1,
        )
        scale = np.sqrt(weight) * t / q_value  # the error that counts is that of H
        solution = np.linalg.lstsq(rows * scale[:, None], target * scale, rcond=None)[0]
        p, q = solution[: P_DEGREE + 1], np.concatenate([[1], solution[P_DEGREE + 1 :]])
        q_value = np.polyval(q[::-1], u)
        error = np.abs(t * (np.polyval(p[::-1], u) / q_value - target))
        weight = weight * (error / error.max() + 1e-3)
        weight /= weight.sum()
    powers = LIMIT ** (2.0 * np.arange(max(P_DEGREE, Q_DEGREE) + 1))
    p, q = (p / powers[: P_DEGREE + 1]), (q / powers[: Q_DEGREE + 1]).astype(np.float32)
    while evaluate_rational(p.astype(np.float32), q, np.array([LIMIT]))[0] < 0.5:  # so that min(H, 1/2) saturates
        p = p * (1 + 2.0**-25)
    return p.astype(np.float32), q


def evaluate_rational(p: np.ndarray, q: np.ndarray, t: np.ndarray) -> np.ndarray:
    t = np.minimum(t.astype(np.float32), np.float32(LIMIT))
    u = t * t

    def horner(c: np.ndarray) -> np.ndarray:
        out = np.full_like(u, c[-1])
        for value in c[-2::-1]:
            out = (out.astype(np.float64) * u + value).astype(np.float32)
        return out

    return np.minimum(t * horner(p) / horner(q), np.float32(0.5))


def c_array(values: np.ndarray) -> str:
    return ", ".join(f"{float(v):.9e}f" for v in values)


def main() -> None:
    t = np.linspace(0, 8, 200_001)
    exact = half_erf(t)
    table, slopes = fit_table(half_erf), fit_table(slope)
    table[:, -1] = [0.5] + [0] * DEGREE
    p, q = fit_rational()
    for name, value in (("table", evaluate_table(table, t)), ("rational", evaluate_rational(p, q, t))):
        error = np.abs(value - exact)
        print(f"{name:9s} max |H error| {error.max():.2e}, max |t * error| {(t * error).max():.2e}, at 8: {value[-1]}")
    value = evaluate_table(slopes, t)
    print(f"slopes    max |G error| {np.abs(value - slope(t)).max():.2e}, at 8: {value[-1]}")
    rows, slope_rows = ("\n".join(f"    {{{c_array(row)}}}," for row in part) for part in (table, slopes))
    header = f"""// Written by tools/fit_cpu_gelu.py: do not edit.
#pragma once

namespace ffnet::gelu_coefficients {{

// H(t) = erf(t / sqrt 2) / 2 near t = k * width: sum over d of table[d][k] * (t / width - k)^d, t / width up to last.
constexpr float inverse_width = {1 / WIDTH:.9e}f;
constexpr float last = {LAST}f;
alignas(64) constexpr float table[{DEGREE + 1}][{SEGMENTS}] = {{
{rows}
}};

// G(t) = H(t) + t * exp(-t^2 / 2) / sqrt(2 pi), in the same form.
alignas(64) constexpr float slopes[{DEGREE + 1}][{SEGMENTS}] = {{
{slope_rows}
}};

// H(t) = t * P(t^2) / Q(t^2), capped at 1/2, for t up to limit.
constexpr float limit = {LIMIT}f;
constexpr float p[{P_DEGREE + 1}] = {{{c_array(p)}}};
constexpr float q[{Q_DEGREE + 1}] = {{{c_array(q)}}};

}}  // namespace ffnet::gelu_coefficients
"""
    (Path(__file__).parents[1] / "csrc" / "cpu" / "gelu_coefficients.h").write_text(header)


if __name__ == "__main__":
    main()
