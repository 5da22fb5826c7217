"""Score a folder of images, a video or a camera with an exported Cse or CseGaussian, several frames at once.

    python examples/camera_loop.py exported/weights/openvino/model.xml SOURCE --rejects rejects

Needs openvino, opencv and numpy alone. The exported model takes frames of any size; its scores are scaled so that the
threshold it was trained to is 0.5. A higher ``--threshold`` rejects less: choose it on images of your own line, such
that as many good ones are rejected as you can look at again. A model trained with a ``reject_rate`` knows which scores
good images have; where recent ones have moved away from these, a line says so.
"""

import argparse
import math
import sys
import time
from collections import Counter, deque
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import cv2
import numpy as np
import openvino

AS_ANOMALIB = cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION  # Pillow does not turn images as their EXIF says


def frames(source: str) -> Iterator[tuple[str, np.ndarray]]:
    """Name and BGR image ``(H, W, 3)`` of every file in a folder, or of every frame of a video or camera.

    Raises:
        SystemExit: If the source or one of the files cannot be read, or not as anomalib reads it.
    """
    if Path(source).is_dir():
        entries = sorted(Path(source).iterdir())
        for path in entries:
            if path.is_dir() or path.name.startswith("."):
                print(
                    f"{path} is a {'folder, not looked into' if path.is_dir() else 'hidden file, scored too'}",
                    file=sys.stderr,
                )
        for path in entries:
            if not (path.is_file() or path.is_symlink()) or path.is_dir():
                continue
            # as imread does not open every name on Windows; a link may lead nowhere
            file = np.fromfile(path, np.uint8) if path.exists() else np.empty(0)
            image = cv2.imdecode(file, AS_ANOMALIB | cv2.IMREAD_ANYDEPTH) if len(file) else None
            if image is None:
                raise SystemExit(f"{path} is no image that OpenCV reads: take it out of the folder")
            if image.dtype == np.uint16 and cv2.imdecode(file, cv2.IMREAD_UNCHANGED).ndim == 3:
                image = cv2.imdecode(file, AS_ANOMALIB)  # of 16-bit colours both take the upper 8 bits
            if image.dtype != np.uint8:
                raise SystemExit(
                    f"{path} has {image.dtype} pixels, which OpenCV and anomalib scale differently: "
                    "convert training and other images to 8 bits alike"
                )
            yield path.name, image
        return
    capture = cv2.VideoCapture(int(source) if source.isdigit() else source)
    if not capture.isOpened():
        raise SystemExit(f"{source} is no folder, no video and no number of a camera that OpenCV can open")
    for number in count():
        read, image = capture.read()
        if not read:
            return
        yield f"{number:06}", image


class Drift:
    """Tell when recent scores have moved away from those of good training images, by more than chance.

    What counts is their mean logarithm, as in ``compare_good_images``.

    Args:
        model: The exported model, which holds mean and deviation of the logarithms of such scores.
    """

    RECENT = 100  # frames

    def __init__(self, model: openvino.Model) -> None:
        names = ("number", "mean", "deviation", "threshold", "errors")
        self.usual = {name: float(model.get_rt_info(["good_scores", name]).value) for name in names}
        self.most = self.usual["errors"] * (1 / self.usual["number"] + 1 / self.RECENT) ** 0.5
        self.recent = deque[float](maxlen=self.RECENT)
        self.has_moved = False

    def add(self, score: float) -> str:
        """Return what to say after another score: nothing, unless the recent ones begin or cease to be unusual."""
        ratio = 2 * score if score <= 0.5 else 0.5 / max(1 - score, 1e-7)  # to the threshold; see docs/thresholds.md
        self.recent.append(math.log(max(ratio * self.usual["threshold"], 1e-38)))
        if len(self.recent) < self.RECENT:
            return ""
        shift = (sum(self.recent) / self.RECENT - self.usual["mean"]) / self.usual["deviation"]
        if shift <= self.most / 2 and self.has_moved:
            self.has_moved = False
            return f"the last {self.RECENT} scores are usual again"
        if shift <= self.most or self.has_moved:
            return ""
        self.has_moved = True
        return (
            f"the last {self.RECENT} scores have moved by {shift:+.1f} deviations from those of good training images: "
            "if these frames show good parts, have the model learn of them (python -m anomalib_cse.learn)"
        )


