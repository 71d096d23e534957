"""The streams of a run's stages, of text or of conversations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from flm_megatron.config.budget import stage_budgets
from flm_megatron.config.history import Segment
from flm_megatron.config.schema import ChatConfig, DataConfig, RunConfig, SourceConfig
from flm_megatron.data.conversations.source import ChatSource
from flm_megatron.data.conversations.stream import ChatStream
from flm_megatron.data.conversations.template import ChatTemplate
from flm_megatron.data.streams.mixture import mixture_at_end
from flm_megatron.data.streams.stream import SampleStream, check_names, validation_streams
from flm_megatron.data.tokenizer import open_tokenizer
from flm_megatron.errors import RequestError

Stream = SampleStream | ChatStream


def training_stream(run: RunConfig, stage: int, history: Sequence[Segment] = ()) -> Stream:
    """The training stream of stage number `stage`, by the index of the run's samples.

    `history` is that of a run in progress: the stream is that of its last segment, from where that began.

    Raises:
        RequestError, DamagedError: as `SampleStream`; of conversations, as `ChatSource` and `chat_passes`.
    """
    chat = run.data.chat
    if chat is None and history:
        return SampleStream(_data_of(run.data, history[-1]), run.seed, "train", mixture_at_end(history))
    if chat is None:
        return SampleStream(run.data, run.seed, "train")
    sources = _chat_sources(run, chat, run.data.train, "train")
    passes = chat_passes(run, chat, stage, [source.name for source in sources])
    first = stage_budgets(run, history)[stage].first_sample
    return _chat_stream(run, chat, sources, passes, chat.epochs, first)


def _data_of(data: DataConfig, segment: Segment) -> DataConfig:
    """The data of a segment, at the paths that the run file gives now."""
    present = {source.display_name: source.path for source in data.train}
    train = [
        SourceConfig(present.get(source.name, source.path), source.name, source.weight, source.epochs)
        for source in segment.sources
    ]
    return replace(data, sequence_length=segment.sequence_length, train=train)


def validation_streams_of(run: RunConfig) -> dict[str, Stream]:
    """One stream for each validation source by name, each one pass. Raises as `training_stream`."""
    chat = run.data.chat
    if chat is None:
        return dict(validation_streams(run.data, run.seed))
    sources = _chat_sources(run, chat, run.data.validation, "validation") if run.data.validation else []
    return {source.name: _chat_stream(run, chat, [source], [1.0], 1) for source in sources}


def chat_passes(run: RunConfig, chat: ChatConfig, stage: int, names: Sequence[str]) -> list[float]:
    """Passes over each source in an epoch of a stage.

    Raises:
        RequestError: `data.chat.mix` names a stage or a source that is not there, or a negative number of passes.
    """
    stages = [stage.name for stage in run.stages]
    for item in chat.mix:
        if item.stage not in stages or item.source not in names:
            what, known = ("stage", stages) if item.stage not in stages else ("source", list(names))
            raise RequestError(
                f"data.chat.mix: no {what} is named {getattr(item, what)!r}; there are {', '.join(known)}"
            )
        if item.passes < 0:
            raise RequestError(f"data.chat.mix: passes is {item.passes} for {item.source!r}, give 0 or more")
    mine = {item.source: item.passes for item in chat.mix if item.stage == stages[stage]}
    return [mine.get(name, 0.0) for name in names] if mine else [1.0] * len(names)


def _chat_sources(run: RunConfig, chat: ChatConfig, configs: Sequence[SourceConfig], split: str) -> list[ChatSource]:
    if not configs:
        raise RequestError(f"data.{split} has no sources: give each the path of a file of conversations")
    if run.tokenizer is None:
        raise RequestError("tokenizer is not set: give the tokenizer of the checkpoint")
    for config in configs:
        if config.weight is not None or config.epochs is not None:
            raise RequestError(f"data.{split}: weight and epochs of {config.path!r} are for text: use data.chat.mix")
    template = ChatTemplate(chat.template, open_tokenizer(run.tokenizer))
    check_names(configs, split)
    return [ChatSource(config, template, run.data.sequence_length) for config in configs]


def _chat_stream(
    run: RunConfig, chat: ChatConfig, sources: list[ChatSource], passes: list[float], epochs: int, first: int = 0
) -> ChatStream:
    tokenizer = open_tokenizer(str(run.tokenizer))
    pad = tokenizer.pad if tokenizer.pad >= 0 else tokenizer.eod
    return ChatStream(sources, passes, run.data.sequence_length, run.seed, epochs, chat.packing, pad, first)
