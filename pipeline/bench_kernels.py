"""Mamba's scan and Hyena's long convolution beside what a user would run instead: time, peak memory, slopes.

Every measurement is a process of its own, in turn with the others; peers from packages run in an environment of their
own (`.ci/bench-constraints.txt`). Of the convolution, whose ratios are small, both also run in turn in one process, and
the median of the ratios counts; so do two lengths for its slope. ``python -m pipeline.bench_kernels`` needs this
repository and torch alone.
"""

import math
import statistics
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline import measure
from pipeline.measure import Promise
from pipeline.training.precision import choose_device

_BATCH, _INNER, _STATE = 8, 512, 16
_HEAD = 64  # channels that share a decay in the SSD
_CONV_CAUSAL_BATCH = 1
_LONG_TOKENS = 2**16  # of a CUDA batch: longer sequences come in smaller ones
_OURS, _ATTENTION, _RFFT = "ours", "torch SDPA, bf16", "torch rfft"
_IN_TURN, _SLOPE = "ours and torch rfft in turn", "slope"  # contestants in one process
_CHANNELS_LAST = "torch conv2d, channels last"
_KERNEL = 9
#: convolutions with a short kernel for each channel, on a GPU: there ours has the channels first, which is not cuDNN's
_SHORT = {"depthwise": torch.float32, "depthwise bf16": torch.bfloat16}
_PYTHONS = {"peers": measure.PEER_PYTHON}
_QUADRATIC_MIB = 40_000  # that a peer with a state for each position may need before it is left out

Size = Literal["full", "tiny"]
Cell = dict[str, Any]

#: nt beyond which a contestant is left out: the backward pass of this one takes 37 s at 512, and grows with the square
_LONGEST = {"transformers, slow path": 128}
#: contestants of the scan: name -> (what makes it, the kernels it is allowed, the interpreter)
_SCANS = {
    _OURS: ("ours", "auto", ""),
    "ours, plain PyTorch": ("ours", "reference", ""),
    "ours, SSD (another model)": ("ssd", "auto", ""),
    "unbind loop": ("unbind_loop", "auto", ""),
    "associative scan": ("associative", "auto", ""),
    "mamba.py pscan": ("mamba_py", "auto", "peers"),
    "transformers, slow path": ("transformers", "auto", "peers"),
}
#: pure PyTorch, and not of this project: what the promises compare with
_PURE_PYTORCH = ("unbind loop", "associative scan", "mamba.py pscan", "transformers, slow path")
_CUDA_SCANS = {
    _OURS: ("ours", "auto", ""),
    "ours, triton": ("triton", "auto", ""),
    "mamba-ssm": ("mamba-ssm", "auto", ""),
    "ours, plain PyTorch": ("ours", "reference", ""),
    "associative scan": ("associative", "auto", ""),
}


def run(*, size: Size = "full", rounds: int = 2, record: Path | None = None) -> list[dict[str, Any]]:
    """Measure, print a table and the promises, and write both as JSON.

    Args:
        size: "tiny" shows in a few seconds that everything works.
        rounds: how often each cell is measured, in turn; the median counts.
        record: JSON file; None = ``tests/benchmarks/kernels-<class>.json``.

    Returns:
        One dict a comparison: what, shape, threads, ours and peer (ms), peer_name, ratio (peer / ours), its quartiles
        where both ran in turn, peak_mib, peer_peak_mib.
    """
    cells = _cuda_cells(size) if torch.cuda.is_available() else _cpu_cells(size)
    results = measure.interleave(cells, module="pipeline.bench_kernels", rounds=rounds, pythons=_PYTHONS)
    found = [(cell, result) for cell, result in zip(cells, results, strict=True) if result is not None]
    rows = _compare(found)
    promises = [*_scan_promises(rows), *_conv_promises(rows), *_slope_promises(found)]
    measure.publish(rows, stem="kernels", promises=promises, record=record)
    return rows