def side_by_side(frame: np.ndarray, anomaly_map: np.ndarray) -> np.ndarray:
    """A frame, at the size of its map, and the map in colours; with a crop in the model, the map is of that part."""
    colours = cv2.applyColorMap((255 * anomaly_map).astype(np.uint8), cv2.COLORMAP_JET)
    return np.hstack([cv2.resize(frame, colours.shape[1::-1], interpolation=cv2.INTER_AREA), colours])


def main() -> None:
    """Load the model once, keep it busy, and print scores and rate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="the exported model.xml")
    parser.add_argument("source", help="a folder of images (not of folders), a video file, or a camera's number")
    parser.add_argument("--threshold", type=float, default=0.5, help="reject what scores above, in [0, 1]")
    rejects = "folder for pictures of what is rejected, ./rejects unless given"
    parser.add_argument("--rejects", type=Path, default=Path("rejects"), help=rejects)
    options = parser.parse_args()
    if not 0 <= options.threshold <= 1:
        parser.error(f"--threshold must be in [0, 1], got {options.threshold}")
    if not Path(options.model).is_file():
        parser.error(f"{options.model} is no file: give the model.xml that anomalib export wrote")
    if Path(options.model).suffix != ".xml":  # which alone tells OpenVINO not to round
        parser.error(f"{options.model} is no .xml: give OpenVINO's model.xml, not another format that was exported")
    options.rejects.mkdir(parents=True, exist_ok=True)
    # one stream with all cores: in several, OpenVINO 2026.4 gives all images one score with 8-bit weights (INT8)
    hints = {"PERFORMANCE_HINT": "THROUGHPUT", "NUM_STREAMS": 1}
    try:
        core = openvino.Core()
        model = core.read_model(options.model)
        compiled = core.compile_model(model, "CPU", hints)
    except RuntimeError as error:
        raise SystemExit(f"{options.model} is no model that OpenVINO reads, with its .bin beside it: {error}") from None
    if not any("pred_label" in output.names for output in compiled.outputs):
        raise SystemExit(f"{options.model} has no threshold: train it with validation images")
    drift = Drift(model) if model.has_rt_info(["good_scores", "errors"]) else None
    queue = openvino.AsyncInferQueue(compiled, jobs=2)  # one frame is read and written while another is scored
    counted = Counter[str]()

    def finished(request: openvino.InferRequest, job: tuple[str, np.ndarray]) -> None:
        name, frame = job
        score = request.get_tensor("pred_score").data.item()
        print(f"{name} {score:.4f}")
        counted["frames"] += 1
        said = drift.add(score) if drift else ""
        if said:
            print(said, file=sys.stderr)
        if score > options.threshold:
            counted["rejected"] += 1
            picture = side_by_side(frame, request.get_tensor("anomaly_map").data.squeeze())
            (options.rejects / f"{name.removesuffix('.png')}.png").write_bytes(
                cv2.imencode(".png", picture)[1].tobytes()
            )

    queue.set_callback(finished)
    start = time.perf_counter()
    try:
        for name, frame in frames(options.source):
            # waits while all requests are busy, so that a fast camera does not fill the memory
            queue.start_async(cv2.dnn.blobFromImage(frame, 1 / 255, swapRB=True), (name, frame))
    except KeyboardInterrupt:
        print("stopped")
    finally:
        queue.wait_all()
    seconds, number = time.perf_counter() - start, counted["frames"]
    if not number:
        raise SystemExit(f"{options.source} gave no image")
    print(f"{number} frames in {seconds:.1f} s, {number / seconds:.0f} a second; {counted['rejected']} rejected")


if __name__ == "__main__":
    main()
