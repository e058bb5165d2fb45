"""Enrolment: galleries of templates of known identities, which grow and shrink without training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np

from .checks import check_array, check_choice, check_features, check_integers, check_labels, check_unit_rows
from .cosines import BLOCK_ELEMENTS, normalized, unit_rows
from .plurals import counted

Template = Literal["mean", "all"]


@dataclass(frozen=True, eq=False)
class Gallery:
    """Templates of known identities. :func:`enroll` makes one.

    The templates of an identity are consecutive, in the order of enrolment.

    Args:
        templates: (T, D) float32 or float64 rows of unit length, or zero rows. May be a memory map.
        identity: (T,) ascending integers, the index into ``names`` of each template's identity. Every identity has one
            template or more.
        names: (K,) texts or integers, all different.
        template: ``"mean"`` if an identity has one template, the normalized mean of its unit-length embeddings;
            ``"all"`` if every embedding is a template.
        sum_norm: (T,) norms of the sums of unit-length embeddings that ``"mean"`` has normalized, with which
            :meth:`add` continues the means.

    Raises:
        ValueError: an array has a wrong shape, type or value.

    Examples:
        >>> import numpy as np
        >>> from fused_margin.evaluation import Gallery
        >>> gallery = Gallery(np.eye(3), identity=np.array([0, 0, 1]), names=np.array(["Ann", "Bob"]))
        >>> gallery.names[gallery.identity].tolist()
        ['Ann', 'Ann', 'Bob']
    """

    templates: np.ndarray
    identity: np.ndarray
    names: np.ndarray
    template: Template = "all"
    sum_norm: np.ndarray | None = None

    def __post_init__(self) -> None:
        check_choice("template", self.template, get_args(Template))
        check_features("templates", self.templates, check_values=False)
        if self.templates.dtype not in (np.float32, np.float64):
            raise ValueError(f"templates: expected float32 or float64, got {self.templates.dtype}")
        rows = len(self.templates)
        check_integers("identity", self.identity, (rows,))
        names = check_labels("names", self.names)
        if len(np.unique(names)) < len(names):
            raise ValueError("names: expected different names, got one more than once")
        step = np.diff(self.identity)
        if self.identity[0] != 0 or self.identity[-1] != len(names) - 1 or not ((step == 0) | (step == 1)).all():
            raise ValueError(
                f"identity: expected ascending indices of the {counted(len(names), 'name')}, each at least once; "
                "enroll makes a gallery from labels in any order"
            )
        if self.template == "mean":
            if rows != len(names):
                raise ValueError(f'templates: expected one per name with template="mean", got {rows} for {len(names)}')
            if self.sum_norm is not None:
                check_array("sum_norm", self.sum_norm)
            if self.sum_norm is None or self.sum_norm.shape != (rows,):
                shape = None if self.sum_norm is None else self.sum_norm.shape
                raise ValueError(f'sum_norm: expected shape ({rows},) with template="mean", got {shape}')
        check_unit_rows("templates", self.templates)
        object.__setattr__(self, "names", names)

    @property
    def first_template(self) -> np.ndarray:
        """(K + 1,) the row of each identity's first template, and the number of templates."""
        return np.searchsorted(self.identity, np.arange(len(self.names) + 1))

    def index_of(self, labels: np.ndarray | Sequence[str] | Sequence[int]) -> np.ndarray:
        """The index of each label in ``names``, or -1 for labels that are not enrolled.

        Args:
            labels: (n,) texts or integers, as the names are.

        Returns:
            (n,) int64.

        Raises:
            ValueError: the labels are texts and the names integers, or the reverse.

        Examples:
            >>> import numpy as np
            >>> from fused_margin.evaluation import enroll
            >>> enroll(np.eye(2), ["Bob", "Ann"]).index_of(["Ann", "Bob", "Eve"]).tolist()
            [0, 1, -1]
        """
        labels = check_labels("labels", labels)
        if labels.dtype.kind != self.names.dtype.kind:
            kinds = {"U": "texts", "i": "integers"}
            raise ValueError(
                f"labels: expected {kinds[self.names.dtype.kind]}, as the names of the gallery are, "
                f"got {kinds[labels.dtype.kind]}"
            )
        order = np.argsort(self.names)
        place = np.minimum(np.searchsorted(self.names, labels, sorter=order), len(order) - 1)
        return np.where(self.names[order[place]] == labels, order[place], -1)

    def add(self, features: np.ndarray, labels: np.ndarray | Sequence[str] | Sequence[int]) -> Gallery:
        """A gallery that has these images too.

        New identities follow the present ones, whose indices stay. With ``template="all"``, new images of a present
        identity are further templates of it. With ``"mean"``, its template becomes the normalized mean of all its
        images, as if they had been enrolled together (up to rounding).

        Args:
            features, labels: as for :func:`enroll`, with D columns.

        Returns:
            A new gallery. This one is unchanged.

        Raises:
            ValueError: as :func:`enroll`, or the number of columns or the kind of the labels differs from the gallery's.

        Examples:
            >>> import numpy as np
            >>> from fused_margin.evaluation import enroll
            >>> gallery = enroll(np.array([[1.0, 0.0]]), ["Ann"])
            >>> gallery = gallery.add(np.array([[0.0, 1.0], [-1.0, 0.0]]), ["Ann", "Bob"])
            >>> gallery.names.tolist(), gallery.templates.round(2).tolist()
            (['Ann', 'Bob'], [[0.71, 0.71], [-1.0, 0.0]])
        """
        check_features("features", features, self.templates.shape[1])
        check_labels("labels", labels, len(features))
        new = enroll(features, labels, self.template)
        index = self.index_of(new.names)
        is_new = index < 0
        index[is_new] = len(self.names) + np.arange(np.count_nonzero(is_new))
        names = np.concatenate([self.names, new.names[is_new]])
        added = new.templates.astype(self.templates.dtype)
        if self.sum_norm is None or new.sum_norm is None:
            identity = np.concatenate([self.identity, index[new.identity]])
            order = np.argsort(identity, kind="stable")
            return Gallery(np.concatenate([self.templates, added])[order], identity[order], names)
        templates = np.concatenate([self.templates, added[is_new]])
        sum_norm = np.concatenate([self.sum_norm, new.sum_norm[is_new]])
        known = index[~is_new]
        total = templates[known] * sum_norm[known, None] + new.templates[~is_new] * new.sum_norm[~is_new, None]
        templates[known], sum_norm[known] = normalized(total)
        return Gallery(templates, np.arange(len(names)), names, "mean", sum_norm)

    def remove(self, names: str | int | np.ndarray | Sequence[str] | Sequence[int]) -> Gallery:
        """A gallery without these identities. The others keep their order.

        Args:
            names: a name, or a sequence of names.

        Returns:
            A new gallery. This one is unchanged.

        Raises:
            ValueError: a name is not enrolled, or no identity would remain.

        Examples:
            >>> import numpy as np
            >>> from fused_margin.evaluation import enroll
            >>> enroll(np.eye(3), ["Ann", "Bob", "Eve"]).remove("Bob").names.tolist()
            ['Ann', 'Eve']
        """
        listed = check_labels("names", np.atleast_1d(np.asarray(names)))
        index = self.index_of(listed)
        if (index < 0).any():
            raise ValueError(f"names: expected enrolled identities, got {listed[index < 0].tolist()[:3]}")
        kept = np.ones(len(self.names), bool)
        kept[index] = False
        if not kept.any():
            raise ValueError(f"names: expected an identity to remain, got all {len(kept)}")
        rows = kept[self.identity]
        return replace(
            self,
            templates=self.templates[rows],
            identity=(np.cumsum(kept) - 1)[self.identity[rows]],
            names=self.names[kept],
            sum_norm=None if self.sum_norm is None else self.sum_norm[rows],
        )