def _cpu_cells(size: Size) -> list[Cell]:
    lengths, threads = ((128, 512, 2048), (1, 2)) if size == "full" else ((16,), (1,))
    peers = measure.PEER_PYTHON.exists()
    if not peers:
        print(
            "bench-kernels: .venv-bench is missing; its peers are left out. Next: make bench-kernels", file=sys.stderr
        )
    names = [name for name, (_, _, python) in _SCANS.items() if peers or not python]
    names = names if size == "full" else [_OURS, "unbind loop"]
    cells = [
        _scan_cell(name, length, count)
        for count in threads
        for length in lengths
        for name in names
        if length <= _LONGEST.get(name, length)
    ]
    positions = (128, 256, 1024, 4096, 2**14, 2**16, 2**18, 2**19, 2**20) if size == "full" else (64,)
    return cells + _conv_cells(positions, threads)


def _conv_cells(positions: Sequence[int], threads: Sequence[int]) -> list[Cell]:
    """Each alone for its memory, both in turn, and slopes to the longest: over the top octave and from 65,536 on."""
    *others, longest = positions
    starts = sorted({*others[-1:], 2**16} & set(others))
    return [
        cell
        for count in threads
        for cell in (
            *(_cell("conv", who, length, count) for length in positions for who in (_OURS, _RFFT, _IN_TURN)),
            *(_cell("conv", _SLOPE, longest, count) | {"start": start} for start in starts),
        )
    ]


def _cuda_cells(size: Size) -> list[Cell]:
    lengths = (177, 512, 2048, 8192, 32768, 65536) if size == "full" else (64, 128)
    names = [name for name in _CUDA_SCANS if name != "mamba-ssm" or _has_mamba_ssm()]
    quick = {_OURS, "ours, triton", "mamba-ssm"}
    cells = [
        _scan_cell(name, n, 0) for n in lengths for name in names if name in quick or _states_mib(n) < _QUADRATIC_MIB
    ]
    cells = [cell for cell in cells if cell["who"] != "ours, plain PyTorch" or cell["length"] <= 2048]
    cells += _conv_cells((256, 4096, 2**16, 2**19, 2**20) if size == "full" else (64, 128), (0,))
    cells += [_cell(what, who, n, 0) for what in _SHORT for n in lengths[:3] for who in (_OURS, _CHANNELS_LAST)]
    return cells + [_cell("attention", _ATTENTION, length, 0) for length in lengths]


def _has_mamba_ssm() -> bool:
    try:
        import mamba_ssm.ops.selective_scan_interface  # noqa: F401
    except Exception:  # a compiled extra raises anything
        return False
    return True


def _states_mib(length: int) -> float:
    """Of the states of all positions that an associative scan keeps, ten times over."""
    return 40 * _batch(length) * length * _INNER * _STATE / 2**20


def _scan_cell(name: str, length: int, threads: int) -> Cell:
    _, kernels, python = (_CUDA_SCANS if threads == 0 else _SCANS)[name]
    return _cell("scan", name, length, threads) | {"kernels": kernels, "python": python}


def _cell(what: str, who: str, length: int, threads: int) -> Cell:
    return {"what": what, "who": who, "length": length, "threads": threads}


# --- one measurement, in its own process ---


def measure_cell(cell: Cell) -> dict[str, float]:
    """Milliseconds and extra peak MiB of forward alone, and of both ways; or what contestants in turn give."""
    if cell["threads"]:
        torch.set_num_threads(cell["threads"])
    in_turn = {_IN_TURN: _ratios, _SLOPE: _slope}.get(cell["who"])
    if in_turn:
        with choose_device():
            return in_turn(cell)
    whats = {"scan": _prepare_scan, "conv": _prepare_conv, "attention": _prepare_attention}
    prepare = whats.get(cell["what"]) or partial(_prepare_short, _SHORT[cell["what"]])
    with choose_device():
        short, operands = prepare(cell["who"], 8), prepare(cell["who"], cell["length"])
        _both(*short)  # compiles, loads and chooses
        return _times(*operands)


