"""What a run may touch: no network unless asked, no pickle, no file outside its results."""

import os
import subprocess
import sys
from io import BytesIO
from pathlib import Path

import pytest
import timm
import torch
from anomalib.engine import Engine
from safetensors.torch import save_file

from tiny import COMMON, MODELS, QUIET, data_of

OFFLINE = """
import os, socket, sys
from pathlib import Path

def refuse(*arguments, **options):
    raise AssertionError(f"the network was asked for: {arguments}")

socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = refuse
written = set()

def note(event, arguments):
    if event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+"):
        written.add(str(arguments[0]))
    elif event in {"os.mkdir", "os.rename", "os.symlink"}:
        written.add(str(arguments[event != "os.mkdir"]))

from anomalib.data import MVTecAD
from anomalib.engine import Engine
from anomalib_cse import Cse, CseGaussian
sys.addaudithook(note)
for model_class in (Cse, CseGaussian):
    model = model_class("test_efficientnet", (2, 3), weights=sys.argv[1], dtd_dir=sys.argv[3], image_size=(64, 64))
    engine = Engine(max_epochs=1, default_root_dir="results", logger=False, accelerator="cpu")
    engine.train(model, datamodule=MVTecAD(root=sys.argv[2], category="tiny", num_workers=0))
    model = model_class.load_from_checkpoint(engine.best_model_path)
    engine.predict(model, data_path=Path(sys.argv[2], "tiny", "test", "good"))
outside = {file for file in map(os.path.abspath, written) if not file.startswith(os.path.abspath("results"))}
print("OUTSIDE", sorted(outside))
"""


def test_training_and_predicting_need_no_network_and_write_to_the_results_alone(mvtec_root, dtd, tmp_path):
    network = timm.create_model("test_efficientnet", pretrained=False)
    save_file(network.state_dict(), tmp_path / "weights.safetensors")
    (tmp_path / "temporary").mkdir()
    run = subprocess.run(
        [sys.executable, "-c", OFFLINE, tmp_path / "weights.safetensors", mvtec_root, dtd],
        cwd=tmp_path,
        env={**os.environ, "HOME": str(tmp_path / "home"), "TMPDIR": str(tmp_path / "temporary")},
        capture_output=True,
        text=True,
        check=False,
        timeout=180,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert "OUTSIDE []" in run.stdout, run.stdout[-1000:]
    assert {path.name for path in (tmp_path / "results").iterdir()} == set(MODELS)
    assert len(list((tmp_path / "results").rglob("model.ckpt"))) == 2
    assert {path.name for path in tmp_path.iterdir()} <= {"weights.safetensors", "temporary", "results", "home"}
    assert not list((tmp_path / "temporary").iterdir())
    files = [path.relative_to(tmp_path / "home") for path in (tmp_path / "home").rglob("*") if path.is_file()]
    assert {file.parts[:2] for file in files} <= {(".cache", "matplotlib")}  # anomalib's visualiser: its list of fonts


class Evil:
    """Unpickled, it creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("name", MODELS)
def test_no_pickle_is_executed(name, mvtec_root, tmp_path):
    timm.models.save_for_hf(timm.create_model("test_efficientnet", pretrained=False), tmp_path / "folder")
    (tmp_path / "folder" / "model.safetensors").unlink(missing_ok=True)
    for file in ("evil.pth", "evil.ckpt", "folder/pytorch_model.bin"):
        torch.save({"state_dict": Evil(tmp_path / "executed")}, tmp_path / file)
    create, weighted = MODELS[name], {**COMMON, "pre_trained": True}
    with pytest.raises(ValueError, match=r"evil\.pth cannot be read"):
        create(**weighted, weights=tmp_path / "evil.pth")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin cannot be read"):
        create(**{**weighted, "backbone": f"local-dir:{tmp_path / 'folder'}"})
    data = data_of(mvtec_root)
    for use in (Engine.fit, Engine.test):
        engine = Engine(default_root_dir=tmp_path, **QUIET)
        with pytest.raises(Exception, match=r"(?s)weights.only"):
            use(engine, create(**COMMON), datamodule=data, ckpt_path=tmp_path / "evil.ckpt")
    with pytest.raises(Exception, match=r"(?s)weights.only"):
        create.load_from_checkpoint(tmp_path / "evil.ckpt")
    assert not (tmp_path / "executed").exists()
    torch.load(tmp_path / "evil.pth", weights_only=False)
    assert (tmp_path / "executed").exists()  # so it is a pickle that does something


class Response(BytesIO):
    """What a server answers."""

    def __init__(self, url):
        super().__init__(b"something else")
        self.url, self.length = url, 14


@pytest.mark.parametrize("name", MODELS)
def test_a_download_with_another_hash_is_refused_and_not_kept(name, mvtec_root, tmp_path, monkeypatch):
    fetched = []

    def urlopen(request):
        fetched.append(request.full_url)
        return Response(request.full_url)

    monkeypatch.setattr("urllib.request.urlopen", urlopen)
    model = MODELS[name](**COMMON, dtd_dir=tmp_path / "dtd", download_dtd=True)
    for _ in range(2):  # the second must not take what the first has left for granted
        with pytest.raises(RuntimeError, match="File not found or corrupted"):
            Engine(max_epochs=1, default_root_dir=tmp_path, **QUIET).fit(model, datamodule=data_of(mvtec_root))
        assert fetched
        assert all(url.startswith("https://") for url in fetched)
        fetched.clear()
        assert not (tmp_path / "dtd").exists()
