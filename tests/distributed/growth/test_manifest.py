"""A stage grown on disk and one grown in a run have the same manifest."""

from __future__ import annotations

import json
from pathlib import Path

from flm_megatron.checkpoint.lazy.initial import InitialCheckpoint
from flm_megatron.checkpoint.manifest import Manifest, StagePosition
from flm_megatron.checkpoint.opening import open_checkpoint
from flm_megatron.checkpoint.run_file import open_run
from flm_megatron.checkpoint.stage_manifest import stage_manifest
from flm_megatron.checkpoint.torch_dist.writer import copy_checkpoint
from flm_megatron.cli.main import main
from flm_megatron.config.loader import dump_run, load_run
from flm_megatron.growth.record import change_behind, growth_of
from flm_megatron.launch.preflight import resolve
from tests.support.checkpoint_cases import edited
from tests.support.pool import Pool
from tests.support.runs import make_data

RUN = """
output: {folder}/run
tokenizer: {folder}/tokenizer.model
data: {{sequence_length: 32, train: [{{path: {folder}/train}}]}}
defaults: {{global_batch: 4, tokens: 512}}
stages:
  - name: small
    model: &small {{num_layers: 2, hidden_size: 32, ffn_hidden_size: 48, num_attention_heads: 4, norm_epsilon: 1.0e-3,
                    query_key_norm: true}}
  - name: big
    model: {{<<: *small, hidden_size: 48, ffn_hidden_size: 72, num_attention_heads: 6}}
    growth: {{hidden: zero, ffn: mask, heads: zero, mask_steps: 2, layer_selection: interleave, certify_samples: 0,
              optimizer_step: birth}}
"""
ONLINE_ONLY = {"layout", "stability", "validation_sha256"}
"""What only a run has: the layout of its processes, the window of its spike guard, the data that it validates on."""
WRITTEN = {"files", "tensors", "logical_hash", "weights_hash", "optimizer"}
"""What a manifest says of the bytes that were written."""


def manifest_in_a_run(run_file: str, source: str, stage: int, *overrides: str) -> Manifest:
    """The manifest at step 0 of a stage that begins with `source`: grown out of it, or for the first as it is."""
    from flm_megatron.distributed.world import Layouts
    from flm_megatron.training.resume.start import Start, begin
    from flm_megatron.training.stage import StageTrainer

    run = resolve(open_run(run_file, overrides))
    start = Start(stage, 0, Path(source), resumes=False)
    with Layouts(60) as under:
        beginning = begin(run, start, under)
        with under(beginning.stage.parallel):
            trainer = StageTrainer(run, start, beginning)
            try:
                return trainer.manifest()
            finally:
                trainer.close()


def test_grown_on_disk_or_in_a_run_the_manifest_is_the_same(pool: Pool, tmp_path: Path) -> None:
    folder = make_data(tmp_path)
    run_file = folder / "run.yaml"
    run_file.write_text(RUN.format(folder=folder))
    run = resolve(load_run(run_file))
    model = run.stages[0].model
    manifest = stage_manifest(run, 0, model, StagePosition(step=4, samples=16, tokens=512, optimizer_step=4))
    copy_checkpoint(InitialCheckpoint(model, 3, optimizer=True), folder / "small", Manifest(history=[]) | manifest)
    assert main(["grow", str(folder / "small"), str(run_file), "--stage", "big", "--out", str(folder / "big")]) == 0

    (in_run,) = pool.run(1, manifest_in_a_run, str(run_file), str(folder / "small"), 1)
    in_run = json.loads(json.dumps(in_run.to_json()))
    grown = open_checkpoint(folder / "big").manifest
    on_disk = json.loads(json.dumps(grown.to_json()))
    assert set(in_run) - set(on_disk) == ONLINE_ONLY
    assert set(on_disk) - set(in_run) <= WRITTEN
    for key in set(in_run) - ONLINE_ONLY:
        assert in_run[key] == on_disk[key], key
    grown_model = on_disk["run"]["stages"][1]["model"]
    assert (grown_model["norm_epsilon"], grown_model["query_key_norm_epsilon"]) == (1e-3 * 32 / 48, 1e-3)
    onward = ["--stages", "[{name: onward, model: from_checkpoint, tokens: 512, global_batch: 4}]"]
    onward += ["--checkpoint.initial", str(folder / "open")]
    opened = edited(grown, step=2, optimizer_step=6)
    copy_checkpoint(open_checkpoint(folder / "big"), folder / "open", opened)
    (new_run,) = pool.run(1, manifest_in_a_run, str(run_file), str(folder / "open"), 0, *onward)
    assert new_run.run.stages[0].model == grown.run.stages[1].model
    assert (new_run.position.stage, new_run.position.optimizer_step) == ("onward", 6)
    assert new_run.growth is None and change_behind(new_run) == growth_of(grown) is not None
    assert dump_run(run) != dump_run(load_run(run_file)), "the run's vocabulary came from its tokenizer"
