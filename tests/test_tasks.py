"""Tasks: classes, several classes or numbers of an image; metrics and weights are scikit-learn's, losses torch's."""

import numpy as np
import pytest
import torch
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support, top_k_accuracy_score

from tasks import ClassEvaluation, Classification


def test_metrics_agree_with_scikit_learn():
    scores, targets = torch.randn(60, 7), torch.randint(6, (60,))  # the last class has no image
    result = ClassEvaluation(0.5, targets, scores.topk(3).indices, 7, topk=(3, 2))
    columns, metrics = result.per_class(), result.metrics()
    assert columns["images"].tolist() == targets.bincount(minlength=7).tolist() and metrics["loss"] == 0.5
    assert list(metrics) == Classification.metric_names((3, 2))
    assert Classification.metric_names([2]) == [
        "loss",
        "acc1",
        "acc2",
        "precision1",
        "recall1",
        "precision2",
        "recall2",
    ]
    assert np.array_equal(result.confusion(), confusion_matrix(targets, scores.argmax(1), labels=range(7)))
    truth = torch.nn.functional.one_hot(targets, 7)
    for k in (1, 2, 3):
        prediction = torch.zeros(60, 7).scatter(1, scores.topk(k).indices, 1)
        precision, recall, *_ = precision_recall_fscore_support(truth, prediction, zero_division=np.nan)
        np.testing.assert_allclose(columns[f"precision{k}"], precision)
        np.testing.assert_allclose(columns[f"recall{k}"], recall)
        assert metrics[f"recall{k}"] == pytest.approx(100 * recall[:6].mean())
        assert metrics[f"precision{k}"] == pytest.approx(100 * np.nan_to_num(precision[:6]).mean())
        accuracy = top_k_accuracy_score(targets, scores, k=k, labels=range(7))
        assert metrics[f"acc{k}"] == pytest.approx(100 * accuracy)


def test_an_evaluation_prints_accuracies_loss_and_what_was_left_out():
    result = ClassEvaluation(0.5, torch.tensor([0, 1]), torch.tensor([[0, 1], [0, 1]]), 2, (1, 5), unreadable=["a.png"])
    assert str(result) == "top-1 50.00 %  top-5 100.00 %  loss 0.5000  (2 images, 1 unreadable left out)"
