import pytest
import torch
from anomalib.data import ImageBatch, MVTecAD
from anomalib.engine import Engine
from anomalib.metrics import F1AdaptiveThreshold
from sklearn.metrics import f1_score

from anomalib_cse import Cse
from anomalib_cse.post_processing import MidwayPostProcessor, MidwayThreshold

from tiny import LINEAR, QUIET

FIELDS = {"fields": ["pred_score", "gt_label"], "strict": False}


def threshold_of(metric, scores, labels):
    for part in torch.arange(len(scores)).chunk(3):
        metric.update(
            ImageBatch(image=torch.zeros(len(part), 3, 1, 1), pred_score=scores[part], gt_label=labels[part].bool())
        )
    return metric.compute()


@pytest.mark.parametrize("seed", range(5))
def test_the_threshold_parts_the_best_f1_with_the_same_distance_to_both_sides(seed):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(40) % 2
    scores = (torch.randn(40, generator=generator) + labels).mul(8).round().div(8).exp()  # with ties
    threshold = threshold_of(MidwayThreshold(**FIELDS), scores, labels)
    best = max(f1_score(labels, scores >= cut) for cut in scores)
    assert f1_score(labels, scores > threshold) == pytest.approx(best)
    assert f1_score(labels, scores > threshold_of(F1AdaptiveThreshold(**FIELDS), scores, labels)) < best
    above, below = scores[scores > threshold].min(), scores[scores < threshold].max()
    assert (above - threshold).item() == pytest.approx((threshold - below).item(), rel=1e-4)


def test_where_a_gap_is_the_threshold_is_in_its_middle():
    scores, labels = torch.tensor([0.1, 0.2, 0.3, 0.9, 1.5]), torch.tensor([0, 0, 0, 1, 1])
    assert threshold_of(MidwayThreshold(**FIELDS), scores, labels) == pytest.approx(0.6)


@pytest.mark.parametrize("labels", [[1, 0, 1], [1, 1, 1]])
def test_where_all_are_best_called_anomalous_the_lowest_is_too(labels):
    scores, labels = torch.tensor([0.1, 0.2, 0.3]), torch.tensor(labels)
    assert threshold_of(F1AdaptiveThreshold(**FIELDS), scores, labels) == scores[0]  # what is above it is anomalous
    assert threshold_of(MidwayThreshold(**FIELDS), scores, labels) == pytest.approx(0.05)


def test_of_good_images_alone_it_is_anomalibs():
    assert threshold_of(MidwayThreshold(**FIELDS), torch.tensor([0.3, 0.1]), torch.zeros(2)) == pytest.approx(0.3)


def test_without_images_there_is_none():
    assert MidwayThreshold(**FIELDS).compute() is None


def test_arguments_are_anomalibs():
    assert MidwayPostProcessor(image_sensitivity=0.7).normalized_image_threshold == pytest.approx(0.3)


def test_training_sets_it(mvtec_root, tmp_path):
    model = Cse(**LINEAR)
    data = MVTecAD(root=mvtec_root, category="tiny", num_workers=0)
    Engine(default_root_dir=tmp_path, **QUIET).fit(model, datamodule=data)
    with torch.no_grad():
        scored = [
            (model.model(model.pre_processor(batch.image)).pred_score, batch.gt_label)
            for batch in data.val_dataloader()
        ]
    scores, labels = (torch.cat(part) for part in zip(*scored, strict=True))
    threshold = model.post_processor.image_threshold
    assert threshold == pytest.approx((scores[~labels].max() + scores[labels].min()) / 2)
