"""Selects few good conversations from many: "less is more" (arXiv 2407.02783 screens 30,735 samples).

Each filter records why it drops a conversation; then samples are chosen within quotas of categories, from one cluster
after another, the most difficult first.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypedDict

import numpy

from flm_megatron.data.conversations.conversation import Conversation
from flm_megatron.data.duplicates import exact_duplicates, near_duplicates
from flm_megatron.data.streams.permutation import Permutation
from flm_megatron.errors import RequestError

NO_CATEGORY = "none"


@dataclass(frozen=True)
class Score:
    """A checkpoint's scores of a conversation.

    Mean loss of its answers in nats per token; difficulty, the perplexity of its answers over that of the same answers
    without the questions (IFD, arXiv 2308.12032); and the mean of the last hidden states, one number per channel.
    """

    loss: float
    difficulty: float
    hidden: Sequence[float] = field(repr=False)


class Counts(TypedDict):
    """The numbers of conversations in total, dropped by each filter, and kept, also by category."""

    pool: int
    dropped: dict[str, int]
    kept: int
    kept_by_category: dict[str, int]


@dataclass(frozen=True)
class Limits:
    """Limits of what is kept. Lengths are in characters, of all text and of the shortest answer; bounds are
    inclusive."""

    similarity: float | None = None
    min_characters: int = 0
    max_characters: int | None = None
    min_answer_characters: int = 1
    languages: Sequence[str] = ()
    min_loss: float = 0.0
    max_loss: float | None = None
    max_difficulty: float | None = None


@dataclass
class Screening:
    """Conversations under screening: those left, by index, and why each of the others was dropped."""

    pool: Sequence[Conversation]
    seed: int
    left: list[int] = field(init=False)
    dropped: dict[int, tuple[str, str]] = field(default_factory=dict)
    """Index to the filter's name and a reason with values."""

    def __post_init__(self) -> None:
        self.left = list(range(len(self.pool)))

    def drop(self, name: str, reasons: Mapping[int, str]) -> None:
        """Drop conversations on behalf of a filter, each with a reason."""
        self.dropped |= {index: (name, reason) for index, reason in reasons.items()}
        self.left = [index for index in self.left if index not in reasons]

    def filter_texts(self, limits: Limits) -> None:
        """Drop copies, near copies, and conversations outside the limits of length and language.

        Raises RequestError as `near_duplicates`, or if the library for languages is not installed.
        """
        self._copies("exact duplicate", exact_duplicates(self._texts()))
        self.drop("length", {i: why for i in self.left if (why := _length(self.pool[i], limits))})
        if limits.languages:
            self.drop("language", dict(self._languages(limits.languages)))
        if limits.similarity is not None:
            self._copies("near duplicate", near_duplicates(self._texts(), limits.similarity, self.seed))

    def filter_scores(self, scores: Mapping[int, Score], limits: Limits) -> None:
        """Drop conversations outside the limits of loss and difficulty; `scores` are by index, none if too long."""
        reasons = {}
        for index in self.left:
            score = scores.get(index)
            if score is None:
                reasons[index] = ("too long", "the first question does not fit into the window")
            elif not math.isfinite(score.loss) or not limits.min_loss <= score.loss <= (limits.max_loss or math.inf):
                bounds = f"{limits.min_loss:g} to {limits.max_loss or math.inf:g}"
                reasons[index] = ("loss", f"loss {score.loss:.4f} is not within {bounds}")
            elif limits.max_difficulty is not None and score.difficulty > limits.max_difficulty:
                reasons[index] = ("difficulty", f"difficulty {score.difficulty:.4f} is above {limits.max_difficulty:g}")
        for name in {name for name, _ in reasons.values()}:
            self.drop(name, {i: why for i, (kind, why) in reasons.items() if kind == name})

    def choose(
        self, keep: int, quotas: Mapping[str, float], scores: Mapping[int, Score], clusters: Mapping[int, int]
    ) -> list[int]:
        """Indices of the `keep` conversations that are chosen, in the order of the pool; the rest is dropped.

        Every category gets its share of `keep` (what it cannot fill is left empty); without quotas all are one.
        Within a category clusters take turns, the largest first, each giving its most difficult; without scores the
        order is the seed's.

        Raises:
            RequestError: shares do not add up to at most 1, or a category of a quota is not there.
        """
        groups = self._by_category(quotas)
        chosen: list[int] = []
        for name, members in groups.items():
            room = keep if not quotas else round(keep * quotas[name])
            chosen += _turns(self._ranked(members, scores), clusters)[:room]
        taken = set(chosen)
        self.drop("not chosen", {i: "others were taken first" for i in self.left if i not in taken})
        return sorted(chosen)

    def report(self) -> Counts:
        """The numbers of conversations in total, dropped, and kept."""
        kept = Counter(category(self.pool[index]) for index in self.left)
        return {
            "pool": len(self.pool),
            "dropped": dict(Counter(name for name, _ in self.dropped.values())),
            "kept": len(self.left),
            "kept_by_category": dict(sorted(kept.items())),
        }

    def _texts(self) -> list[str]:
        return [self.pool[index].text() for index in self.left]

    def _copies(self, name: str, copies: Mapping[int, int]) -> None:
        places = self.left
        self.drop(name, {places[i]: f"of {self.pool[places[first]].where}" for i, first in copies.items()})

    def _languages(self, wanted: Sequence[str]) -> Iterator[tuple[int, str]]:
        try:
            from py3langid import classify
        except ImportError:
            raise RequestError("languages are told by py3langid, which is not installed: install it") from None
        for index in self.left:
            language = classify(self.pool[index].text())[0]
            if language not in wanted:
                yield index, f"language {language} is not one of {', '.join(wanted)}"

    def _by_category(self, quotas: Mapping[str, float]) -> dict[str, list[int]]:
        if not quotas:
            return {"": self.left}
        if min(quotas.values()) < 0 or sum(quotas.values()) > 1 + 1e-9:
            raise RequestError(f"quotas {dict(quotas)} are not shares: give numbers from 0 that add up to at most 1")
        groups: dict[str, list[int]] = defaultdict(list)
        for index in self.left:
            groups[category(self.pool[index])].append(index)
        for name in quotas:
            if name not in groups:
                raise RequestError(
                    f"no conversation is left of category {name!r}; there are {', '.join(sorted(groups))}"
                )
        return {name: groups[name] for name in quotas}

    def _ranked(self, members: Sequence[int], scores: Mapping[int, Score]) -> list[int]:
        """Most difficult first; without scores, and between equals, by seed."""
        order = Permutation(len(self.pool), f"{self.seed}/screening")
        draw = {order[place]: place for place in range(len(self.pool))}
        return sorted(members, key=lambda i: (-scores[i].difficulty if i in scores else 0.0, draw[i]))


