"""What models do within a run, seen without a fit: errors of several processes, precision, modes, export options."""

from types import SimpleNamespace

import pytest
import torch
from anomalib.data import InferenceBatch
from onnxruntime import InferenceSession
from torch import nn

from anomalib_cse import Cse
from anomalib_cse.cse.training_pairs import Pairs
from anomalib_cse.deployment import DeploymentMixin
from anomalib_cse.deployment.export import export_any_size
from anomalib_cse.preflight.batches import BatchCheck

from tiny import COMMON


@pytest.mark.parametrize("error", [None, ValueError("no images"), KeyError("other")], ids=str)
def test_what_the_first_process_computes_or_raises_reaches_all(error):
    sent = []

    def compute():
        if error:
            raise error
        return 7

    def in_process(number):
        def broadcast(value):
            sent.extend([value] if number == 0 else [])
            return sent[0]

        trainer = SimpleNamespace(is_global_zero=number == 0, strategy=SimpleNamespace(broadcast=broadcast))
        return DeploymentMixin.from_first(SimpleNamespace(trainer=trainer), compute if number == 0 else None)

    for number in (0, 1):
        if error is None:
            assert in_process(number) == 7
            continue
        kind = type(error) if number == 0 or isinstance(error, ValueError) else RuntimeError
        with pytest.raises(kind, match=error.args[0]):
            in_process(number)
    assert len(sent) == 1


def test_features_are_of_single_precision_whatever_a_trainer_computes_in():
    model, images = Cse(**COMMON), torch.rand(2, 3, 64, 64)
    expected = model.model.backbone(images)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = model.frozen_features(images)
    assert all(torch.equal(f, e) for f, e in zip(found, expected, strict=True))


@pytest.mark.parametrize("mode", [True, False])
def test_the_hold_out_loss_leaves_the_mode_as_it_was(mode):
    model = Cse(**COMMON).train(mode)
    first, second = (
        [torch.rand(4, c, s, s) for c, s in zip(model.backbone.channels, (8, 4), strict=True)] for _ in range(2)
    )
    pairs = Pairs(first, second, torch.tensor([True, False, True, False]))
    model.hold_out_loss(SimpleNamespace(held_out=pairs, held_out_pairs=lambda: iter([pairs])))
    assert model.training is mode


class Means(nn.Module):
    """Scores images of any size."""

    def __init__(self):
        super().__init__()
        self.factor = nn.Parameter(torch.ones(()))

    def forward(self, images):
        return InferenceBatch(pred_score=self.factor * images.mean(dim=(1, 2, 3)))


def test_export_of_any_size_takes_options_of_torch_or_says_why_not(tmp_path):
    names = {"input_names": ["picture"], "dynamo": True}
    path = export_any_size(Means(), tmp_path / "model.onnx", opset_version=18, external_data=False, **names)
    session, images = InferenceSession(path), torch.rand(3, 3, 50, 70)
    [scores] = session.run(None, {"picture": images.numpy()})
    assert scores == pytest.approx(images.mean(dim=(1, 2, 3)).numpy(), abs=1e-5)
    for option in ({"dynamo": False}, {"dynamic_axes": {"input": {0: "batch"}}}):
        with pytest.raises(ValueError, match=rf"any size takes no {next(iter(option))}.* leave it out"):
            export_any_size(Means(), tmp_path / "none.onnx", **option)


@pytest.mark.parametrize(("error", "is_read"), [(OSError, True), (KeyboardInterrupt, False)])
def test_a_user_who_breaks_a_run_off_does_not_wait_for_files_to_be_read(error, is_read, monkeypatch):
    """The error comes out of a dataloader, by the names of modules: paths are written otherwise on Windows."""
    read = []
    monkeypatch.setattr("anomalib_cse.preflight.batches.files_of", lambda samples: read.append(1) or [])
    raised = {"__name__": "torch.utils.data.dataloader", "error": error}
    exec("def load(): raise error", raised)
    with pytest.raises(error) as caught:
        raised["load"]()
    trainer = SimpleNamespace(train_dataloader=None, val_dataloaders=None, test_dataloaders=None)
    trainer.predict_dataloaders = None
    BatchCheck(any_size=False).on_exception(trainer, None, caught.value)
    assert bool(read) is is_read
