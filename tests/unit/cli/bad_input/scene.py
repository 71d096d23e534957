"""A folder with one of everything: data, run files, checkpoints of each format, and things that are none of these."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from flm_megatron.checkpoint.hugging_face.writer import ExportOptions, write_hugging_face
from flm_megatron.checkpoint.lazy.initial import InitialCheckpoint
from flm_megatron.checkpoint.manifest import Manifest
from flm_megatron.checkpoint.torch_dist.writer import copy_checkpoint
from flm_megatron.config.loader import load_run, run_to_dict
from flm_megatron.config.schema import ModelConfig
from flm_megatron.data.corpus.build import build_dataset
from flm_megatron.data.streams.stream import SampleStream
from flm_megatron.data.tokenizer import train_tokenizer
from tests.support.prose import prose
from tests.support.tokenizer_cases import END, hugging_face, tiktoken_file

RUN = """
name: test
output: runs/new
tokenizer: tokenizer.model
data: {sequence_length: 32, train: [{path: train}], validation: [{path: validation}]}
stages:
  - name: small
    model: {num_layers: 2, hidden_size: 32, ffn_hidden_size: 48, num_attention_heads: 4}
    global_batch: 4
    tokens: 1024
"""
LARGE = """
  - name: large
    model: {num_layers: 3, hidden_size: 48, ffn_hidden_size: 64, num_attention_heads: 6}
    global_batch: 4
    tokens: 4096
    growth: {layer_selection: top}
