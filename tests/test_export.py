"""The deployed model against ``Engine.predict``: the same files, the same scores."""

import re
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import openvino
import pytest
import torch
from anomalib.data import MVTecAD, PredictDataset
from anomalib.data.utils import read_image
from anomalib.deploy import CompressionType, ExportType, OpenVINOInferencer, TorchInferencer
from anomalib.engine import Engine
from onnxruntime import InferenceSession
from PIL import ExifTags, Image
from torch.utils.data import DataLoader

from anomalib_cse import Cse
from anomalib_cse.gaussian_fit import Sample, fit

from tiny import QUIET

EXAMPLES = Path(__file__).parents[1] / "examples"
SIZES = [(64, 64), (224, 224), (300, 517), (1024, 1024), (2000, 600)]
F32 = {"INFERENCE_PRECISION_HINT": "f32"}
TOLERANCE = {"pred_score": 1e-4, "anomaly_map": 1e-3, "pred_label": 0}


def surface(size, contrast, rng, channels=3):
    """Coarse blocks under fine noise, which resizing without a filter would alias: ``(H, W, channels)`` uint8."""
    blocks = cv2.resize(rng.random((8, 8, channels)), size[::-1], interpolation=cv2.INTER_NEAREST)
    noise = rng.random((*size, channels))
    return (255 * contrast * (blocks.reshape(noise.shape) + noise) / 2).astype(np.uint8)


def built(embedder, own=True):
    """Random weights; scores of surfaces of low and of high contrast lie on either side of the threshold.

    If it is linear, positions have their own covariances, or else one in common.
    """
    layers = (2, 3) if embedder == "network" else None
    model = Cse("test_efficientnet", layers, pre_trained=False, embedder=embedder, seed=0).eval()
    size = model.pre_processor.transform(torch.zeros(1, 3, 300, 300)).shape[-2:]
    rng = np.random.default_rng(1)
    surfaces = np.stack([surface(size, contrast, rng) for contrast in (0.2, 0.2, 1, 1)])
    images = torch.from_numpy(surfaces).movedim(-1, 1) / 255
    with torch.no_grad():
        if embedder == "network":
            model.model.set_centres(model.model.embed(images[:2]).mean(dim=(0, 2, 3))[None])
        else:
            flat, strong = (model.model.smoothed(model.model.backbone(half)) for half in images.chunk(2))
            sample = Sample(lambda: [flat], lambda: [(strong, torch.ones(2, *size))])
            fit(model.model, sample, sample, lambda: [flat])
            for gaussian in model.model.maps if own else ():
                gaussian.roots += torch.rand(gaussian.roots.shape, generator=torch.manual_seed(0)) / 10
        batch = model.model(images)
    for level, values in (("image", batch.pred_score), ("pixel", batch.anomaly_map)):
        bounds = {f"{level}_min": values.min(), f"{level}_max": values.max(), f"_{level}_threshold": values.mean()}
        for name, value in bounds.items():
            getattr(model.post_processor, name).fill_(value)
    return model


@pytest.fixture(scope="module")
def model():
    return built("linear")


@pytest.fixture(scope="module")
def common():
    return built("linear", own=False)


@pytest.fixture(scope="module")
def common_path(common, folder):
    """Exported for OpenVINO."""
    return export(common, ExportType.OPENVINO, folder / "common")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("exported")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Five files of every size and colour."""
    root, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for size in SIZES:
        for colour, channels in (("grey", 1), ("colour", 3)):
            at = root / f"{size[0]}x{size[1]}" / colour
            at.mkdir(parents=True)
            for number in range(5):
                cv2.imwrite(str(at / f"{number}.png"), surface(size, 1 if number % 2 else 0.2, rng, channels))
    return root


def export(model, kind, root, **options):
    return Engine(default_root_dir=root, **QUIET).export(model, kind, export_root=root, **options)


def predicted(model, path, root):
    """What the engine predicts for five images in one batch."""
    files = PredictDataset(path)
    loader = DataLoader(files, batch_size=5, collate_fn=files.collate_fn)
    [batch] = Engine(default_root_dir=root, **QUIET).predict(model, dataloaders=loader)
    return {field: getattr(batch, field).numpy() for field in TOLERANCE}


def assert_same(results, expected):
    for field, tolerance in TOLERANCE.items():
        ours = np.asarray(results[field], float).reshape(expected[field].shape)
        assert np.abs(ours - expected[field]).max() <= tolerance, field


def onnx(file):
    """ONNX Runtime, as a function from a batch to named outputs."""
    session = InferenceSession(file, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return lambda batch: dict(zip(names, session.run(None, {"input": batch}), strict=True))


def inferencer(tool):
    """One of anomalib's inferencers, as a function from an image to named outputs."""
    return lambda image: {field: getattr(tool.predict(image), field) for field in TOLERANCE}


