"""Duplicates against all pairs, limits with their reasons, quotas, and clusters that take turns."""

from __future__ import annotations

import random
from typing import Any

import pytest

from flm_megatron.data.conversations.conversation import Conversation
from flm_megatron.data.conversations.screening import Limits, Score, Screening, clusters
from flm_megatron.data.duplicates import exact_duplicates, near_duplicates, shingles
from flm_megatron.errors import RequestError
from tests.support.chat_cases import WORDS


def said(question: str, answer: str, line: int = 1, **record: Any) -> Conversation:
    """A conversation of one turn."""
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return Conversation(messages, "pool.jsonl", line, record)


def pool(count: int, **record: Any) -> list[Conversation]:
    """Different conversations."""
    return [said(f"question {i}", f"answer {i}", i + 1, **record) for i in range(count)]


def scores(difficulties: list[float]) -> dict[int, Score]:
    """Scores of loss 1 with these difficulties."""
    return {index: Score(1.0, value, [1.0, float(index)]) for index, value in enumerate(difficulties)}


def test_spaces_and_capitals_make_no_other_text() -> None:
    assert exact_duplicates(["a b", "c", "A  b\n", "ab", "c"]) == {2: 0, 4: 1}


def test_near_duplicates_are_those_of_all_pairs() -> None:
    draw = random.Random(0)
    texts = [" ".join(draw.choices(WORDS, k=80)) for _ in range(30)]
    texts += [text.replace(" sum ", " total ", 1) for text in texts[:10]] + [text + " end" for text in texts[10:20]]
    sets = [shingles(text) for text in texts]
    kept: list[int] = []
    expected: set[int] = set()
    for index, words in enumerate(sets):
        near = max((len(words & sets[k]) / len(words | sets[k]) for k in kept), default=0.0)
        assert not 0.6 < near < 0.82  # far from the limit, where an estimate may err
        (expected.add if near >= 0.7 else kept.append)(index)
    found = near_duplicates(texts, 0.7, seed=1)
    assert set(found) == expected and len(expected) == 20
    assert all(found[index] == index - 30 for index in range(30, 50))


def test_every_drop_has_a_filter_and_a_reason() -> None:
    items = [said("question one", "answer", 1), said("Question  one", "answer", 2), said("q", "a", 3)]
    items += [
        said("question two", "x" * 500, 4),
        said("这是一个关于数学的问题 请回答。", "答案是四十二 因为这是一个例子。", 5),
    ]
    screening = Screening(items, seed=1)
    screening.filter_texts(Limits(min_answer_characters=2, max_characters=400, languages=["en"]))
    assert screening.left == [0]
    assert screening.dropped == {
        1: ("exact duplicate", "of pool.jsonl line 1"),
        2: ("length", "an answer of 1 characters is shorter than 2"),
        3: ("length", "514 characters are not within 0 to 400"),
        4: ("language", "language zh is not one of en"),
    }
    assert screening.report()["dropped"] == {"exact duplicate": 1, "length": 2, "language": 1}


def test_scores_outside_the_limits_are_dropped() -> None:
    screening = Screening(pool(5), seed=1)
    values = {0: Score(1.0, 0.5, []), 1: Score(9.0, 0.5, []), 2: Score(0.01, 0.5, []), 3: Score(1.0, 1.5, [])}
    screening.filter_scores(values, Limits(min_loss=0.1, max_loss=5.0, max_difficulty=1.0))
    assert screening.left == [0]
    assert {index: name for index, (name, _) in screening.dropped.items()} == {
        1: "loss", 2: "loss", 3: "difficulty", 4: "too long",
    }  # fmt: skip
    assert screening.dropped[1][1] == "loss 9.0000 is not within 0.1 to 5"


def test_clusters_take_turns_with_their_most_difficult() -> None:
    screening = Screening(pool(6), seed=1)
    groups = {0: 0, 1: 0, 2: 0, 3: 1, 4: 1, 5: 2}
    assert screening.choose(4, {}, scores([0.1, 0.9, 0.5, 0.2, 0.3, 0.1]), groups) == [1, 2, 4, 5]
    assert screening.left == [1, 2, 4, 5] and screening.dropped[0][0] == "not chosen"


def test_quotas_share_out_what_is_chosen() -> None:
    screening = Screening([*pool(10, category="maths"), *pool(10, category="code"), *pool(10)], seed=1)
    screening.choose(10, {"maths": 0.6, "code": 0.4}, {}, {})
    assert screening.report()["kept_by_category"] == {"code": 4, "maths": 6}
    with pytest.raises(RequestError, match="no conversation is left of category 'law'"):
        Screening(pool(3), 1).choose(2, {"law": 1.0}, {}, {})
    with pytest.raises(RequestError, match="add up to at most 1"):
        Screening(pool(3), 1).choose(2, {"none": 1.5}, {}, {})


def test_without_scores_the_choice_is_the_seeds() -> None:
    chosen = [Screening(pool(40), seed).choose(10, {}, {}, {}) for seed in (1, 1, 2)]
    assert chosen[0] == chosen[1] != chosen[2] and len(set(chosen[0])) == 10


def test_clusters_are_those_that_lie_apart() -> None:
    draw = random.Random(0)
    centres = [(5.0, 0.0, 0.0), (0.0, 5.0, 0.0), (0.0, 0.0, 5.0)]
    hidden = {i: [x * (1 + i) + draw.gauss(0, 0.1) for x in centres[i % 3]] for i in range(30)}
    found = clusters(hidden, 3, seed=1)
    assert len({found[i] for i in range(3)}) == 3 and all(found[i] == found[i % 3] for i in range(30))
