"""What the benchmarks share: a child process for every measurement, AUPRO of maps as they are, and a table."""

import multiprocessing
import os
import resource
import signal
import statistics
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import cache, partial
from pathlib import Path

import numpy as np
import openvino
import torch
from numpy.typing import NDArray
from scipy.ndimage import label

from anomalib_cse.report.facts import processor

Row = dict[str, str | float]
Network = Callable[[np.ndarray], object]  # takes images (B, 3, H, W) in [0, 1]
QUIET = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}  # for an Engine
SINGLE_PRECISION = {"INFERENCE_PRECISION_HINT": "f32"}  # OpenVINO's default is bfloat16 where the processor has it
OPSET = {"opset_version": 18}  # for exports: anomalib's 14 cannot be had of all networks
LIMIT, POINTS = 0.3, 300  # for AUPRO: the highest rate of false positives, and thresholds up to it


def in_child(measure: Callable[[], Row], *, time_limit: int = 0, memory_limit: float = 0) -> Row:
    """Measure in a fresh process, so that neither memory nor threads are shared with another measurement.

    Args:
        measure: What to run; ``functools.partial`` gives it arguments.
        time_limit: Most seconds that it may take; 0 for no limit.
        memory_limit: Most GiB that it may take; 0 for no limit.

    Returns:
        What it returns, and the process's peak memory; or, under ``failed``, what it died of.
    """
    # glibc's heap fragments under large aligned blocks: Patchcore's coreset grew by 18 MB a step, to 23 GB
    os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", str(2**24))
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        start = time.monotonic()
        future = pool.submit(limited, measure, time_limit, memory_limit)
        error = future.exception()
    if error is None:
        return future.result()
    if isinstance(error, BrokenProcessPool) and time_limit and time.monotonic() - start >= time_limit:
        return {"failed": f"not done after {time_limit} s"}
    traceback.print_exception(error)
    return {"failed": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}


def limited(measure: Callable[[], Row], time_limit: int, memory_limit: float) -> Row:
    """Measure in this process, which ends with its time, its memory or its parent."""
    threading.Thread(target=end_with_parent, daemon=True).start()
    signal.alarm(time_limit)  # ends the process even within a long operation, where Python would not get its turn
    if memory_limit:
        resource.setrlimit(resource.RLIMIT_DATA, (int(memory_limit * 2**30),) * 2)
    return {**measure(), "peak MB": round(peak_memory())}


def end_with_parent() -> None:
    """End this process when its parent has ended, by whatever signal."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def peak_memory() -> float:
    """Return this process's peak resident memory in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def in_turns(runs: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Return the median milliseconds that each run takes, over so many rounds and after two that are not counted.

    All take turns, so that what else the machine does meets them alike.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds + 2):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values[2:]) * 1000 for name, values in seconds.items()}


def per_image(opened: Mapping[str, Callable[[], tuple[Network, np.ndarray]]], rounds: int) -> dict[str, float]:
    """Return the median milliseconds that each network takes for one of its images; those that fail are left out.

    Args:
        opened: Gives a network and its images, and may fail.
        rounds: Of the measurement.
    """
    runs, counts = {}, {}
    for name, ready in opened.items():
        try:
            network, images = ready()
            network(images)
        except Exception as error:  # noqa: BLE001  the others do not depend on it
            traceback.print_exception(error)
            continue
        runs[name], counts[name] = partial(network, images), len(images)
    return {name: milliseconds / counts[name] for name, milliseconds in in_turns(runs, rounds).items()}


@cache
def core() -> openvino.Core:
    """Return OpenVINO's one core of this process.

    Each gives signal handlers a stack, in place of the one before. Of two that end in the order of their beginning,
    OpenVINO 2026.4 leaves handlers the first one's, unmapped: the next signal, be it of a data loader's worker that
    ends, kills the process, or writes into what has got that memory since.
    """
    return openvino.Core()


def compiled(file: Path, config: Mapping[str, str]) -> tuple[openvino.CompiledModel, list[int | None]]:
    """Return an OpenVINO network for the CPU, and the shape of its input, None where that is open.

    Of Patchcore's the export has fixed the number of images, to 2.
    """
    network = core().compile_model(file, "CPU", {"PERFORMANCE_HINT": "LATENCY", **config})
    return network, [side.get_length() if side.is_static else None for side in network.input(0).partial_shape]


def exported_size(network: Path) -> float:
    """Return the size of an exported model in MB, with OpenVINO's weights, which are a file of their own."""
    files = [network, network.with_suffix(".bin")] if network.suffix == ".xml" else [network]
    return sum(file.stat().st_size for file in files) / 1e6


def aupro(maps: NDArray[np.float32], masks: NDArray[np.bool_]) -> float:
    """Return the area under the curve of per-region overlap, of maps and masks ``(N, H, W)``."""
    good = np.sort(maps[~masks])
    thresholds = good[np.round((1 - np.linspace(0, LIMIT, POINTS)) * (len(good) - 1)).astype(int)]

    def share_above(values: NDArray[np.float32]) -> NDArray[np.float64]:
        return 1 - np.searchsorted(values, thresholds, side="right") / len(values)

    overlaps = []
    for values, mask in zip(maps, masks, strict=True):
        regions, count = label(mask, structure=np.ones((3, 3)))
        overlaps += [share_above(np.sort(values[regions == number])) for number in range(1, count + 1)]
    false = share_above(good)
    return float(np.trapezoid(np.mean(overlaps, axis=0), false) / false[-1])


def hardware() -> str:
    """Return processor, number of threads and version of torch in one line."""
    gpu = processor(torch.device("cuda")) if torch.cuda.is_available() else "no GPU"
    return f"{processor(torch.device('cpu'))}, {torch.get_num_threads()} threads, torch {torch.__version__}, {gpu}"


def markdown(rows: Iterable[Mapping[str, str | float]]) -> str:
    """Return a Markdown table; columns in the order of their first appearance."""
    rows = list(rows)
    columns = list(dict.fromkeys(column for row in rows for column in row))
    cells = [[shown(row.get(column, "")) for column in columns] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in [columns, ["---"] * len(columns), *cells])


def shown(value: str | float) -> str:
    """Return a number with three digits, anything else as it is."""
    return f"{float(f'{value:.3g}'):g}" if isinstance(value, float) else str(value)
