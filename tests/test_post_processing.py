import pytest
import torch
from anomalib.data import ImageBatch
from anomalib.metrics import F1AdaptiveThreshold
from sklearn.metrics import f1_score

from anomalib_cse import Cse
from anomalib_cse.post_processing import MidwayThreshold

from tiny import TINY

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
    scores = (torch.randn(40, generator=generator) + labels).mul(8).round() / 8  # with ties
    threshold = threshold_of(MidwayThreshold(**FIELDS), scores, labels)
    best = max(f1_score(labels, scores >= cut) for cut in scores)
    assert f1_score(labels, scores > threshold) == pytest.approx(best)
    assert f1_score(labels, scores > threshold_of(F1AdaptiveThreshold(**FIELDS), scores, labels)) < best
    assert scores[scores > threshold].min() - threshold == pytest.approx(threshold - scores[scores < threshold].max())


def test_where_a_gap_is_the_threshold_is_in_its_middle():
    scores, labels = torch.tensor([0.1, 0.2, 0.3, 0.9, 1.5]), torch.tensor([0, 0, 0, 1, 1])
    assert threshold_of(MidwayThreshold(**FIELDS), scores, labels) == pytest.approx(0.6)


@pytest.mark.parametrize(
    ("scores", "labels"),
    [([0.1, 0.2, 0.3], [0, 0, 0]), ([0.1, 0.2, 0.3], [1, 1, 1]), ([0.5, 0.5, 0.5], [0, 1, 1])],
    ids=["good", "anomalous", "all alike"],
)
def test_without_scores_to_part_it_is_anomalibs(scores, labels):
    scores, labels = torch.tensor(scores), torch.tensor(labels)
    expected = threshold_of(F1AdaptiveThreshold(**FIELDS), scores, labels)
    assert threshold_of(MidwayThreshold(**FIELDS), scores, labels) == expected


def test_cse_has_it():
    assert isinstance(Cse(**TINY).post_processor._image_threshold_metric, MidwayThreshold)
