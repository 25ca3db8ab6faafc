"""Learning by Teaching (LBT; Sheth, Jiang, Xie): three levels, five edges.

A teacher is trained; it teaches a student by labelling images for it; the teacher's architecture is then changed so
that both do better on validation images. With T the teacher's weights, A its architecture, S the student's weights,
D_t, D_s and D_u the teacher's, the student's and the unlabelled images:

    eq. (1)   T*(A) = argmin_T  L(T, A, D_t^tr)
    eq. (2)   S*(T*) = argmin_S  L(S, D_s^tr) + lambda * L(S, D_pl(D_u, T*))
    eq. (3)   min_A  L(T*(A), A, D_t^val) + gamma * L(S*(T*(A)), D_s^val)

where D_pl pairs each unlabelled image x with the teacher's soft prediction f(x; T*).

The levels, lowest first, are `teacher`, `student` and `architecture`. Algorithm 1 updates T by eq. (4), S by eq. (5), A
by eq. (6): that is the engine's round. The chain of eq. (7)-(12) is its reverse sweep, with the estimator of each
level.

`f(x; T)` is a forward pass of the supernet, so the pseudo-labels depend on A directly as well. Eq. (9)-(12) leave that
out, and so does the detached edge A -> S; with `complete_gradient` the edge is an ordinary one and the hypergradient is
the true derivative.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from torch import Tensor
from torch.nn import functional

import mlo

Labelled: TypeAlias = tuple[Tensor, Tensor]
"""Images of shape (n, channels, height, width) and labels of shape (n,)."""


@dataclass(frozen=True)
class LearningByTeaching:
    """The losses and edges of LBT.

    The module of the level `architecture` is called with the progress of the run and returns what the teacher's module
    takes as its second argument; its `penalty()` is added to the upper loss. The student's module takes images only.

    The paper's ablations are two weights set to 0: `teacher_weight` (the architecture answers for the student alone)
    and `labelled_weight` (the student learns from pseudo-labels alone).

    Args:
        lambda_: weight of the pseudo-labelled images in the student's loss, at least 0.
        gamma: weight of the student's validation loss in the architecture's, at least 0.
        complete_gradient: differentiate the pseudo-labels' direct dependence on A too, which the paper does not.
        teacher_weight: of the teacher's validation loss in the architecture's, at least 0.
        labelled_weight: of the labelled images in the student's loss, at least 0.
    """

    lambda_: float = 1.0
    gamma: float = 1.0
    complete_gradient: bool = False
    teacher_weight: float = 1.0
    labelled_weight: float = 1.0

    @property
    def edges(self) -> tuple[mlo.Edge, ...]:
        """Who reads whom."""
        answers = (mlo.Edge("teacher", "architecture"),) if self.teacher_weight else ()
        return (
            mlo.Edge("architecture", "teacher"),  # the teacher's network is the supernet relaxed by A
            mlo.Edge("teacher", "student"),  # T labels the student's images
            mlo.Edge("architecture", "student", detached=not self.complete_gradient),  # through that labelling
            *answers,  # A answers for the validation losses of both
            mlo.Edge("student", "architecture"),
        )

    def teacher_loss(self, levels: mlo.Levels, batch: Labelled) -> mlo.Output:
        """Eq. (1): the teacher on its training images."""
        images, labels = batch
        logits = levels.teacher(images, levels.architecture(levels.progress))
        return mlo.Output(functional.cross_entropy(logits, labels), {"accuracy": accuracy(logits, labels)})

    @property
    def student_loss(self) -> mlo.Sum:
        """Eq. (2): the student on its training images, and on the teacher's soft labels of the unlabelled ones."""
        return mlo.Sum(*([self._labelled_loss] if self.labelled_weight else []), self._pseudo_label_loss)

    def _labelled_loss(self, levels: mlo.Levels, batch: tuple[Labelled, Labelled]) -> mlo.Output:
        (images, labels), _ = batch
        logits = levels.student(images)
        loss = self.labelled_weight * functional.cross_entropy(logits, labels)
        return mlo.Output(loss, {"accuracy": accuracy(logits, labels)})

    def _pseudo_label_loss(self, levels: mlo.Levels, batch: tuple[Labelled, Labelled]) -> mlo.Output:
        _, (unlabelled, _) = batch
        pseudo_labels = levels.teacher(unlabelled, levels.architecture(levels.progress)).softmax(dim=-1)
        loss = functional.cross_entropy(levels.student(unlabelled), pseudo_labels)
        return mlo.Output(self.lambda_ * loss, {"pseudo_label_loss": loss})

    def architecture_loss(self, levels: mlo.Levels, batch: tuple[Labelled, Labelled]) -> mlo.Output:
        """Eq. (3): teacher and student on validation images."""
        (teacher_images, teacher_labels), (student_images, student_labels) = batch
        metrics: dict[str, Tensor] = {}
        loss = levels.architecture.penalty()
        if self.teacher_weight:
            teacher_logits = levels.teacher(teacher_images, levels.architecture(levels.progress))
            loss = loss + self.teacher_weight * functional.cross_entropy(teacher_logits, teacher_labels)
            metrics["teacher_accuracy"] = accuracy(teacher_logits, teacher_labels)
        student_logits = levels.student(student_images)
        metrics["student_accuracy"] = accuracy(student_logits, student_labels)
        return mlo.Output(loss + self.gamma * functional.cross_entropy(student_logits, student_labels), metrics)


def accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the fraction of right predictions, a scalar in [0, 1]."""
    return (logits.detach().argmax(dim=-1) == labels).float().mean()
