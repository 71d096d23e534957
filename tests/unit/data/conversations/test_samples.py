"""Conversations become samples: what is trained on, what is cut, how often and in which order, and what is refused."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flm_megatron.config.schema import SourceConfig
from flm_megatron.data.conversations.conversation import read_conversations
from flm_megatron.data.conversations.packing import pack
from flm_megatron.data.conversations.source import ChatSource, fitting
from flm_megatron.data.conversations.stream import ChatStream
from flm_megatron.data.conversations.template import ChatTemplate
from flm_megatron.data.tokenizer import Tokenizer
from flm_megatron.errors import RequestError
from tests.support.chat_cases import conversation, tokenizer, write

LENGTH = 96
TURN = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A small tokenizer."""
    return tokenizer(tmp_path_factory.mktemp("tokenizer"))


def source(path: Path, model: Tokenizer, name: str = "chat", length: int = LENGTH) -> ChatSource:
    """The file as a source with Tele-FLM's template."""
    return ChatSource(SourceConfig(path=str(path), name=name), ChatTemplate("tele-flm", model), length)


def stream(sources: list[ChatSource], passes: list[float], packing: bool = True, **options: Any) -> ChatStream:
    """A stream of two epochs unless told otherwise."""
    return ChatStream(
        sources, passes, **({"sequence_length": LENGTH, "seed": 3, "epochs": 2, "packing": packing, "pad": 3} | options)
    )


def answers(template: ChatTemplate, messages: list[dict[str, str]]) -> list[str]:
    """The text that is trained on, answer by answer."""
    return [template.tokenizer.decode(ids) for ids, trained in template.pieces(messages, "here") if trained]


def test_the_tele_flm_template_and_what_of_it_is_trained(model: Tokenizer) -> None:
    template = ChatTemplate("tele-flm", model)
    messages = [
        {"role": "system", "content": "be short"},
        *TURN,
        {"role": "user", "content": "q2"},
        {"role": "assistant", "content": "a2"},
    ]
    pieces = template.pieces(messages, "here")
    assert "|".join(model.decode(ids) for ids, _ in pieces) == "<_system>be short<_user>q<_bot>|a|<_user>q2<_bot>|a2"
    assert [trained for _, trained in pieces] == [False, True, False, True]
    assert [ids[-1] == model.eod for ids, _ in pieces] == [False, True, False, True]
    assert template.prompt(messages[:2]) == pieces[0][0]
    assert answers(template, [*messages, {"role": "user", "content": "no answer yet"}]) == ["a", "a2"]


def test_a_jinja_template_is_split_into_the_same_parts(model: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "chat.jinja"
    path.write_text(
        "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>\n{{ m.content | trim }}"
        "{{ eos_token if m.role == 'assistant' }}\n{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
    )
    template = ChatTemplate(str(path), model)
    pieces = template.pieces(TURN, "here")
    assert pieces[0][0][0] == model.bos
    assert [model.decode(ids) for ids, _ in pieces] == ["<|user|>\nq\n<|assistant|>\n", "a\n"]
    assert model.eod in pieces[1][0]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{% for m in messages %}{{ m.role }}{% endfor %}", "drops the answer 'a'"),
        ("{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}", "another way"),
        ("{{ raise_exception('no system message') }}", "no system message"),
        ("{% for m in messages %}", "is not a Jinja template"),
    ],
)
def test_a_template_that_loses_something_is_named(model: Tokenizer, tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "bad.jinja"
    path.write_text(text)
    with pytest.raises(RequestError, match=words) as error:
        ChatTemplate(str(path), model).pieces(TURN, "file line 7")
    assert "bad.jinja" in str(error.value) and ("file line 7" in str(error.value) or "line 1" in str(error.value))


GOOD = {"messages": TURN}


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"messages": TURN[:1]}, "has no answer"),
        ({"messages": TURN[1:]}, "has no question"),
        ({"messages": [{"role": "robot", "content": "x"}, *TURN]}, "role 'robot': roles are system, user, assistant"),
        ({"messages": [TURN[0], {"role": "assistant", "content": " "}]}, "answer is empty"),
        ({"messages": [*TURN, {"role": "system", "content": "x"}]}, "not the first"),
        ({"messages": "hello"}, "not a list"),
        ({"messages": [{"role": "user"}]}, "message 1 is not an object with a role"),
        ({"prompt": "q"}, "neither messages nor prompt and response"),
        ("{nonsense", "is not JSON"),
        ("[1]", "not a JSON object"),
        (b'{"prompt": "\xff", "response": "a"}', "not UTF-8: byte 0xff at column 13"),
    ],
)
def test_a_bad_line_is_named_by_file_and_number(tmp_path: Path, record: Any, words: str) -> None:
    path = write(tmp_path / "chat.jsonl", [GOOD, record])
    with pytest.raises(RequestError, match=words) as error:
        read_conversations(path)
    assert f"{path} line 2" in str(error.value) and "\n" not in str(error.value)


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"chat\.jsonl is empty"):
        read_conversations(write(tmp_path / "chat.jsonl", ["", ""]))