def _times(call: Callable[..., Tensor], operands: Sequence[Tensor]) -> dict[str, float]:
    before = measure.held_mib()
    found = {"forward_ms": 1000 * measure.seconds(lambda: _forward(call, operands))}
    found["forward_mib"] = measure.peak_mib() - before
    found["both_ms"] = 1000 * measure.seconds(lambda: _both(call, operands))
    found["both_mib"] = measure.peak_mib() - before
    return found


def _ratios(cell: Cell) -> dict[str, float]:
    """Milliseconds of both contestants, and quartiles of the ratios of one turn."""
    (ours, operands), (peer, _) = (_prepare_conv(who, cell["length"]) for who in (_OURS, _RFFT))
    found: dict[str, float] = {}
    for name, way in (("forward", _forward), ("both", _both)):
        turns = measure.in_turn(partial(way, ours, operands), partial(way, peer, operands))
        found |= {f"{name}_ms": 1000 * statistics.median(mine for mine, _ in turns)}
        found |= {f"{name}_peer_ms": 1000 * statistics.median(theirs for _, theirs in turns)}
        quartiles = statistics.quantiles((theirs / mine for mine, theirs in turns), n=4)
        found |= {f"{name}_{key}": x for key, x in zip(("low", "ratio", "high"), quartiles, strict=True)}
    return found


def _slope(cell: Cell) -> dict[str, float]:
    """Median exponent of time in length, forward and backward, of turns with both lengths."""
    lengths = cell["start"], cell["length"]
    turns = measure.in_turn(*(partial(_both, *_prepare_conv(_OURS, length)) for length in lengths))
    slopes = [math.log(long / short) / math.log(lengths[1] / lengths[0]) for short, long in turns]
    return {"slope": statistics.median(slopes)}


def _forward(call: Callable[..., Tensor], operands: Sequence[Tensor]) -> None:
    with torch.inference_mode():
        call(*operands)


def _both(call: Callable[..., Tensor], operands: Sequence[Tensor]) -> None:
    output = call(*operands)
    torch.autograd.grad(output, operands, torch.ones_like(output))


