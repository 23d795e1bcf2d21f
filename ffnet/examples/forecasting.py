"""FFNet for time series on the weekly CO2 at Mauna Loa that statsmodels ships, against simple forecasts.

python -m ffnet.examples.forecasting [--epochs 30] [--out build/forecasting]

1958 to 2001, ppm; missing weeks are interpolated. The last fifth of the weeks is tested, the tenth before it chooses
the epoch, the rest is trained on. From 104 weeks the next 52 are forecast, from every week on. Simple forecasts are the
last value; the value 52 weeks before; and that plus the last year's change.

What follows 2001 is then forecast by

python -m ffnet forecast build/forecasting/series.csv --checkpoint build/forecasting/model.pth
"""

from __future__ import annotations

import copy
import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..forecasting import ForecastFFNet
from ..profile import count_parameters
from .files import parser_of, save, started

LOOKBACK, HORIZON, PERIOD = 104, 52, 52
BATCH, RATE = 64, 2e-3
METHODS = ("last value", "seasonal naive", "seasonal naive + drift")


def weekly_co2() -> Tensor:
    """[weeks, 1] in ppm."""
    try:
        from statsmodels.datasets import co2
    except ModuleNotFoundError:
        sys.exit("the series of statsmodels is needed: pip install 'ffnet-kernels[examples]' brings it")
    values = co2.load_pandas().data["co2"].to_numpy()
    weeks, known = np.arange(len(values)), np.isfinite(values)
    return torch.tensor(np.interp(weeks, weeks[known], values[known]), dtype=torch.float32)[:, None]


def windows(series: Tensor, first: int, stop: int) -> tuple[Tensor, Tensor]:
    """Windows to read [N, lookback, 1] and what follows them [N, horizon, 1], the latter within weeks ``first`` to
    ``stop``."""
    whole = series[max(first - LOOKBACK, 0) : stop].unfold(0, LOOKBACK + HORIZON, 1).transpose(1, 2)
    return whole[:, :LOOKBACK], whole[:, LOOKBACK:]


def simple_forecasts(past: Tensor) -> dict[str, Tensor]:
    last, year_before = past[:, -1:], past[:, -PERIOD:]
    growth = last - past[:, -PERIOD - 1 : -PERIOD]
    return dict(zip(METHODS, (last.expand(-1, HORIZON, -1), year_before, year_before + growth), strict=True))


def train(model: ForecastFFNet, data: tuple[Tensor, Tensor], held: tuple[Tensor, Tensor], epochs: int) -> None:
    """Trains, and keeps the weights of the epoch that is best on ``held``."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    best, weights = float("inf"), model.state_dict()
    for epoch in range(1, epochs + 1):
        model.train()
        for rows in torch.randperm(len(data[0])).split(BATCH):
            loss = F.mse_loss(model(data[0][rows]), data[1][rows])
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        schedule.step()
        error = F.mse_loss(predict(model, held[0]), held[1]).item()
        if error < best:
            best, weights = error, copy.deepcopy(model.state_dict())
        if epoch % 5 == 0 or epoch == epochs:
            print(f"epoch {epoch:3} of {epochs}: squared error {error:.3f}, best so far {best:.3f}", flush=True)
    model.load_state_dict(weights)


@torch.no_grad()
def predict(model: ForecastFFNet, past: Tensor) -> Tensor:
    model.eval()
    return torch.cat([model(rows) for rows in past.split(256)])


def draw(past: Tensor, future: Tensor, forecasts: dict[str, Tensor]) -> Any:
    """The last window's forecasts, and the error by weeks ahead."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    ahead = np.arange(1, HORIZON + 1)
    left.plot(np.arange(1 - PERIOD, 1), past[-1, -PERIOD:, 0], color="0.6", label="read (last year of two)")
    left.plot(ahead, future[-1, :, 0], color="black", label="measured")
    for name, forecast in forecasts.items():
        style: dict[str, Any] = {"linewidth": 2} if name == "FFNet" else {"linestyle": "--", "linewidth": 1}
        left.plot(ahead, forecast[-1, :, 0], label=name, **style)
        right.plot(ahead, (forecast - future).abs().mean((0, 2)), label=name, **style)
    left.set(title="CO2 at Mauna Loa, the last window of the test", xlabel="weeks ahead", ylabel="ppm")
    right.set(title=f"mean absolute error of {len(past)} test windows", xlabel="weeks ahead", ylabel="ppm")
    left.legend(fontsize=7)
    right.set_ylim(bottom=0)
    return figure


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = parser_of("forecasting", __doc__)
    parser.add_argument("--epochs", type=int, default=30, help="of training (default: %(default)s)")
    parser.add_argument("--dim", type=int, default=32, help="features (default: %(default)s)")
    options = started(parser, argv)
    series = weekly_co2()
    test, held = int(0.8 * len(series)), int(0.7 * len(series))
    model = ForecastFFNet(1, LOOKBACK, HORIZON, options.dim)
    data = windows(series, 0, held)
    print(
        f"FFNet for time series, {count_parameters(model):,} parameters, {len(data[0])} windows of {len(series)} weeks"
    )
    start = time.perf_counter()
    train(model, data, windows(series, held, test), options.epochs)
    seconds = time.perf_counter() - start
    past, future = windows(series, test, len(series))
    forecasts = {**simple_forecasts(past), "FFNet": predict(model, past)}
    errors = {
        name: {"mse": (forecast - future).square().mean().item(), "mae": (forecast - future).abs().mean().item()}
        for name, forecast in forecasts.items()
    }
    print(f"{'tested on ' + str(len(past)) + ' windows':28}{'MSE':>8}{'MAE':>8}   ppm² and ppm, {HORIZON} weeks")
    for name, error in errors.items():
        print(f"{name:28}{error['mse']:8.3f}{error['mae']:8.3f}")
    result = {
        "series": "weekly CO2 at Mauna Loa, statsmodels", "lookback": LOOKBACK, "horizon": HORIZON, "dim": options.dim,
        "parameters": count_parameters(model), "epochs": options.epochs, "seconds": round(seconds, 1), "errors": errors,
    }  # fmt: skip
    figure = draw(past, future, forecasts)
    text = "co2\n" + "".join(f"{value:.2f}\n" for value in series[:, 0].tolist())
    inputs = {"series.csv": lambda file: file.write(text.encode())}
    save(options.out, result, lambda file: figure.savefig(file, dpi=80, format="png"), model, inputs)
    return result


if __name__ == "__main__":
    main()