def test_prompt_and_response_are_a_conversation(tmp_path: Path) -> None:
    path = write(
        tmp_path / "chat.jsonl", [{"prompt": "q", "response": "a"}, {"system": "s", "prompt": "q", "response": "a"}]
    )
    assert [c.messages for c in read_conversations(path)] == [TURN, [{"role": "system", "content": "s"}, *TURN]]


@given(
    lengths=st.lists(st.tuples(st.integers(1, 30), st.integers(1, 30)), min_size=1, max_size=5),
    capacity=st.integers(2, 90),
)
@settings(max_examples=200, deadline=None)
def test_no_answer_is_left_without_its_question(lengths: list[tuple[int, int]], capacity: int) -> None:
    pieces = [part for q, a in lengths for part in (([1] * q, False), ([2] * a, True))]
    kept = fitting(pieces, capacity)
    total = sum(len(ids) for ids, _ in kept)
    assert total <= capacity and len(kept) % 2 == 0
    for index in range(0, len(kept), 2):
        assert kept[index] == pieces[index] and kept[index + 1][0]
        assert len(kept) == 2 or kept[index + 1] == pieces[index + 1]
    if len(kept) < len(pieces) and kept and kept == pieces[: len(kept)]:
        assert total + len(pieces[len(kept)][0]) + len(pieces[len(kept) + 1][0]) > capacity
    if not kept:
        assert lengths[0][0] >= capacity


@given(lengths=st.lists(st.integers(1, 50), max_size=200))
@settings(max_examples=100, deadline=None)
def test_packing_takes_each_once_and_overfills_nothing(lengths: list[int]) -> None:
    samples = pack(lengths, 50)
    assert sorted(i for sample in samples for i in sample) == list(range(len(lengths)))
    assert all(0 < sum(lengths[i] for i in sample) <= 50 for sample in samples)
    # No two of the first samples that were open together would fit into one.
    filled = [sum(lengths[i] for i in sample) for sample in samples[:32]]
    assert all(a + b > 50 for k, a in enumerate(filled) for b in filled[k + 1 :] if len(samples) <= 32)


def test_a_conversation_goes_where_it_just_fits() -> None:
    assert pack([30, 40, 20, 10, 5], 50) == [[0, 2], [1, 3], [4]]


def test_the_oldest_of_32_open_samples_closes() -> None:
    """The first has most room; after 32 others it takes nothing more."""
    lengths = [10, *[45] * 31, 45, 40]
    assert pack(lengths, 50) == [*[[n] for n in range(33)], [33]]
    assert pack([*lengths[:32], 40], 50)[0] == [0, 32]