def _batch(length: int) -> int:
    return max(1, min(_BATCH, _LONG_TOKENS // length)) if torch.cuda.is_available() else _BATCH


def _prepare_scan(who: str, length: int) -> tuple[Callable[..., Tensor], list[Tensor]]:
    torch.manual_seed(0)
    batch = _batch(length)
    operands = [
        torch.randn(batch, length, _INNER),
        F.softplus(torch.randn(batch, length, _INNER) - 3),
        -torch.arange(1.0, _STATE + 1).repeat(_INNER, 1),
        torch.randn(batch, length, _STATE),
        torch.randn(batch, length, _STATE),
        torch.ones(_INNER),
    ]
    return _scan({**_SCANS, **_CUDA_SCANS}[who][0]), [operand.requires_grad_() for operand in operands]


def _scan(made_by: str) -> Callable[..., Tensor]:
    from models.layers import selective_scan

    own = {"ours": selective_scan.selective_scan, "ssd": _ssd}
    if made_by in own:
        return own[made_by]
    kernels = selective_scan.OPERATOR.kernels
    if made_by in kernels:
        kernels[made_by].load()
        return lambda *operands: kernels[made_by].run(*operands, reverse=False)
    return getattr(measure.load_peer("scans"), made_by)


def _ssd(u_BLE: Tensor, delta_BLE: Tensor, A_EN: Tensor, B_BLN: Tensor, C_BLN: Tensor, D_E: Tensor) -> Tensor:
    """Mamba-2's operator on the same sizes: what is each channel's own there is the head's here."""
    from models.layers.ssd import ssd

    delta_BLH, x_BLHP = delta_BLE.unflatten(-1, (-1, _HEAD)).mean(-1), u_BLE.unflatten(-1, (-1, _HEAD))
    A_H, D_H = A_EN.unflatten(0, (-1, _HEAD)).mean((1, 2)), D_E.unflatten(0, (-1, _HEAD)).mean(-1)
    return ssd(x_BLHP, delta_BLH, A_H, B_BLN, C_BLN, D_H).flatten(-2)


def _conv_width(length: int) -> int:
    """Channels of a convolution: the peer needs 11 GiB for 256 of them at a million positions, forward alone."""
    return 256 if length <= 2**14 else 64


def _prepare_conv(who: str, length: int) -> tuple[Callable[..., Tensor], list[Tensor]]:
    from models.layers.long_conv import fft_conv

    torch.manual_seed(0)
    width = _conv_width(length)
    u_BLD = torch.randn(_CONV_CAUSAL_BATCH, length, width)
    operands = [u_BLD, torch.randn(width, length) / length**0.5, torch.randn(width)]

    def ours(u_BLD: Tensor, after_DL: Tensor, skip_D: Tensor) -> Tensor:
        return fft_conv(u_BLD, after_DL, None, skip_D)

    return ours if who == _OURS else rfft_conv, [operand.requires_grad_() for operand in operands]


def rfft_conv(u_BLD: Tensor, after_DL: Tensor, skip_D: Tensor) -> Tensor:
    """Causal long convolution through torch's real transform of twice the length, as Hyena's authors write it."""
    length = u_BLD.shape[1]
    spectrum = torch.fft.rfft(u_BLD.transpose(1, 2), n=2 * length) * torch.fft.rfft(after_DL, n=2 * length)
    return torch.fft.irfft(spectrum, n=2 * length)[..., :length].transpose(1, 2) + skip_D * u_BLD


def _prepare_short(dtype: torch.dtype, who: str, length: int) -> tuple[Callable[..., Tensor], list[Tensor]]:
    from models.layers.causal_conv import conv1d

    torch.manual_seed(0)
    operands = [torch.randn(_batch(length), length, _INNER), torch.randn(_INNER, 1, _KERNEL), torch.randn(_INNER)]

    def ours(x_BLD: Tensor, weight: Tensor, bias_D: Tensor) -> Tensor:
        return conv1d(x_BLD, weight, bias_D, padding=_KERNEL // 2)

    def channels_last(x_BLD: Tensor, weight: Tensor, bias_D: Tensor) -> Tensor:
        image = x_BLD.transpose(1, 2).unsqueeze(2)
        image = F.conv2d(image, weight.unsqueeze(2), bias_D, padding=(0, _KERNEL // 2), groups=_INNER)
        return image.squeeze(2).transpose(1, 2)

    made = [operand.to(dtype).requires_grad_() for operand in operands]
    return ours if who == _OURS else channels_last, made


def _prepare_attention(who: str, length: int) -> tuple[Callable[..., Tensor], list[Tensor]]:
    del who  # for the slope only
    shape = (_batch(length), _INNER // 64, length, 64)
    operands = [torch.randn(shape, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
    return F.scaled_dot_product_attention, operands


# --- what follows from the measurements ---


def _compare(found: Sequence[tuple[Cell, dict[str, Any]]]) -> list[dict[str, Any]]:
    """Every peer beside ours of the same shape; attention, measured for its slope, beside nothing."""
    ours, in_turn = (
        {_place(cell): result for cell, result in found if cell["who"] == who} for who in (_OURS, _IN_TURN)
    )
    rows = []
    for cell, result in found:
        mine, turns = ours.get(_place(cell)), in_turn.get(_place(cell))
        if cell["who"] in (_OURS, _IN_TURN, _SLOPE):
            continue
        for key, suffix in (("forward", "forward"), ("both", "forward + backward")):
            rows.append(
                {
                    "what": f"{cell['what']}, {suffix}",
                    "shape": _shape(cell),
                    "threads": cell["threads"],
                    "ours": mine and round((turns or mine)[f"{key}_ms"], 3),
                    "peer": round(turns[f"{key}_peer_ms"] if turns else result[f"{key}_ms"], 3),
                    "peer_name": cell["who"],
                    "ratio": mine
                    and round(turns[f"{key}_ratio"] if turns else result[f"{key}_ms"] / mine[f"{key}_ms"], 3),
                    "quartiles": turns and [round(turns[f"{key}_{end}"], 3) for end in ("low", "high")],
                    "peak_mib": mine and round(mine[f"{key}_mib"], 1),
                    "peer_peak_mib": round(result[f"{key}_mib"], 1),
                }
            )
    return rows


def _place(cell: Cell) -> tuple[Any, ...]:
    return cell["what"], cell["length"], cell["threads"]


def _shape(cell: Cell) -> str:
    length = cell["length"]
    if cell["what"] in _SHORT:
        return f"B{_batch(length)} L{length} D{_INNER} K{_KERNEL}"
    if cell["what"] == "conv":
        return f"B{_CONV_CAUSAL_BATCH} L{length} D{_conv_width(length)}"
    return f"B{_batch(length)} L{length} E{_INNER}" + (f" N{_STATE}" if cell["what"] == "scan" else "")


def _scan_promises(rows: Sequence[dict[str, Any]]) -> list[Promise]:
    promises = []
    scans = [row for row in rows if row["what"] == "scan, forward + backward" and row["ours"]]
    for threads in sorted({row["threads"] for row in scans}):
        for shape in dict.fromkeys(row["shape"] for row in scans):
            here = [row for row in scans if row["shape"] == shape and row["threads"] == threads]
            where = _where(shape, threads)
            promises += _cuda_scan_promises(here, where) if threads == 0 else _cpu_scan_promises(here, where)
    return promises


def _cpu_scan_promises(rows: Sequence[dict[str, Any]], where: str) -> list[Promise]:
    pure = [row for row in rows if row["peer_name"] in _PURE_PYTORCH]
    if not pure:
        return []
    fastest = min(pure, key=lambda row: row["peer"])
    wanted = 10.0 if int(where.split()[1][1:]) >= 512 else 1.0
    promises = [Promise(f"scan at {where}, times as fast as {fastest['peer_name']}", fastest["ratio"], wanted)]
    if wanted > 1:
        share = fastest["peak_mib"] / max(fastest["peer_peak_mib"], 1)
        promises.append(Promise(f"scan at {where}, share of that peer's memory", share, 0.2, at_most=True))
    return promises


def _cuda_scan_promises(rows: Sequence[dict[str, Any]], where: str) -> list[Promise]:
    peaks = {row["peer_name"]: row["peer"] for row in rows}
    if not {"ours, triton", "mamba-ssm"} <= peaks.keys():
        return []
    wanted = 0.8 if " L177 " in where else 1 / 1.5
    return [Promise(f"own scan at {where}, speed over mamba-ssm's", peaks["mamba-ssm"] / peaks["ours, triton"], wanted)]


def _conv_promises(rows: Sequence[dict[str, Any]]) -> list[Promise]:
    return [
        Promise(f"{row['what']} at {_where(row['shape'], row['threads'])}, times as fast as {_RFFT}", row["ratio"], 1.0)
        for row in rows
        if row["peer_name"] == _RFFT and row["ratio"]
    ]


def _slope_promises(found: Sequence[tuple[Cell, dict[str, Any]]]) -> list[Promise]:
    """Exponent of time in length, over the top octave and from 65,536 on: of the convolution; on a GPU, of the scan."""
    slopes = [
        (_where("conv", c["threads"]), c["start"], c["length"], r["slope"]) for c, r in found if c["who"] == _SLOPE
    ]
    if torch.cuda.is_available():
        times = {
            c["length"]: r["both_ms"] / _batch(c["length"])
            for c, r in found
            if (c["what"], c["who"]) == ("scan", _OURS)
        }
        *starts, long = sorted(times) or [0]
        starts = sorted({*starts[-1:], 2**16} & set(starts))
        slopes += [("scan", n, long, math.log(times[long] / times[n]) / math.log(long / n)) for n in starts]
    return [
        Promise(f"slope of our time, {what}, from L {short:,} to {long:,}", slope, 1.15, at_most=True)
        for what, short, long, slope in slopes
    ]


def _where(what: str, threads: int) -> str:
    return f"{what}, {threads} thread{'s' * (threads != 1)}" if threads else what


if __name__ == "__main__":
    if len(sys.argv) > 1:
        measure.answer(measure_cell)
    else:
        run()
