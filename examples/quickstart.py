"""Fit, test, export and deploy CseGaussian on photographs of bricks with drawn defects; nothing is downloaded."""

from pathlib import Path

from anomalib.data import PredictDataset
from anomalib.deploy import OpenVINOInferencer
from anomalib.engine import Engine
from PIL import Image

from anomalib_cse import CseGaussian
from anomalib_cse.data import SurfaceDemo
from anomalib_cse.data.demo import DEFECTS

print("The model is CseGaussian, fitted in one pass. The paper's own, trained for 100 epochs, is Cse.")
datamodule = SurfaceDemo(category="brick")
model = CseGaussian(backbone="pypi:tf_efficientnet_lite0", seed=0)
engine = Engine()
engine.fit(model, datamodule=datamodule)
[metrics] = engine.test(model, datamodule=datamodule)
results = Path(engine.trainer.default_root_dir)

print("Scoring the test images with the model just fitted")
scored = [image for batch in engine.predict(model, datamodule=datamodule) for image in batch]
pictures, verdicts = [], []
for kind in ("good", *DEFECTS):
    images = sorted(
        (image for image in scored if Path(image.image_path).parent.name == kind), key=lambda image: image.pred_score
    )
    verdicts.append(f"{kind}: {sum(bool(image.pred_label) for image in images)} of {len(images)} called anomalous")
    middling = Path(images[len(images) // 2].image_path).name
    pictures.append(Image.open(next(results.glob(f"images/**/{kind}/{middling}"))))
overview = Image.new("RGB", (pictures[0].width, sum(p.height for p in pictures)))
for row, picture in enumerate(pictures):
    overview.paste(picture, (0, row * picture.height))
overview.save(results / "overview.png")

exported = engine.export(model, export_type="openvino", export_root=results)
inferencer = OpenVINOInferencer(exported)
photograph = Path(datamodule.root) / datamodule.category / "test" / "stain" / "000.png"
deployed = inferencer.predict(photograph)
[predicted] = engine.predict(model, dataset=PredictDataset(photograph))

print(f"\nimage AUROC {metrics['image_AUROC']:.3f}, pixel AUROC {metrics['pixel_AUROC']:.3f} on {datamodule.category}")
print(
    f"{photograph}: anomalous {bool(deployed.pred_label.item())}, score {deployed.pred_score.item():.4f} in OpenVINO,"
)
print(f"  {predicted.pred_score.item():.4f} in torch")
print("\n".join(verdicts))
print(f"heat maps: {results / 'overview.png'}, of each kind the image with the middling score;")
print(f"  one per image in {results / 'images'}")
print(f"report: {results / 'report.html'}, to choose a threshold by")
print(f"model: {exported}")
