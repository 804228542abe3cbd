"""integrate_and_fire against the two forms that people write: frame by frame, and differences of running sums."""

from collections.abc import Callable
from functools import partial

import torch
from measure import alternate, arguments, record
from mediatok.kernels.cif import integrate_and_fire
from torch import Tensor

CHANNELS = 512
FORWARD = {"30 s of speech": (1, 500), "5 min": (1, 5000), "20 min": (1, 20_000), "4 x 5 min": (4, 5000)}
BACKWARD = {"4 x 30 s": (4, 500), "4 x 2 min": (4, 2000)}
SLOW = 10_000  # frames in all, with a gradient 2,000: beyond, the loop takes too long to repeat


def loop(hidden_BTD: Tensor, rates_BT: Tensor) -> Tensor:
    level_B, filled_BD = torch.zeros_like(rates_BT[:, 0]), torch.zeros_like(hidden_BTD[:, 0])
    frames, fires = [], []
    for t in range(rates_BT.shape[1]):
        rate_B, missing_B = rates_BT[:, t], 1 - level_B
        level_B = level_B + rate_B
        fires_B = level_B >= 1
        level_B = torch.where(fires_B, level_B - 1, level_B)
        used_B = torch.where(fires_B, missing_B, rate_B)
        filled_BD = filled_BD + used_B[:, None] * hidden_BTD[:, t]
        frames.append(filled_BD)
        fires.append(fires_B)
        filled_BD = torch.where(fires_B[:, None], (rate_B - used_B)[:, None] * hidden_BTD[:, t], filled_BD)
    return _stacked(torch.stack(frames, dim=1), torch.stack(fires, dim=1))


def running_sums(hidden_BTD: Tensor, rates_BT: Tensor) -> Tensor:
    mass_BT = rates_BT.cumsum(dim=1, dtype=torch.float64).float()
    whole_BT = mass_BT.floor()
    fires_BT = whole_BT > torch.nn.functional.pad(whole_BT, (1, 0))[:, :-1]
    until_BTD = (rates_BT[..., None] * hidden_BTD).cumsum(dim=1) - (mass_BT - whole_BT)[..., None] * hidden_BTD
    ends = [until_TD[fires_T] for until_TD, fires_T in zip(until_BTD, fires_BT, strict=True)]
    ends = [torch.cat([end[:1], end[1:] - end[:-1]]) for end in ends]
    return torch.nn.utils.rnn.pad_sequence(ends, batch_first=True)


def _stacked(frames_BTD: Tensor, fires_BT: Tensor) -> Tensor:
    rows = [frames_TD[fires_T] for frames_TD, fires_T in zip(frames_BTD, fires_BT, strict=True)]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


def ours(hidden_BTD: Tensor, rates_BT: Tensor) -> Tensor:
    return integrate_and_fire(hidden_BTD, rates_BT)[0]


WAYS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"loop": loop, "sums": running_sums, "ours": ours}


def inputs(shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(0)
    return torch.randn(*shape, CHANNELS, generator=rng), torch.rand(shape, generator=rng) * 0.5


def with_gradient(way: Callable, hidden_BTD: Tensor, rates_BT: Tensor) -> None:
    with torch.inference_mode(False), torch.enable_grad():
        hidden_BTD, rates_BT = (x.clone().requires_grad_() for x in (hidden_BTD, rates_BT))
        tokens_BKD = way(hidden_BTD, rates_BT)
        torch.autograd.grad(tokens_BKD, (hidden_BTD, rates_BT), torch.ones_like(tokens_BKD))


def error(tokens_BKD: Tensor, expected_BKD: Tensor) -> float:
    """Largest difference, over the tokens that both have: rounding may cost the sums one."""
    rows = min(tokens_BKD.shape[1], expected_BKD.shape[1])
    return float((tokens_BKD[:, :rows].double() - expected_BKD[:, :rows]).abs().max())


def row(name: str, shape: tuple[int, int], is_backward: bool, repeats: int) -> str:
    hidden, rates = inputs(shape)
    calls = {way: partial(with_gradient, call) if is_backward else call for way, call in WAYS.items()}
    calls = {way: partial(call, hidden, rates) for way, call in calls.items()}
    if shape[0] * shape[1] > (SLOW // 5 if is_backward else SLOW):
        del calls["loop"]
    times = alternate(calls, repeats)
    errors = "-"
    if "loop" in calls and not is_backward:
        exact = loop(hidden.double(), rates.double())
        errors = " / ".join(f"{error(call(hidden, rates), exact):.0e}" for call in WAYS.values())
    cells = [f"{times[way]['wall'] * 1e3:.2f} ({times[way]['cpu'] * 1e3:.2f})" if way in times else "-" for way in WAYS]
    ratios = [
        f"{times[way]['wall'] / times['ours']['wall']:.0f}x ({times[way]['cpu'] / times['ours']['cpu']:.0f}x)"
        if way in times
        else "-"
        for way in ("loop", "sums")
    ]
    return f"| {name} {shape} | {' | '.join([*cells, *ratios, errors])} |"


def main() -> None:
    options = arguments(__doc__)
    lines = [
        f"Milliseconds of wall (processor) time, {CHANNELS} channels, fp32; errors against the loop in fp64.",
        "",
        "| forward | loop | sums | ours | faster than loop | than sums | error: loop / sums / ours |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        *(row(name, shape, False, options.repeats) for name, shape in FORWARD.items()),
        "",
        "| with gradient | loop | sums | ours | faster than loop | than sums | |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        *(row(name, shape, True, options.repeats) for name, shape in BACKWARD.items()),
    ]
    record("cif", lines, options)


if __name__ == "__main__":
    main()