def category(conversation: Conversation) -> str:
    """The record's `category`; `none` if it has none."""
    return str(conversation.record.get("category", NO_CATEGORY))


def _length(conversation: Conversation, limits: Limits) -> str | None:
    total = len(conversation.text())
    shortest = min(len(m["content"]) for m in conversation.messages if m["role"] == "assistant")
    if total < limits.min_characters or total > (limits.max_characters or math.inf):
        return f"{total} characters are not within {limits.min_characters} to {limits.max_characters or math.inf}"
    if shortest < limits.min_answer_characters:
        return f"an answer of {shortest} characters is shorter than {limits.min_answer_characters}"
    return None


def _turns(ranked: Sequence[int], clusters: Mapping[int, int]) -> list[int]:
    """`ranked` with clusters taking turns, the largest first."""
    groups: dict[int, list[int]] = defaultdict(list)
    for index in ranked:
        groups[clusters.get(index, 0)].append(index)
    rows = sorted(groups.values(), key=lambda group: -len(group))
    return [group[turn] for turn in range(max(map(len, rows), default=0)) for group in rows if turn < len(group)]


def clusters(hidden: Mapping[int, Sequence[float]], count: int, seed: int) -> dict[int, int]:
    """Cluster of each sample by k-means over its hidden state, scaled to length 1; at most `count` clusters.

    Raises:
        RequestError: `count` is below 1, or scikit-learn is not installed.
    """
    if count < 1:
        raise RequestError(f"{count} clusters: give at least 1")
    try:
        from sklearn.cluster import KMeans
    except ImportError:
        raise RequestError("clusters are made by scikit-learn, which is not installed: install it") from None
    if not hidden:
        return {}
    rows = numpy.array(list(hidden.values()), dtype=numpy.float64)
    rows /= numpy.maximum(numpy.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    labels = KMeans(min(count, len(rows)), n_init=4, random_state=seed).fit_predict(rows)
    return {index: int(label) for index, label in zip(hidden, labels, strict=True)}