def enroll(
    features: np.ndarray, labels: np.ndarray | Sequence[str] | Sequence[int], template: Template = "mean"
) -> Gallery:
    """Enrol identities: make a gallery of templates from their embeddings.

    Args:
        features: (n, D) embeddings, of any norm. A zero row has cosine 0 to all others.
        labels: (n,) texts or integers, the identity of each embedding, in any order.
        template: ``"mean"``, one template per identity: the normalized mean of its unit-length embeddings; or
            ``"all"``: every unit-length embedding is a template, and the largest cosine of an identity's templates is
            its score.

    Returns:
        A gallery with the identities in ascending order of their labels; float64 if ``features`` is, otherwise float32.

    Raises:
        ValueError: an array is empty, has a wrong shape or type or is not finite, or ``template`` is unknown.

    Examples:
        >>> import numpy as np
        >>> from fused_margin.evaluation import enroll
        >>> features = np.array([[2.0, 0.0], [0.0, 3.0], [0.0, -1.0]])
        >>> enroll(features, ["Ann", "Ann", "Bob"]).templates.round(2).tolist()
        [[0.71, 0.71], [0.0, -1.0]]
        >>> enroll(features, ["Ann", "Ann", "Bob"], template="all").templates.tolist()
        [[1.0, 0.0], [0.0, 1.0], [0.0, -1.0]]
    """
    check_choice("template", template, get_args(Template))
    check_features("features", features)
    labels = check_labels("labels", labels, len(features))
    names, identity = np.unique(labels, return_inverse=True)
    order = np.argsort(identity, kind="stable")
    identity = identity[order]
    first = np.searchsorted(identity, np.arange(len(names) + 1))
    is_mean = template == "mean"
    shape = (len(names) if is_mean else len(features), features.shape[1])
    templates = np.empty(shape, np.float64 if features.dtype.itemsize >= 8 else np.float32)
    sum_norm = np.empty(len(names))
    for begin, end in identity_blocks(first, BLOCK_ELEMENTS // features.shape[1]):
        rows = slice(first[begin], first[end])
        unit = unit_rows(features[order[rows]])
        if is_mean:
            total = np.add.reduceat(unit, first[begin:end] - first[begin], axis=0)
            templates[begin:end], sum_norm[begin:end] = normalized(total)
        else:
            templates[rows] = unit
    if is_mean:
        return Gallery(templates, np.arange(len(names)), names, "mean", sum_norm)
    return Gallery(templates, identity, names)


def identity_blocks(first: np.ndarray, rows: int) -> Iterator[tuple[int, int]]:
    """(begin, end) of blocks of whole identities with at most `rows` rows; an identity with more is a block.

    Args:
        first: (K + 1,) the first row of each identity, and the number of rows.
    """
    begin, last = 0, len(first) - 1
    while begin < last:
        end = int(np.searchsorted(first, first[begin] + rows, side="right")) - 1
        end = max(end, begin + 1)
        yield begin, end
        begin = end
