"""What exporting and compressing a trained Cse costs and gains: scores, labels, size and time on its test images.

Differences are those to the model in torch, of anomalib's normalised scores, whose threshold is 0.5. INT8_PTQ takes
its ranges from anomalib's validation images, without their labels. Run by ``make bench-compression``.
"""

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from anomalib.data.utils import read_image
from anomalib.deploy import CompressionType, OpenVINOInferencer
from anomalib.engine import Engine
from sklearn.metrics import roc_auc_score

from anomalib_cse import Cse
from anomalib_cse.datamodules import MVTec

from common import exported_size, hardware, in_child, markdown

COMPRESSIONS = (None, CompressionType.FP16, CompressionType.INT8, CompressionType.INT8_PTQ)
HINTS: tuple[dict[str, str], ...] = ({}, {"INFERENCE_PRECISION_HINT": "f32"})
BAND = 0.02  # labels may differ where the score is this close to the threshold


def images_of(options: argparse.Namespace) -> MVTec:
    """The dataset."""
    return MVTec(root=options.root, category=options.category, num_workers=0)


def in_torch(options: argparse.Namespace, files: list[str]) -> dict[str, Any]:
    """Scores and labels that the model gives in torch."""
    model = Cse.load_from_checkpoint(options.checkpoint).eval()
    with torch.inference_mode():
        results = [model(read_image(file, as_tensor=True)[None]) for file in files]
    return {
        "scores": [result.pred_score.item() for result in results],
        "labels": [result.pred_label.item() for result in results],
    }


def export(options: argparse.Namespace, compression: CompressionType | None, folder: Path) -> dict[str, Any]:
    """Export to OpenVINO."""
    file = Engine(default_root_dir=folder).export(
        Cse.load_from_checkpoint(options.checkpoint),
        "openvino",
        export_root=folder,
        compression_type=compression,
        datamodule=images_of(options),
    )
    return {"file": file, "exported MB": exported_size(Path(file))}


def deployed(file: Path, hint: dict[str, str], files: list[str], folder: Path) -> dict[str, Any]:
    """Scores and labels that an exported model gives, and median milliseconds per image without reading it."""
    os.chdir(folder)  # anomalib's inferencer leaves its cache where it runs
    inferencer = OpenVINOInferencer(file, device="CPU", config={"PERFORMANCE_HINT": "LATENCY", **hint})
    results, seconds = [], []
    for image in map(read_image, files):
        start = time.perf_counter()
        results.append(inferencer.predict(image))
        seconds.append(time.perf_counter() - start)
    return {
        "scores": [result.pred_score.item() for result in results],
        "labels": [bool(result.pred_label.item()) for result in results],
        "ms": statistics.median(seconds) * 1000,
    }


def compared(found: dict[str, Any], expected: dict[str, Any], truth: list[int]) -> dict[str, Any]:
    """AUROC of what was found, and how far it is from what torch gives."""
    scores, reference = np.array(found["scores"]), np.array(expected["scores"])
    difference = np.abs(scores - reference)
    differ = np.array(found["labels"]) != np.array(expected["labels"])
    return {
        "image AUROC": f"{roc_auc_score(truth, scores):.4f}",
        "largest difference": f"{difference.max():.5f}",
        "95 %": f"{np.quantile(difference, 0.95):.5f}",
        "labels differ": int(differ.sum()),
        f"of them beyond {BAND} of the threshold": int((differ & (np.abs(reference - 0.5) > BAND)).sum()),
    }


def main() -> None:
    """Export, score and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, help="of a trained Cse")
    parser.add_argument("--root", required=True, help="dataset in MVTec AD's layout")
    parser.add_argument("--category", required=True, help="a folder in it")
    options = parser.parse_args()
    print(hardware())
    images = images_of(options)
    images.setup()
    samples = images.test_data.samples
    files, truth = samples.image_path.astype(str).tolist(), samples.label_index.tolist()
    files = [str(Path(file).resolve()) for file in files]
    expected = in_child(in_torch, options, files)
    rows = [{"compression": "torch", "image AUROC": f"{roc_auc_score(truth, expected['scores']):.4f}"}]
    for compression in COMPRESSIONS:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            exported = in_child(export, options, compression, folder)
            for hint in HINTS:
                found = in_child(deployed, exported["file"], hint, files, folder)
                rows.append(
                    {
                        "compression": compression.name if compression else "none",
                        "precision": next(iter(hint.values()), "OpenVINO's default"),
                        **compared(found, expected, truth),
                        "exported MB": exported["exported MB"],
                        "ms per image": found["ms"],
                    }
                )
    print(markdown(rows))


if __name__ == "__main__":
    main()
