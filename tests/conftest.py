import ctypes
import hashlib
import shutil
from io import BytesIO

import cv2
import numpy as np
import pytest
import torch
from anomalib.engine import Engine

from tiny import COMMON, MODELS, QUIET, data_of, signal_stack


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def own_signal_stack():
    """After a test, signal handlers run on what they ran on before it.

    Every ``openvino.Core`` that compiles gives them a stack. If two end in the order of their beginning, as with what
    fixtures or a failed test keep, OpenVINO leaves them one that is unmapped. Then the end of any data loader's worker
    killed this process, or overwrote what had got that memory since: the loader's semaphores, for one.
    """
    before = signal_stack()
    yield
    ctypes.CDLL(None).sigaltstack(before, None)


@pytest.fixture(autouse=True, scope="session")
def traced_once(tmp_path_factory):
    """Keep what torch's exporter made of a model: to trace it takes seven of an export's eight seconds."""
    folder, export = tmp_path_factory.mktemp("traced"), torch.onnx.export
    plain = bool, int, float, str, tuple, type(None)

    def kept_export(model, args, f, **options):
        if options.get("external_data", True):  # which would be a second file
            return export(model, args, f, **options)
        settings = [{k: v for k, v in vars(part).items() if isinstance(v, plain)} for part in model.modules()]
        torch.save([repr(model), str(settings), model.state_dict(), args, str(options)], whole := BytesIO())
        file = folder / hashlib.sha256(whole.getbuffer()).hexdigest()
        if not file.exists():
            export(model, args, file, **options)
        return shutil.copyfile(file, f)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.onnx, "export", kept_export)
        yield


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


@pytest.fixture(scope="session")
def mvtec_root(tmp_path_factory):
    """A dataset in MVTec AD's layout: grey noise, defects are white squares."""
    root = tmp_path_factory.mktemp("mvtec")
    rng = np.random.default_rng(0)

    def write(image, *parts):
        path = root.joinpath("tiny", *parts)
        path.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(path), image)

    for split, count in (("train", 10), ("test", 4)):
        for number in range(count):
            write(rng.integers(90, 110, (72, 96, 3), dtype=np.uint8), split, "good", f"{number:03}.png")
    for number in range(4):
        image, mask = rng.integers(90, 110, (72, 96, 3), dtype=np.uint8), np.zeros((72, 96), np.uint8)
        image[20:50, 30:60], mask[20:50, 30:60] = 255, 255
        write(image, "test", "square", f"{number:03}.png")
        write(mask, "ground_truth", "square", f"{number:03}_mask.png")
    return root


@pytest.fixture
def texture_folder(tmp_path):
    folder = tmp_path / "dtd" / "images" / "striped"
    folder.mkdir(parents=True)
    for number in range(3):
        cv2.imwrite(str(folder / f"{number}.jpg"), np.full((40, 50, 3), 60 * number, np.uint8))
    return tmp_path / "dtd"


@pytest.fixture(scope="session")
def dtd(tmp_path_factory):
    """Photographs of textures: to generate them takes longer than to fit a tiny model."""
    folder = tmp_path_factory.mktemp("dtd")
    rng = np.random.default_rng(0)
    for number in range(4):
        noise = cv2.resize(rng.integers(0, 255, (8 << number, 8 << number, 3), dtype=np.uint8), (256, 256))
        cv2.imwrite(str(folder / f"{number}.png"), noise)
    return folder


@pytest.fixture(scope="session")
def trained(mvtec_root, dtd, tmp_path_factory):
    """Both models by name, fitted to the tiny dataset, and their checkpoints: ``(model, path)``. Not to be changed."""
    models = {}
    for name, model_class in MODELS.items():
        torch.manual_seed(0)
        model, results = model_class(**COMMON, dtd_dir=str(dtd)), tmp_path_factory.mktemp(name)
        engine = Engine(max_epochs=2, default_root_dir=results, **QUIET)
        engine.fit(model, datamodule=data_of(mvtec_root))
        models[name] = model, engine.best_model_path
    return models
