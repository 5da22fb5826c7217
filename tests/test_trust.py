"""What a run may touch: no network unless asked, no pickle, no file outside its results."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from anomalib.data import MVTecAD
from anomalib.engine import Engine
from safetensors.torch import save_file

from anomalib_cse import Cse

from tiny import QUIET, TINY

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
from anomalib_cse import Cse
sys.addaudithook(note)
model = Cse(backbone="test_efficientnet", layers=(2, 3), weights=sys.argv[1], image_size=(64, 64), seed=0)
engine = Engine(max_epochs=1, default_root_dir="results", logger=False, accelerator="cpu")
engine.train(model, datamodule=MVTecAD(root=sys.argv[2], category="tiny", num_workers=0))
engine.predict(Cse.load_from_checkpoint(engine.best_model_path), data_path=Path(sys.argv[2], "tiny", "test", "good"))
outside = {file for file in map(os.path.abspath, written) if not file.startswith(os.path.abspath("results"))}
print("OUTSIDE", sorted(outside))
"""


def test_training_and_predicting_need_no_network_and_write_to_the_results_alone(mvtec_root, tmp_path):
    network = timm.create_model("test_efficientnet", pretrained=False)
    save_file(network.state_dict(), tmp_path / "weights.safetensors")
    (tmp_path / "temporary").mkdir()
    run = subprocess.run(
        [sys.executable, "-c", OFFLINE, tmp_path / "weights.safetensors", mvtec_root],
        cwd=tmp_path,
        env={**os.environ, "HOME": str(tmp_path / "home"), "TMPDIR": str(tmp_path / "temporary")},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert "OUTSIDE []" in run.stdout, run.stdout[-1000:]
    assert list((tmp_path / "results").rglob("*.ckpt"))
    assert {path.name for path in tmp_path.iterdir()} <= {"weights.safetensors", "temporary", "results", "home"}
    assert not list((tmp_path / "temporary").iterdir())
    caches = {
        path.relative_to(tmp_path / "home").parts[:2] for path in (tmp_path / "home").rglob("*") if path.is_file()
    }
    assert caches <= {(".cache", "matplotlib")}  # anomalib's visualiser: its list of fonts


class Evil:
    """Unpickled, it creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_no_pickle_is_executed(mvtec_root, tmp_path):
    timm.models.save_for_hf(timm.create_model("test_efficientnet", pretrained=False), tmp_path / "folder")
    (tmp_path / "folder" / "model.safetensors").unlink(missing_ok=True)
    for file in ("evil.pth", "evil.ckpt", "folder/pytorch_model.bin"):
        torch.save({"state_dict": Evil(tmp_path / "executed")}, tmp_path / file)
    with pytest.raises(ValueError, match=r"evil\.pth cannot be read"):
        Cse(**{**TINY, "pre_trained": True, "weights": tmp_path / "evil.pth"})
    with pytest.raises(ValueError, match=r"pytorch_model\.bin cannot be read"):
        Cse(**{**TINY, "pre_trained": True, "backbone": f"local-dir:{tmp_path / 'folder'}"})
    model = Cse(**TINY)
    data = MVTecAD(root=mvtec_root, category="tiny", num_workers=0)
    for use in (Engine.fit, Engine.test):
        with pytest.raises(Exception, match=r"(?s)weights.only"):
            use(Engine(default_root_dir=tmp_path, **QUIET), model, datamodule=data, ckpt_path=tmp_path / "evil.ckpt")
    with pytest.raises(Exception, match=r"(?s)weights.only"):
        Cse.load_from_checkpoint(tmp_path / "evil.ckpt")
    assert not (tmp_path / "executed").exists()
    torch.load(tmp_path / "evil.pth", weights_only=False)
    assert (tmp_path / "executed").exists()  # so it is a pickle that does something


def test_a_download_with_another_hash_is_refused_and_not_kept(mvtec_root, tmp_path, monkeypatch):
    fetched = []

    def urlretrieve(url, filename, reporthook):
        fetched.append(url)
        Path(filename).write_bytes(b"something else")

    monkeypatch.setattr("anomalib.data.utils.download.urlretrieve", urlretrieve)
    for attempt in (1, 2):  # the second must not take what the first has left for granted
        with pytest.raises(ValueError, match="does not match the required hash"):
            Engine(max_epochs=1, default_root_dir=tmp_path, **QUIET).fit(
                Cse(**TINY, dtd_dir=tmp_path / "dtd", download_dtd=True),
                datamodule=MVTecAD(root=mvtec_root, category="tiny", num_workers=0),
            )
        assert len(fetched) == attempt
        assert not (tmp_path / "dtd").exists()
    assert all(url.startswith("https://") for url in fetched)
