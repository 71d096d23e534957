"""What `flm checkpoint` does, held against the values that went in."""

from __future__ import annotations

import argparse
import io
import json
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint

from flm_megatron.checkpoint.logical import STATE_PREFIXES, LogicalCheckpoint
from flm_megatron.checkpoint.manifest import UNRECORDED_LENGTH, Manifest
from flm_megatron.checkpoint.opening import open_checkpoint
from flm_megatron.checkpoint.tools.reshard import reshard
from flm_megatron.checkpoint.torch_dist.reader import TorchDistCheckpoint
from flm_megatron.distributed.processes import Processes
from flm_megatron.model.parameters import parameter_count
from tests.support.checkpoint_cases import MODEL, Memory, flm_checkpoint, manifest_of, write_small
from tests.support.prose import prose


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, LogicalCheckpoint]:
    """A checkpoint and what it holds."""
    path = tmp_path_factory.mktemp("small") / "source"
    return path, write_small(path)


def assert_same(path: Path, expected: LogicalCheckpoint, optimizer: bool = True) -> None:
    """The checkpoint holds every bit of `expected`."""
    checkpoint = open_checkpoint(path)
    names = [name for name in expected.tensors if optimizer or not name.startswith(STATE_PREFIXES)]
    assert sorted(checkpoint.tensors) == sorted(names)
    for name in names:
        assert torch.equal(checkpoint.read(name), expected.read(name)), name


def hashes(output: str) -> list[str]:
    """Hashes before and after that a command printed."""
    return [line.split()[-1] for line in output.splitlines() if line.startswith("logical hash")]


def test_inspect_tells_what_is_in_it(small: tuple[Path, LogicalCheckpoint], capsys: pytest.CaptureFixture[str]) -> None:
    path, values = small
    assert flm_checkpoint("inspect", path, "--json", "--statistics") == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["stage"], report["step"], report["tokens"]) == ("small", 7, 4096)
    assert report["parameters"] == parameter_count(MODEL)
    assert report["optimizer"] is True
    assert report["model"]["num_query_groups"] == 6
    for name, info in values.tensors.items():
        told, value = report["tensors"][name], values.read(name).double()
        assert told["shape"] == list(info.shape)
        assert told["bytes"] == value.numel() * info.dtype.itemsize
        expected = [value.norm(), value.mean(), value.std(correction=0), value.abs().max()]
        found = [told[key] for key in ("norm", "mean", "std", "largest")]
        assert found == pytest.approx([x.item() for x in expected], rel=1e-9, abs=1e-9)
    assert flm_checkpoint("inspect", path) == 0
    text = capsys.readouterr().out
    assert f"parameters: {parameter_count(MODEL):,}" in text
    assert "331 x 54" in text


def test_inspect_points_at_values_that_are_not_finite(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = {"good": torch.ones(3), "bad": torch.tensor([1.0, torch.nan])}
    reshard(Memory(values), tmp_path / "a", Processes(), Manifest())
    assert flm_checkpoint("inspect", tmp_path / "a", "--statistics") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if "NOT FINITE" in line] == ["bad"]


@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 1, 1), (3, 2, 1), (6, 5, 1), (2, 2, 2)], ids=str)
def test_reshard_keeps_every_bit(
    small: tuple[Path, LogicalCheckpoint],
    tmp_path: Path,
    sizes: tuple[int, int, int],
    capsys: pytest.CaptureFixture[str],
) -> None:
    path, values = small
    tensor, pipeline, virtual = sizes
    arguments = ["--tensor", tensor, "--pipeline", pipeline, "--virtual-pipeline", virtual]
    assert flm_checkpoint("reshard", path, tmp_path / "out", *arguments) == 0
    before, after = hashes(capsys.readouterr().out)
    assert before == after == open_checkpoint(path).manifest.logical_hash
    assert_same(tmp_path / "out", values)
    assert flm_checkpoint("verify", tmp_path / "out") == 0
    files = {file.name for file in (tmp_path / "out").glob("*.distcp")}
    assert files == {f"__{rank}_0.distcp" for rank in range(tensor * pipeline)}


def test_a_resharded_checkpoint_keeps_its_place_in_the_run(
    small: tuple[Path, LogicalCheckpoint], tmp_path: Path
) -> None:
    assert flm_checkpoint("reshard", small[0], tmp_path / "out", "--no-optimizer") == 0
    checkpoint = open_checkpoint(tmp_path / "out")
    assert manifest_of().to_json().items() <= checkpoint.manifest.to_json().items()
    assert not checkpoint.has_optimizer()
    assert_same(tmp_path / "out", small[1], optimizer=False)


