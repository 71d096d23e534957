"""Bits per byte of one or more checkpoints on one or more domains, as a table and as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from flm_megatron.config.schema import ParallelConfig
from flm_megatron.data.corpus.corpus import Corpus
from flm_megatron.errors import RequestError
from flm_megatron.evaluation.evaluated import EvaluatedCheckpoint, open_evaluated
from flm_megatron.evaluation.model import load_model
from flm_megatron.evaluation.perplexity.bits_per_byte import (
    DomainScore,
    WindowSettings,
    check_shares,
    score_documents,
    weighted,
)
from flm_megatron.evaluation.perplexity.windows import check_window
from flm_megatron.json_text import json_document
from flm_megatron.paths import FilePath
from flm_megatron.storage.cache.whole import file_at
from flm_megatron.url import is_url


@dataclass(frozen=True)
class BitsPerByteRequest:
    """What is scored and how; a window or stride of none is the checkpoint's sequence length, or half of it."""

    checkpoints: Sequence[Path]
    texts: Mapping[str, Path]
    shares: Mapping[str, float] = field(default_factory=dict)
    window: int | None = None
    stride: int | None = None
    batch: int = 1
    json: Path | None = None
    tokenizer: Path | None = None
    precision: str | None = None
    vocab_size: int | None = None
    parallel: ParallelConfig = field(default_factory=ParallelConfig)

    def windows(self, evaluated: EvaluatedCheckpoint) -> WindowSettings:
        """The windows for one checkpoint."""
        length = evaluated.window(self.window)
        return WindowSettings(length, self.stride or max(1, length // 2), self.batch)


@dataclass(frozen=True)
class CheckpointScore:
    """One checkpoint's scores by domain."""

    path: str
    name: str
    tokens_trained: int | None
    precision: str
    windows: WindowSettings
    domains: Mapping[str, DomainScore]


def check_request(request: BitsPerByteRequest) -> None:
    """Open everything that the request names, before any process is started.

    Raises:
        RequestError: a text is missing, empty or not UTF-8, a checkpoint or tokenizer does not fit, or weights do not.
    """
    from flm_megatron.checkpoint.sharding.layout import check_layout

    for path in request.texts.values():
        read_documents(path)
    if request.shares:
        check_shares(request.shares, list(request.texts))
    for checkpoint in request.checkpoints:
        evaluated = open_evaluated(checkpoint, request.tokenizer, request.vocab_size)
        check_layout(evaluated.model, request.parallel)
        windows = request.windows(evaluated)
        check_window(windows.length, windows.stride)


def read_documents(path: FilePath) -> list[str]:
    """Documents of a text file or JSON lines, at a path or a URL, or of a source tree. Raises RequestError, naming file
    and line."""
    local = file_at(path) if is_url(path) else path
    if local is None:
        raise RequestError(f"input {path} is not there")
    documents = [text for text in Corpus([local]).documents() if text]
    if not documents:
        raise RequestError(f"{path} has no text in it")
    return documents


def evaluate(request: BitsPerByteRequest) -> int:
    """On every rank of the layout: score all checkpoints; rank 0 shows the result. Returns 0."""
    import torch.distributed as dist

    documents = {name: read_documents(path) for name, path in request.texts.items()}
    scores = [_score(request, path, documents) for path in request.checkpoints]
    if dist.get_rank() == 0:
        _show(request, scores)
    return 0


def _score(request: BitsPerByteRequest, path: Path, documents: Mapping[str, list[str]]) -> CheckpointScore:
    evaluated = open_evaluated(path, request.tokenizer, request.vocab_size)
    chunk = load_model(evaluated, request.parallel, request.precision)
    windows = request.windows(evaluated)
    return CheckpointScore(
        path=str(path),
        name=evaluated.name,
        tokens_trained=evaluated.checkpoint.manifest.position.tokens,
        precision=request.precision or evaluated.precision,
        windows=windows,
        domains={
            name: score_documents(chunk, evaluated.tokenizer, texts, windows) for name, texts in documents.items()
        },
    )


def _show(request: BitsPerByteRequest, scores: Sequence[CheckpointScore]) -> None:
    result = json_document(to_json(scores, request.shares))
    if request.json == Path("-"):
        print(result)
        return
    print("\n".join(table(scores, request.shares)))
    if request.json:
        request.json.write_text(result + "\n")


def table(scores: Sequence[CheckpointScore], shares: Mapping[str, float]) -> list[str]:
    """Bits per byte, a row for each domain and a column for each checkpoint."""
    domains = list(scores[0].domains)
    rows: list[tuple[str, int, list[float]]] = [
        (name, scores[0].domains[name].text_bytes, [score.domains[name].bits_per_byte for score in scores])
        for name in domains
    ]
    totals = [_total(score) for score in scores]
    rows.append(("all bytes", totals[0].text_bytes, [total.bits_per_byte for total in totals]))
    if shares:
        rows.append(("weighted", totals[0].text_bytes, [weighted(score.domains, shares) for score in scores]))
    width = max(len(name) for name, _, _ in rows)
    columns = [max(10, len(score.name)) for score in scores]
    head = " ".join(f"{score.name:>{size}}" for score, size in zip(scores, columns, strict=True))
    lines = [f"{'bits per byte':{max(width, 13)}} {'bytes':>12} {head}"]
    for name, text_bytes, values in rows:
        cells = " ".join(f"{value:>{size}.4f}" for value, size in zip(values, columns, strict=True))
        lines.append(f"{name:{max(width, 13)}} {text_bytes:>12,} {cells}")
    return lines


def to_json(scores: Sequence[CheckpointScore], shares: Mapping[str, float]) -> dict[str, object]:
    """All that was measured, as plain data."""
    return {
        "shares": dict(shares) or None,
        "checkpoints": [
            {
                "path": score.path,
                "name": score.name,
                "tokens_trained": score.tokens_trained,
                "precision": score.precision,
                "window": score.windows.length,
                "stride": score.windows.stride,
                "domains": {name: _domain_json(domain) for name, domain in score.domains.items()},
                "all": _domain_json(_total(score)),
                "weighted_bits_per_byte": weighted(score.domains, shares) if shares else None,
            }
            for score in scores
        ],
    }


def _domain_json(score: DomainScore) -> dict[str, float]:
    return {
        "bits_per_byte": score.bits_per_byte,
        "nats": score.nats,
        "nats_per_token": score.nats / max(score.tokens, 1),
        "tokens": score.tokens,
        "bytes": score.text_bytes,
    }


def _total(score: CheckpointScore) -> DomainScore:
    return sum(score.domains.values(), DomainScore(0.0, 0, 0))
