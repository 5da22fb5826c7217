"""Fit, test, export and deploy CseGaussian on photographs of bricks with drawn defects; nothing is downloaded."""

import logging
import time
import warnings
from pathlib import Path

# what others warn of here, nobody who runs this can do anything about
warnings.filterwarnings("ignore", module=r"anomalib\.models|lightning|timm|torch")
logging.getLogger("anomalib").setLevel(logging.ERROR)

from anomalib.data import ImageItem, PredictDataset  # noqa: E402
from anomalib.deploy import OpenVINOInferencer  # noqa: E402
from anomalib.engine import Engine  # noqa: E402
from lightning.pytorch.utilities.rank_zero import rank_zero_module  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

import anomalib_cse  # noqa: E402
from anomalib_cse import CseGaussian  # noqa: E402
from anomalib_cse.data import SurfaceDemo  # noqa: E402
from anomalib_cse.data.demo import DEFECT_COUNT, DEFECTS, GOOD_COUNT, TRAIN_COUNT  # noqa: E402

package = str(Path(anomalib_cse.__file__).parent)
rank_zero_module.log.addFilter(lambda record: record.pathname.startswith(package))  # not Lightning's hints


def draw(items: dict[str, ImageItem], file: Path) -> None:
    """Draw a column to an item: image, true mask, heat map and verdict."""
    rows = ("image", "true mask", "heat map", "verdict")
    figure = Figure(figsize=(7.5, 6.4), layout="constrained")
    axes = figure.subplots(len(rows), len(items))
    for column, (kind, item) in zip(axes.T, items.items(), strict=True):
        photograph = item.image.movedim(0, -1).clip(0, 1)
        column[0].set_title(kind)
        column[0].imshow(photograph)
        column[1].imshow(item.gt_mask.squeeze(), cmap="gray", vmin=0, vmax=1)
        column[2].imshow(photograph)
        column[2].imshow(item.anomaly_map.squeeze(), cmap="turbo", vmin=0, vmax=1, alpha=0.6)
        column[3].imshow(photograph)
        if item.pred_mask.any():
            column[3].contour(item.pred_mask.squeeze(), levels=[0.5], colors="red", linewidths=1)
        column[3].set_xlabel(f"{'anomalous' if item.pred_label else 'good'}, {item.pred_score:.2f}")
    for axis, row in zip(axes[:, 0], rows, strict=True):
        axis.set_ylabel(row)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    figure.savefig(file)


print(f"Fitting CseGaussian to {TRAIN_COUNT} photographs of bricks", flush=True)
datamodule = SurfaceDemo(category="brick")
model = CseGaussian(backbone="pypi:tf_efficientnet_lite0", seed=0)
engine = Engine(enable_model_summary=False)
start = time.perf_counter()
engine.fit(model, datamodule=datamodule)
seconds = time.perf_counter() - start
rank_zero_module.log.setLevel(logging.WARNING)  # where the results are is said at the end

print(f"Testing it on {GOOD_COUNT} good photographs and {DEFECT_COUNT} of each of {len(DEFECTS)} defects", flush=True)
[metrics] = engine.test(model, datamodule=datamodule, verbose=False)
results = Path(engine.trainer.default_root_dir)
scored = [image for batch in engine.predict(model, datamodule=datamodule) for image in batch]
middling, verdicts = {}, []
for kind in ("good", *DEFECTS):
    images = sorted(
        (image for image in scored if Path(image.image_path).parent.name == kind), key=lambda image: image.pred_score
    )
    middling[kind] = images[len(images) // 2]
    verdicts.append(f"{kind} {sum(bool(image.pred_label) for image in images)} of {len(images)}")
draw(middling, results / "overview.png")

print("Exporting it to OpenVINO", flush=True)
exported = engine.export(model, "openvino", results, onnx_kwargs={"verbose": False})
photograph = Path(datamodule.root) / datamodule.category / "test" / "stain" / "000.png"
deployed = OpenVINOInferencer(exported).predict(photograph)
[predicted] = engine.predict(model, dataset=PredictDataset(photograph))

print(f"""
Fit and thresholds: {seconds:.0f} s. Image AUROC {metrics["image_AUROC"]:.3f}, pixel AUROC {metrics["pixel_AUROC"]:.3f}.
Called anomalous: {", ".join(verdicts)}.
One photograph's score: {predicted.pred_score.item():.4f} in torch, {deployed.pred_score.item():.4f} exported.

Now look at
  {results / "overview.png"}, of each kind the photograph with the middling score
  {results / "report.html"}, all scores and a threshold to drag
  {exported}, the model, for examples/camera_loop.py""")
