"""How well single features detect labelled concepts."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from mlxsae.analysis.examples import Survey


class Detection(NamedTuple):
    """The best single detector of one concept: it says yes where the feature's value is at least ``threshold``.

    Feature and threshold are those with the best F1 on the even rows of text; the figures are from the odd rows,
    which had no part in the choice. ``feature`` is None where the concept occurs too rarely to choose or to judge.
    """

    concept: int
    feature: int | None
    threshold: float
    f1: float
    precision: float
    recall: float
    positives: int  # tokens of the odd rows that carry the concept
    information: float  # bits that the detector's answer tells about the concept, per token of the odd rows


def detection_table(survey: Survey, labels: np.ndarray, *, min_positives: int = 10) -> list[Detection]:
    """One :class:`Detection` a concept, for ``labels [n, concepts]`` (bool) of the survey's tokens.

    ``F1 = 2 TP / (positives + answered yes)``. Every feature and every threshold is tried: a feature's tokens are sorted
    by value once, and for each concept cumulative counts give F1 at every cut.

    Raises
    ------
    ValueError
        Labels of another shape or type.
    """
    labels = np.asarray(labels)  # MLX's too
    if labels.ndim != 2 or len(labels) != survey.n_tokens or labels.dtype != np.bool_:
        raise ValueError(
            f"[detection_table] labels must be bool of shape [{survey.n_tokens}, concepts] "
            f"but got {labels.dtype} {labels.shape}."
        )
    chosen = survey.row % 2 == 0
    position = np.flatnonzero(chosen)
    values, indices = survey.values[chosen], survey.indices[chosen]
    token, slot = np.nonzero(values > 0)
    value, feature = values[token, slot], indices[token, slot]
    order = np.lexsort((-value, feature))
    feature, value, token = feature[order], value[order], position[token[order]]
    new = np.diff(feature, prepend=-1) != 0 if len(feature) else np.empty(0, bool)
    start = np.maximum.accumulate(np.where(new, np.arange(len(feature)), 0))
    answered = np.arange(len(feature)) - start + 1  # tokens of this feature down to here
    # A threshold cannot part equal values: only the last of equals is a cut.
    cut = np.append((np.diff(feature) != 0) | (np.diff(value) != 0), True) if len(feature) else new

    table = []
    for concept in range(labels.shape[1]):
        carries = labels[:, concept]
        total, judged = int(carries[chosen].sum()), int(carries[~chosen].sum())
        if total < min_positives or judged < min_positives or not len(feature):
            table.append(Detection(concept, None, 0.0, 0.0, 0.0, 0.0, judged, 0.0))
            continue
        hits = np.cumsum(carries[token])
        true = hits - np.where(start > 0, hits[start - 1], 0)
        f1 = np.where(cut, 2 * true / (answered + total), -1.0)
        best = int(np.argmax(f1))
        name, low = int(feature[best]), float(value[best])
        says = survey.activations(name)[~chosen] >= low
        table.append(_judge(concept, name, low, says, carries[~chosen]))
    return table


def _judge(concept: int, feature: int, threshold: float, says: np.ndarray, carries: np.ndarray) -> Detection:
    hit = int((says & carries).sum())
    yes, positives, n = int(says.sum()), int(carries.sum()), len(says)
    joint = np.array([[hit, yes - hit], [positives - hit, n - yes - positives + hit]]) / max(n, 1)
    independent = joint.sum(axis=1, keepdims=True) * joint.sum(axis=0, keepdims=True)
    seen = joint > 0
    return Detection(
        concept,
        feature,
        threshold,
        f1=2 * hit / (positives + yes) if positives + yes else 0.0,
        precision=hit / yes if yes else 0.0,
        recall=hit / positives if positives else 0.0,
        positives=positives,
        information=float((joint[seen] * np.log2(joint[seen] / independent[seen])).sum()),
    )
