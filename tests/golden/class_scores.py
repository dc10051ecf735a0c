"""Writes class_scores.json: what scikit-learn says of predictions that tests/submissions/test_class_scores.py scores.

Run with an environment that has numpy and scikit-learn: ``python tests/golden/class_scores.py``. Written with
scikit-learn 1.9.1.
"""

import json
import warnings
from pathlib import Path

import numpy as np


def make_predictions(*, exclusive: bool) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities [N, K] with many equal ones, and the truth [N, K] bool, some classes rare; of several labels the
    last class has no positive and the one before it nothing else."""
    rng = np.random.default_rng(41)
    share_K = 0.5 ** np.arange(1, 7)
    if exclusive:
        truth_NK = rng.choice(6, size=500, p=share_K / share_K.sum())[:, None] == np.arange(6)
        odds_NK = np.exp(1.5 * truth_NK + rng.normal(size=truth_NK.shape))
        return (odds_NK / odds_NK.sum(axis=1, keepdims=True)).round(2), truth_NK
    truth_NK = rng.random((500, 8)) < np.append(share_K, [1.0, 0.0])
    return (1 / (1 + np.exp(-2.0 * truth_NK + 1.0 - rng.normal(size=truth_NK.shape)))).round(2), truth_NK


def main() -> None:
    import sklearn
    from sklearn import metrics

    warnings.simplefilter("ignore")
    told: dict = {"scikit-learn": sklearn.__version__}
    for kind in ("exclusive", "several"):
        said_NK, truth_NK = make_predictions(exclusive=kind == "exclusive")
        decided_NK = said_NK >= 0.5
        if kind == "exclusive":
            decided_NK = said_NK.argmax(axis=1)[:, None] == np.arange(6)
        scores = {
            name: score(truth_NK, decided_NK, average=None, zero_division=np.nan).tolist()
            for name, score in {
                "precision": metrics.precision_score, "recall": metrics.recall_score, "f1": metrics.f1_score
            }.items()
        }  # fmt: skip
        scores["mcc"] = [metrics.matthews_corrcoef(*pair) for pair in zip(truth_NK.T, decided_NK.T, strict=True)]
        scores["auroc"] = [metrics.roc_auc_score(*pair) for pair in zip(truth_NK.T, said_NK.T, strict=True)]
        scores["average_precision"] = [
            metrics.average_precision_score(*pair) for pair in zip(truth_NK.T, said_NK.T, strict=True)
        ]
        scores["micro f1"] = metrics.f1_score(truth_NK, decided_NK, average="micro")
        defined = truth_NK.any(axis=0)
        for average in ("macro", "weighted"):
            scores[f"{average} f1"] = metrics.f1_score(truth_NK[:, defined], decided_NK[:, defined], average=average)
        scores["accuracy"] = metrics.accuracy_score(truth_NK, decided_NK)
        if kind == "exclusive":
            labels = truth_NK.argmax(axis=1), decided_NK.argmax(axis=1)
            scores["mcc of classes"] = metrics.matthews_corrcoef(*labels)
            scores["confusion"] = metrics.confusion_matrix(*labels).tolist()
            scores["log loss"] = metrics.log_loss(labels[0], said_NK / said_NK.sum(axis=1, keepdims=True))
        told[kind] = scores
    text = json.dumps(told, indent=1).replace("NaN", "null")
    Path(__file__).with_suffix(".json").write_text(text + "\n")


if __name__ == "__main__":
    main()