@pytest.fixture(scope="module")
def paths(model, folder):
    """Exported for images of any size."""
    return {kind: export(model, kind, folder) for kind in ExportType}


@pytest.fixture(scope="module")
def dynamic(paths, folder):
    """What runs the exported models."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRUST_REMOTE_CODE", "1")
        torch_inferencer = TorchInferencer(paths[ExportType.TORCH], device="cpu")
    patch.chdir(folder)  # anomalib's inferencer leaves its cache where it runs
    return {
        "torch": torch_inferencer,
        "openvino": OpenVINOInferencer(paths[ExportType.OPENVINO], device="CPU"),
        "openvino f32": OpenVINOInferencer(paths[ExportType.OPENVINO], device="CPU", config=F32),
        "onnx": onnx(paths[ExportType.ONNX]),
    }


@pytest.mark.parametrize(("size", "colour"), [*((size, "colour") for size in SIZES), (SIZES[2], "grey")])
def test_every_runtime_gives_the_scores_of_the_engine(size, colour, model, dynamic, images, folder):
    path = images / f"{size[0]}x{size[1]}" / colour
    expected = predicted(model, path, folder)
    assert len(set(expected["pred_label"].tolist())) == 2  # else equal labels would mean nothing
    files = sorted(path.iterdir())
    floats = np.stack([read_image(file, as_tensor=True).numpy() for file in files])  # (5, 3, H, W)
    bytes_ = np.stack([cv2.cvtColor(cv2.imread(str(file)), cv2.COLOR_BGR2RGB) for file in files])  # (5, H, W, 3)
    for name, run in dynamic.items():
        if name == "onnx":
            assert_same(run(floats), expected)
            assert_same(run(floats[:1]), {field: value[:1] for field, value in expected.items()})
            continue
        run = inferencer(run)
        assert_same(run(torch.from_numpy(floats)), expected)
        for number, file in enumerate(files[:2]):
            one = {field: value[number : number + 1] for field, value in expected.items()}
            assert_same(run(file), one)
            assert_same(run(bytes_[number]), one)


@pytest.mark.parametrize("size", SIZES[:3:2], ids=lambda size: "x".join(map(str, size)))
def test_a_fixed_input_size_changes_nothing(size, model, images, folder):
    root = folder / f"{size[0]}x{size[1]}"
    paths = [export(model, kind, root, input_size=size) for kind in (ExportType.ONNX, ExportType.OPENVINO)]
    path = images / root.name / "colour"
    expected = predicted(model, path, root)
    floats = np.stack([read_image(file, as_tensor=True).numpy() for file in sorted(path.iterdir())])
    compiled = openvino.Core().compile_model(paths[1], "CPU")
    for run in (onnx(paths[0]), lambda batch: {key.any_name: value for key, value in compiled(batch).items()}):
        assert_same(run(floats), expected)
        assert_same(run(floats[:1]), {field: value[:1] for field, value in expected.items()})
        with pytest.raises(Exception, match=r"(?i)shape|dimension"):
            run(floats[..., :-1])


def test_the_papers_network_exports_to_what_it_is(images, tmp_path):
    """In one file for ONNX Runtime and one for OpenVINO, whose default precision leaves it alone."""
    model = built("network")
    path = images / "300x517" / "colour"
    expected = predicted(model, path, tmp_path)
    floats = np.stack([read_image(file, as_tensor=True).numpy() for file in sorted(path.iterdir())])
    paths = [export(model, kind, tmp_path) for kind in (ExportType.ONNX, ExportType.OPENVINO)]
    assert precisions(paths[1], "bf16") == ({"f32"}, {"f32"}, {"f32"})
    for run in (onnx(paths[0]), inferencer(OpenVINOInferencer(paths[1], device="CPU"))):
        assert_same(run(floats if run.__name__ == "<lambda>" else torch.from_numpy(floats)), expected)


def test_a_covariance_that_all_positions_have_is_exported_once(common, common_path, paths, images, tmp_path):
    kept = {name: value.clone() for name, value in common.state_dict().items()}
    roots = sum(gaussian.roots.nbytes - gaussian.roots[0, 0].nbytes for gaussian in common.model.maps)
    sizes = [path.with_suffix(".bin").stat().st_size for path in (paths[ExportType.OPENVINO], common_path)]
    saved = sizes[0] - sizes[1]
    assert saved == pytest.approx(roots, rel=0.01)
    assert precisions(common_path, "bf16") == ({"f32"}, {"f32"}, {"f32"})
    path = images / "300x517" / "colour"
    floats = np.stack([read_image(file, as_tensor=True).numpy() for file in sorted(path.iterdir())])
    expected = predicted(common, path, tmp_path)
    assert_same(inferencer(OpenVINOInferencer(common_path, device="CPU"))(torch.from_numpy(floats)), expected)
    assert_same(onnx(export(common, ExportType.ONNX, tmp_path))(floats), expected)
    assert all(torch.equal(value, kept[name]) for name, value in common.state_dict().items())


def test_an_export_that_fails_leaves_the_model_as_it_was(common, tmp_path, monkeypatch):
    def fail(*arguments, **options):
        raise OSError("disk full")

    network = common.model
    monkeypatch.setattr(torch.onnx, "export", fail)
    with pytest.raises(OSError, match="disk full"):
        export(common, ExportType.ONNX, tmp_path)
    assert common.model is network


def precisions(path, hint):
    """In which precisions OpenVINO computes what precedes the convolutions, them, and what follows the last one."""
    compiled = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": hint})
    kinds = [
        (node.get_rt_info()["layerType"].value, node.get_rt_info()["runtimePrecision"].value)
        for node in compiled.get_runtime_model().get_ordered_ops()
    ]
    convolutions = [number for number, (kind, _) in enumerate(kinds) if kind == "Convolution"]
    parts = kinds[: convolutions[0]], [kinds[number] for number in convolutions], kinds[convolutions[-1] + 1 :]
    return tuple({precision for _, precision in part} & {"f32", "bf16"} for part in parts)


def inputs(path, operation):
    """What feeds the operations of one type, in the order of computation."""
    nodes = [node for node in openvino.Core().read_model(path).get_ordered_ops() if node.get_type_name() == operation]
    return [[value.get_node().get_type_name() for value in node.input_values()] for node in nodes]


@pytest.fixture(scope="module", params=[CompressionType.INT8, CompressionType.INT8_PTQ])
def eight_bits(request, model, folder, mvtec_root):
    """Exported with 8-bit weights, or with 8-bit weights and activations."""
    data = MVTecAD(root=mvtec_root, category="tiny", num_workers=0)
    kind = request.param
    return export(model, ExportType.OPENVINO, folder / kind.value, compression_type=kind, datamodule=data)


def test_quantisation_leaves_resizing_and_distances_alone(eight_bits, paths):
    assert_left_alone(eight_bits, paths[ExportType.OPENVINO])


def test_quantisation_leaves_one_covariance_for_all_alone(common, common_path, folder, mvtec_root):
    data = MVTecAD(root=mvtec_root, category="tiny", num_workers=0)
    options = {"compression_type": CompressionType.INT8_PTQ, "datamodule": data}
    assert_left_alone(export(common, ExportType.OPENVINO, folder / "common_8_bits", **options), common_path)


def assert_left_alone(eight_bits, exact):
    for operation in ("MatMul", "Sqrt", "Power", "ReduceProd"):  # squares in 8 bits would make a product of layers 0
        expected = inputs(exact, operation)
        assert expected
        assert sorted(inputs(eight_bits, operation)) == sorted(expected)
    assert all(weights != "Constant" for _, weights in inputs(eight_bits, "Convolution"))
    compiled = openvino.Core().compile_model(eight_bits, "CPU")  # it refuses quantised products of constants
    assert np.isfinite(compiled(np.zeros((1, 3, 64, 64), np.float32))["pred_score"]).all()


def test_rounding_is_only_for_models_that_were_compressed(model, paths, folder):
    exact = paths[ExportType.OPENVINO]
    small = export(model, ExportType.OPENVINO, folder / "small", compression_type=CompressionType.FP16)
    assert precisions(exact, "bf16") == ({"f32"}, {"f32"}, {"f32"})
    rounds = "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")  # elsewhere it never does
    assert precisions(small, "bf16")[:2] == ({"f32"}, {"bf16" if rounds else "f32"})


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (CompressionType.INT8_ACQ, "take FP16, INT8 or INT8_PTQ"),
        ("int4", "take FP16, INT8 or INT8_PTQ .* got int4"),
        (CompressionType.INT8_PTQ, "give a datamodule"),
    ],
)
def test_compression_that_cannot_be_is_refused_at_once(kind, message, model, folder):
    with pytest.raises(ValueError, match=message):
        export(model, ExportType.OPENVINO, folder / "refused", compression_type=kind)


def camera_loop(network, path, rejects, *options):
    """Scores that the example prints, in the order of the files; its last line; numbers of the files it rejected."""
    command = [sys.executable, EXAMPLES / "camera_loop.py", network, path, "--rejects", rejects, *options]
    *lines, last = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    scores = [float(score) for _, score in sorted(line.split() for line in lines)]
    return scores, last, sorted(int(file.stem) for file in rejects.iterdir())


def test_the_camera_loop_gives_the_same_scores(model, paths, images, folder):
    path = images / "300x517" / "colour"
    expected = predicted(model, path, folder)
    scores, last, rejected = camera_loop(paths[ExportType.OPENVINO], path, folder / "rejects")
    assert scores == pytest.approx(expected["pred_score"], abs=1e-4)
    assert rejected == np.flatnonzero(expected["pred_label"]).tolist()
    assert last.startswith("5 frames in ")
    assert last.endswith(f"; {len(rejected)} rejected")


@pytest.mark.parametrize("eight_bits", [CompressionType.INT8], indirect=True)
def test_the_camera_loop_gives_eight_bit_weights_a_score_for_every_image(eight_bits, model, images, folder):
    """In more than one stream OpenVINO 2026.4 gives all images one."""
    path = images / "300x517" / "colour"
    expected = predicted(model, path, folder)
    scores, _, rejected = camera_loop(eight_bits, path, eight_bits.parent / "rejects")
    assert scores == pytest.approx(expected["pred_score"], abs=0.03)
    assert rejected == np.flatnonzero(expected["pred_label"]).tolist()
    assert len(set(scores)) == 5


def test_the_camera_loop_reads_as_anomalib_does(model, paths, tmp_path):
    """Images that are to be turned according to their EXIF data, and of 16 bits in colour."""
    files = tmp_path / "files"
    files.mkdir()
    image = surface((300, 517), 1, np.random.default_rng(3))
    image[:100] //= 4  # up and down differ
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    Image.fromarray(image).save(files / "0.png", exif=exif)
    cv2.imwrite(str(files / "1.png"), image.astype(np.uint16) * 256 + 255)
    expected = predicted(model, files, tmp_path)
    scores, _, _ = camera_loop(paths[ExportType.OPENVINO], files, tmp_path / "rejects")
    assert scores == pytest.approx(expected["pred_score"], abs=1e-4)


def test_the_camera_loops_threshold(paths, images, folder):
    scores, last, rejected = camera_loop(
        paths[ExportType.OPENVINO], images / "300x517" / "colour", folder / "none", "--threshold", "1"
    )
    assert last.endswith("; 0 rejected")
    assert (len(scores), rejected) == (5, [])


def test_the_camera_loop_refuses_what_it_cannot_score(paths, tmp_path):
    network = paths[ExportType.OPENVINO]
    deep, empty = tmp_path / "deep", tmp_path / "empty"
    deep.mkdir()
    empty.mkdir()
    cv2.imwrite(str(deep / "0.png"), np.full((64, 64), 40000, np.uint16))
    (tmp_path / "text.xml").write_text("hello")
    (tmp_path / "model.onnx").touch()
    cases = {
        r"--threshold must be in \[0, 1\], got 50": [network, empty, "--threshold", "50"],
        "missing.xml is no file": [tmp_path / "missing.xml", empty],
        "model.onnx is no .xml": [tmp_path / "model.onnx", empty],
        "empty gave no image": [network, empty],
        "text.xml is no model that OpenVINO reads": [tmp_path / "text.xml", empty],
        "0.png has uint16 pixels": [network, deep],
    }
    for message, arguments in cases.items():
        command = [sys.executable, EXAMPLES / "camera_loop.py", *arguments, "--rejects", tmp_path / "rejects"]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        assert run.returncode
        assert re.search(message, run.stderr), run.stderr