def test_reshard_to_a_wider_dtype_takes_the_masters(small: tuple[Path, LogicalCheckpoint], tmp_path: Path) -> None:
    path, values = small
    assert flm_checkpoint("reshard", path, tmp_path / "wide", "--dtype", "fp32") == 0
    checkpoint = open_checkpoint(tmp_path / "wide")
    for name in values.tensors:
        source = name if name.startswith(STATE_PREFIXES) else f"optimizer.state.param.{name}"
        assert torch.equal(checkpoint.read(name), values.read(source)), name
    assert flm_checkpoint("reshard", tmp_path / "wide", tmp_path / "narrow", "--dtype", "bf16") == 0
    assert_same(tmp_path / "narrow", values)


def test_diff_over_formats(
    small: tuple[Path, LogicalCheckpoint], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, values = small
    assert flm_checkpoint("export-hf", path, tmp_path / "hf") == 0
    assert flm_checkpoint("diff", path, tmp_path / "hf") == 0
    changed = {name: values.read(name) for name in values.tensors}
    changed["output_layer.weight"][330, 53] += 0.25
    changed["optimizer.state.exp_avg.output_layer.weight"][0, 0] = torch.nan
    reshard(Memory(changed), tmp_path / "changed", Processes(), manifest_of())
    capsys.readouterr()
    assert flm_checkpoint("diff", path, tmp_path / "changed", "--json") == 1
    report = json.loads(capsys.readouterr().out)
    head, value = report["differences"]["output_layer.weight"], values.read("output_layer.weight").double()
    expected = (changed["output_layer.weight"].double() - value).abs().max().item()
    assert head == {"absolute": expected, "relative": pytest.approx(expected / value.abs().max().item())}
    assert sorted(report["beyond_tolerance"]) == ["optimizer.state.exp_avg.output_layer.weight", "output_layer.weight"]
    assert report["differences"]["optimizer.state.exp_avg.output_layer.weight"]["absolute"] is None  # infinite
    assert flm_checkpoint("diff", tmp_path / "hf", tmp_path / "changed", "--tolerance", 0.1) == 1
    assert flm_checkpoint("diff", tmp_path / "hf", tmp_path / "changed", "--tolerance", 10) == 0
    assert "only in the second: 27 tensors" in capsys.readouterr().out


def test_hugging_face_round_trip(
    small: tuple[Path, LogicalCheckpoint], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, values = small
    assert flm_checkpoint("export-hf", path, tmp_path / "hf", "--shard-size", "40KB", "--pad-vocab-to", 128) == 0
    assert "no tokenizer files" in capsys.readouterr().out
    assert flm_checkpoint("import-hf", tmp_path / "hf", tmp_path / "back") == 0
    assert_same(tmp_path / "back", values, optimizer=False)
    back = open_checkpoint(tmp_path / "back").manifest
    assert back.weights_hash == open_checkpoint(path).manifest.weights_hash
    assert back.run.sequence_length == UNRECORDED_LENGTH
    assert flm_checkpoint("diff", path, tmp_path / "back") == 0
    assert flm_checkpoint("export-hf", tmp_path / "back", tmp_path / "again", "--flavour", "llama") == 0
    assert "output_layer.weight x 1.5); rounded" in capsys.readouterr().out
    assert flm_checkpoint("diff", tmp_path / "back", tmp_path / "again") == 1


def test_export_writes_the_tokenizer_that_transformers_reads_alike(
    small: tuple[Path, LogicalCheckpoint], tmp_path: Path
) -> None:
    import sentencepiece
    from transformers import AutoTokenizer

    from flm_megatron.data.tokenizer import train_tokenizer

    train_tokenizer(prose(40), tmp_path / "tokenizer.model", 331)
    assert flm_checkpoint("export-hf", small[0], tmp_path / "hf", "--tokenizer", tmp_path / "tokenizer.model") == 0
    ours = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    theirs = AutoTokenizer.from_pretrained(tmp_path / "hf")
    for text in ("def read(self):\n    return 1", "  two  spaces", "grün 模型 🙂", "tab\tand\n\nlines"):
        assert theirs(text)["input_ids"] == ours.encode(text), text
        assert theirs.decode(theirs(text)["input_ids"]) == ours.decode(ours.encode(text)), text
    config = json.loads((tmp_path / "hf/generation_config.json").read_text())
    assert config["eos_token_id"] == ours.eos_id()


def write_as_megatron(path: Path, values: LogicalCheckpoint, optimizer_names: str) -> None:
    """Write a folder as Megatron-LM does: by torch's own writer, padded vocabulary, arguments in common.pt."""
    state = {}
    for name in values.tensors:
        value = values.read(name)
        if value.shape[0] == 331:
            value = torch.cat([value, torch.full((53, value.shape[1]), 9.0, dtype=value.dtype)])
        state[name.replace("optimizer.state.", optimizer_names)] = value
    torch.distributed.checkpoint.save(state, checkpoint_id=path, no_dist=True)
    (path / "metadata.json").write_text(json.dumps({"sharded_backend": "torch_dist", "sharded_backend_version": 1}))
    arguments = argparse.Namespace(
        num_layers=5, hidden_size=54, ffn_hidden_size=30, num_attention_heads=36, group_query_attention=True,
        num_query_groups=6, kv_channels=4, padded_vocab_size=384, normalization="RMSNorm", swiglu=True,
        add_bias_linear=False, norm_epsilon=1e-5, position_embedding_type="rope", rotary_base=10000,
        untie_embeddings_and_output_weights=True, consumed_train_samples=99,
    )  # fmt: skip
    torch.save({"args": arguments, "iteration": 12}, path / "common.pt")


def test_megatrons_own_checkpoints_are_read(
    small: tuple[Path, LogicalCheckpoint], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("12")
    write_as_megatron(tmp_path / "iter_0000012", small[1], "chained_0.optimizer.state.")
    assert flm_checkpoint("reshard", tmp_path, tmp_path / "out") == 2
    assert "true vocabulary is not recorded, only the padded 384: give --vocab-size" in capsys.readouterr().err
    assert flm_checkpoint("reshard", tmp_path, tmp_path / "out", "--vocab-size", 331, "--tensor", 2) == 0
    before, after = hashes(capsys.readouterr().out)
    assert before == after
    assert_same(tmp_path / "out", small[1])
    manifest = open_checkpoint(tmp_path / "out").manifest
    assert (manifest.position.step, manifest.position.samples, manifest.position.stage) == (12, 99, "imported")
    assert flm_checkpoint("diff", tmp_path, tmp_path / "out", "--vocab-size", 331) == 0


def test_nameless_optimizer_state_is_refused_and_the_weights_are_not(
    small: tuple[Path, LogicalCheckpoint], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = small[1]
    weights = Memory({n: values.read(n) for n in values.tensors if not n.startswith(STATE_PREFIXES)})
    nameless = {"optimizer.distributed.dp_group_idx_0.gbuf_idx_0.exp_avg": torch.zeros(1000)}
    mixed = Memory(weights.values | nameless)
    write_as_megatron(tmp_path / "src", mixed, "optimizer.state.")
    assert flm_checkpoint("reshard", tmp_path / "src", tmp_path / "out", "--vocab-size", 331) == 2
    assert "dp_reshardable" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    arguments = ("--vocab-size", 331, "--no-optimizer")
    assert flm_checkpoint("reshard", tmp_path / "src", tmp_path / "out", *arguments) == 0
    assert_same(tmp_path / "out", weights)


def test_verify_names_the_file_and_the_tensor(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_small(tmp_path / "a")
    checkpoint = TorchDistCheckpoint(tmp_path / "a")
    chunk = checkpoint.chunks["decoder.layers.mlp.linear_fc2.weight"][-1]
    file = tmp_path / "a" / chunk.file
    data = bytearray(file.read_bytes())
    start = data.index(checkpoint.read("decoder.layers.mlp.linear_fc2.weight")[-1].view(torch.uint8).numpy().tobytes())
    data[start + 11] ^= 1
    file.write_bytes(data)
    assert flm_checkpoint("verify", tmp_path / "a", "--quick") == 0
    capsys.readouterr()
    assert flm_checkpoint("verify", tmp_path / "a") == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert chunk.file in line
    assert "(decoder.layers.mlp.linear_fc2.weight)" in line
    file.write_bytes(data[:-1])
    assert flm_checkpoint("verify", tmp_path / "a", "--quick", "--json") == 1
    assert "truncated" in json.loads(capsys.readouterr().out)["problems"][0]
    file.unlink()
    assert flm_checkpoint("verify", tmp_path / "a", "--quick") == 1
    assert "missing" in capsys.readouterr().err


class Terminal(io.StringIO):
    """Says that it is a terminal."""

    def isatty(self) -> bool:
        """It is."""
        return True


def test_a_terminal_shows_speed_and_time_left(
    small: tuple[Path, LogicalCheckpoint], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    assert flm_checkpoint("reshard", small[0], tmp_path / "out") == 0
    shown = terminal.getvalue()
    assert shown.startswith("\rreshard:   0%")
    assert "B/s" in shown and "<" in shown


def test_commands_run_without_arguments_explain_themselves(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        flm_checkpoint("reshard", "--help")
    assert stop.value.code == 0
    assert "--virtual-pipeline" in capsys.readouterr().out