"""
SFT = """
output: runs/sft
checkpoint: {initial: ours}
data: {sequence_length: 64, train: [{path: chat.jsonl}], chat: {epochs: 1}}
stages: [{name: tune, global_batch: 2}]
"""
MODEL = ModelConfig(
    num_layers=2, hidden_size=32, ffn_hidden_size=48, num_attention_heads=4, vocab_size=500, matrix_init_std=0.1
)
STEP = {
    "stage": "small",
    "step": 1,
    "tokens": 128,
    "loss": 6.2,
    "grad_norm": 1.0,
    "lr": 1e-3,
    "step_time_s": 0.1,
    "tokens_per_s_per_device": 1280.0,
    "tflops_per_device": 0.1,
    "mfu": None,
    "peak_memory_gib": 1.0,
    "eta_s": 0.0,
}
HUGGING_FACE: dict[str, dict[str, object]] = {
    "hf-bad": {"hidden_size": "32"},
    "hf-huge": {"num_hidden_layers": 10**12},
    "hf-zero": {"num_attention_heads": 0},
    "hf-bias": {"attention_bias": True},
    "hf-short": {},
}
ALIASES = "\n".join(["a0: &a0 [x, x]", *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12))])
TURNS = [{"role": "user", "content": "what is one and one?"}, {"role": "assistant", "content": "two"}]


def make_scene(folder: Path) -> Path:
    """Fill `folder`."""
    _make_data(folder)
    (folder / "run.yaml").write_text(RUN)
    (folder / "grow.yaml").write_text(RUN + LARGE)
    (folder / "sft.yaml").write_text(SFT)
    run = run_to_dict(load_run(folder / "run.yaml"))
    run["stages"][0]["model"]["vocab_size"] = 500
    run["tokenizer"] = str(folder / "tokenizer.model")
    manifest = {"run": run, "stage": "small", "step": 8, "tokens": 1024, "samples": 32, "optimizer_step": 8}
    weights = InitialCheckpoint(MODEL, 1)
    copy_checkpoint(weights, folder / "ours", Manifest.from_json(manifest))
    options = ExportOptions(flavour="llama", tokenizer=folder / "tokenizer.model", sequence_length=64)
    write_hugging_face(weights, MODEL, folder / "hf", options)
    _make_wrong_things(folder)
    _build_indices(folder)
    return folder


def _build_indices(folder: Path) -> None:
    """The indices that the first command over the data would leave beside it."""
    run = load_run(folder / "run.yaml")
    for source in (*run.data.train, *run.data.validation):
        source.path = str(folder / source.path)
    for split in ("train", "validation"):
        SampleStream(run.data, run.seed, split)


def _make_data(folder: Path) -> None:
    texts = prose(40)
    tokenizer = train_tokenizer(texts, folder / "tokenizer.model", 500)
    train_tokenizer(texts, folder / "other.model", 400)
    build_dataset(texts[4:], tokenizer, folder / "train")
    build_dataset(texts[:4], tokenizer, folder / "validation")
    (folder / "text.txt").write_text("\n".join(texts[:8]))
    (folder / "chat.jsonl").write_text(json.dumps({"messages": TURNS}) + "\n" + json.dumps({"messages": TURNS}) + "\n")


def _make_wrong_tokenizers(folder: Path) -> None:
    """A whole one in `hf`, and others that lack something."""
    hugging_face(folder / "hf", template=None)
    text = (folder / "hf" / "tokenizer.json").read_text()
    (folder / "half.json").write_text(text[: len(text) // 2])
    (folder / "endless.json").write_text(text.replace(END, "[SEP]"))
    tiktoken_file(folder / "ranks", described=False)


def _make_wrong_things(folder: Path) -> None:
    """Files that are not what they are taken for."""
    (folder / "empty").write_bytes(b"")
    (folder / "empty.jsonl").write_bytes(b"")
    (folder / "latin.txt").write_bytes(b"na\xefve")
    (folder / "binary").write_bytes(bytes(range(256)) * 8)
    (folder / "bad.jsonl").write_text('{"text": "a"}\n{"text": \n')
    (folder / "number.jsonl").write_text('{"text": 5}\n')
    (folder / "list.jsonl").write_text("[1]\n")
    (folder / "short.txt").write_text("a few words\n")
    (folder / "blank.txt").write_text("\n\n")
    (folder / "folder").mkdir()
    (folder / "folder" / "note.unknown").write_text("no text by its suffix")
    (folder / "dangling").symlink_to("nowhere")
    (folder / "template.jinja").write_text("{% for message in messages %}{{ message.content }}")
    (folder / "deep.jsonl").write_text("[" * 100_000 + "\n")
    (folder / "giant.jinja").write_text("{{ range(10**9) | list }}")
    (folder / "endless.jinja").write_text(
        "{% for i in range(10**9) %}{% for j in range(10**9) %}{% endfor %}{% endfor %}"
    )
    _make_wrong_tokenizers(folder)
    _make_wrong_yaml(folder)
    _make_wrong_data(folder)
    _make_wrong_checkpoints(folder)
    (folder / "damaged").mkdir()
    (folder / "damaged" / ".metadata").write_bytes(b"\x80\x04garbage")
    (folder / "config-only").mkdir()
    (folder / "config-only" / "config.json").write_text("{}")
    (folder / "runs").mkdir(exist_ok=True)
    for name, metrics in (
        ("nothing-yet", None),
        ("broken", "garbage\n"),
        ("done", json.dumps(STEP) + "\n"),
        ("lacking", '{"loss": 1}\n'),
    ):
        (folder / "runs" / name).mkdir()
        (folder / "runs" / name / "run.yaml").write_text(RUN.replace("{num_layers", "{vocab_size: 500, num_layers"))
        if metrics is not None:
            (folder / "runs" / name / "metrics.jsonl").write_text(metrics)


def _make_wrong_yaml(folder: Path) -> None:
    (folder / "deep.yaml").write_text("a: " + "[" * 10_000)
    (folder / "alias.yaml").write_text(ALIASES)
    (folder / "huge-int.yaml").write_text("seed: " + "9" * 10_000)
    (folder / "twice.yaml").write_text("seed: 1\nseed: 2\n")
    (folder / "tagged.yaml").write_text("name: !!python/object/apply:os.system [ls]\n")
    (folder / "list.yaml").write_text("- 1\n- 2\n")
    (folder / "nan.yaml").write_text("small: {floor: .nan, scale: .inf, exponent: -1}\nefficiency: {matmul: .nan}\n")
    (folder / "nul.yaml").write_bytes(b"name: a\x00b\n")


def _make_wrong_data(folder: Path) -> None:
    """Datasets that are damaged, and conversations that are none."""
    for name in ("broken-data", "cut-data"):
        for suffix in ("bin", "idx", "json"):
            shutil.copy(folder / f"train.{suffix}", folder / f"{name}.{suffix}")
    (folder / "broken-data.json").write_text("{")
    (folder / "cut-data.bin").write_bytes((folder / "train.bin").read_bytes()[:100])
    (folder / "turns.jsonl").write_text(json.dumps({"messages": list(reversed(TURNS))}) + "\n")
    (folder / "roles.jsonl").write_text(json.dumps({"messages": [{"role": "king", "content": 5}]}) + "\n")
    for name, text in (("broken-run", "stages: ["), ("list", "- 1")):
        (folder / "runs" / name).mkdir(parents=True)
        (folder / "runs" / name / "run.yaml").write_text(text)


def _make_wrong_checkpoints(folder: Path) -> None:
    """Copies of the checkpoint and of its Hugging Face form with something wrong."""
    for name in ("weird", "cut"):
        shutil.copytree(folder / "ours", folder / name)
    (folder / "weird" / "manifest.json").write_text("[]")
    data = next((folder / "cut").glob("*.distcp"))
    data.write_bytes(data.read_bytes()[:1000])
    for name, change in HUGGING_FACE.items():
        shutil.copytree(folder / "hf", folder / name)
        config = json.loads((folder / name / "config.json").read_text())
        (folder / name / "config.json").write_text(json.dumps(config | change))
    weights = folder / "hf-short" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:2000])