def test_a_packed_sample_restarts_positions_and_trains_answers_only(model: Tokenizer, tmp_path: Path) -> None:
    path = write(tmp_path / "chat.jsonl", [conversation(i, turns=1) for i in range(12)])
    packed = stream([source(path, model)], [1.0])
    sample = packed[0]
    assert sample["segments"].max() >= 2
    for number in range(1, int(sample["segments"].max()) + 1):
        here = sample["segments"] == number
        assert sample["position_ids"][here].tolist() == list(range(int(here.sum())))
        record = packed.sources[0].conversations[int(packed.names(0)[number - 1].split("/")[2]) - 1]
        assert [*sample["tokens"][here].tolist(), int(sample["labels"][here][-1])] == record.ids.tolist()
        trained = sample["labels"][here][sample["loss_mask"][here] > 0].tolist()
        assert trained == record.ids[record.trained].tolist() and trained[-1] == model.eod
    rest = sample["segments"] == 0
    assert sample["loss_mask"][rest].sum() == 0 and (sample["tokens"][rest] == 3).all()


@pytest.mark.parametrize("packing", [True, False])
def test_every_epoch_takes_every_conversation_once_in_its_own_order(
    model: Tokenizer, tmp_path: Path, packing: bool
) -> None:
    path = write(tmp_path / "chat.jsonl", [conversation(i) for i in range(20)])
    chat = stream([source(path, model)], [1.0], packing)
    names = [name.split("/")[1:] for index in range(chat.samples) for name in chat.names(index)]
    epochs = [[int(line) for epoch, line in names if epoch == wanted] for wanted in ("0", "1")]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(1, 21)) and epochs[0] != epochs[1]
    again = stream([source(path, model)], [1.0], packing)
    assert all(torch.equal(again[i][key], chat[i][key]) for i in (0, chat.samples - 1) for key in chat[i])
    beyond = chat[chat.samples]
    assert beyond["loss_mask"].sum() == 0 and chat.names(chat.samples) == []


def test_a_mixture_takes_each_source_as_often_as_it_says(model: Tokenizer, tmp_path: Path) -> None:
    sources = [
        source(write(tmp_path / f"{name}.jsonl", [conversation(i) for i in range(10)]), model, name)
        for name in ("special", "general")
    ]
    chat = stream(sources, [0.3, 2.0], packing=False, epochs=5)
    counts = Counter(tuple(name.split("/")[:2]) for index in range(chat.samples) for name in chat.names(index))
    assert {counts["special", str(epoch)] for epoch in range(5)} == {3}
    assert {counts["general", str(epoch)] for epoch in range(5)} == {20}
    lines = Counter(name for i in range(chat.samples) for name in chat.names(i) if name.startswith("special"))
    assert len({name.split("/")[2] for name in lines}) == 10  # 15 draws go through all ten before any comes again


def test_what_is_too_long_is_counted(model: Tokenizer, tmp_path: Path) -> None:
    long = {"prompt": "q " * 200, "response": "a"}
    short = {"prompt": "q", "response": "number " * 100}
    path = write(tmp_path / "chat.jsonl", [GOOD, long, short, conversation(2, turns=3)])
    chat = source(path, model, length=40)
    assert (len(chat.conversations), chat.shortened, chat.dropped) == (3, 2, 1)
    assert all(len(c.ids) <= 41 and c.trained.any() for c in chat.conversations)
    assert chat.conversations[0].ids[-1] == model.eod != chat.conversations[1].ids[-1]
    with pytest.raises(RequestError, match=r"long\.jsonl: no question fits into 40 tokens"):
        source(write(tmp_path / "long.jsonl", [long]), model, length=40)


def test_a_conversation_is_found_by_its_name(model: Tokenizer, tmp_path: Path) -> None:
    chat = stream([source(write(tmp_path / "chat.jsonl", [GOOD]), model)], [1.0])
    assert model.decode(chat.ids("chat/0/1")) == "<_user>q<_bot>a"
    with pytest.raises(RequestError, match="there is no conversation 'chat/0/9': names are chat/EPOCH/LINE"):
        chat.ids("chat/0/9")
