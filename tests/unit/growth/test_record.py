"""What a manifest says of growth: what is written stays as it was, and what is read of all versions."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch

from flm_megatron import __version__
from flm_megatron.checkpoint.manifest import Manifest
from flm_megatron.errors import RequestError
from flm_megatron.growth.grown.checkpoint import GrownCheckpoint
from flm_megatron.growth.record import Certificate, ChangeRecord, Comparison, GrowthRecord, change_behind, growth_of
from tests.support.growth_cases import old_model, plan_for, trained

MEASURED = Certificate("grown", True, 4, 16, (Comparison("fp32", 2e-6, 1e-6, 2.0, 3.0, 3.006),))


@pytest.fixture(scope="module")
def grown() -> GrownCheckpoint:
    """A model grown out of one that was grown before."""
    plan = plan_for("ffn", "zero", old_model(), {"optimizer_step": "birth"})
    source = trained(plan.new, torch.float32, optimizer=True)
    before = GrownCheckpoint(trained(plan.old), plan).record.certified(MEASURED)
    source.manifest |= Manifest(growth=before.recorded())
    return GrownCheckpoint(source, plan_for("layers", "zero", plan.new))


def on_disk(record: ChangeRecord) -> dict[str, Any]:
    """The record as a manifest's JSON gives it back."""
    return json.loads(json.dumps(record.to_json()))


def test_a_record_comes_back_with_all_growths_before_it(grown: GrownCheckpoint) -> None:
    record = grown.record
    assert record.before is not None and record.before.certificate == MEASURED and record.certificate is None
    assert GrowthRecord.from_json(on_disk(record)) == record
    now, earlier = (
        Manifest.from_json({"growth": on_disk(record)}),
        Manifest.from_json({"earlier_growth": on_disk(record)}),
    )
    assert growth_of(now) == change_behind(earlier) == record
    assert growth_of(Manifest()) is None and growth_of(earlier) is None


def test_the_text_in_a_manifest_is_what_it_was_before_there_were_records(grown: GrownCheckpoint) -> None:
    """Keys in their order; a certificate is at the end, and there only where one was made."""
    keys = "plan source_logical_hash source_manifest_sha256 source_stage source_step optimizer_step moments"
    keys += " code_version before"
    growth: Any = grown.manifest.to_json()["growth"]
    assert " ".join(growth) == keys
    assert " ".join(growth["before"]) == keys + " certificate"
    assert growth["code_version"] == __version__
    again = GrowthRecord.from_json(on_disk(grown.record))
    assert json.dumps(again.to_json()) == json.dumps(grown.record.to_json())


def test_what_a_later_version_adds_is_kept(grown: GrownCheckpoint) -> None:
    later = on_disk(grown.record) | {"later": [1, {"a": None}]}
    record = GrowthRecord.from_json(later)
    assert record.extra == {"later": [1, {"a": None}]} and on_disk(record) == later
    assert on_disk(record.certified(MEASURED)) == later | {"certificate": json.loads(json.dumps(MEASURED.to_json()))}


def test_a_record_of_an_earlier_version_had_moments(grown: GrownCheckpoint) -> None:
    bare = replace(grown.record, moments=False)
    assert GrowthRecord.from_json(on_disk(bare)).moments is False
    assert GrowthRecord.from_json({k: v for k, v in on_disk(bare).items() if k != "moments"}).moments is True


@pytest.mark.parametrize("missing", [{"moments"}, {"optimizer_step", "code_version", "before"}])
def test_what_an_earlier_version_did_not_record_is_not_written_later(grown: GrownCheckpoint, missing: set[str]) -> None:
    earlier = {key: value for key, value in on_disk(grown.record).items() if key not in missing}
    record = GrowthRecord.from_json(earlier)
    assert on_disk(record) == earlier
    assert on_disk(record.certified(MEASURED)) == earlier | {"certificate": json.loads(json.dumps(MEASURED.to_json()))}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"plan": None}, "the plan of a growth is not one that this program knows"),
        ({"plan": {"later": 1}}, "the plan of a growth is not one that this program knows"),
        ({"certificate": {"later": 1}}, "the certificate is not one that this program knows"),
    ],
)
def test_a_record_that_is_not_understood_is_refused(
    grown: GrownCheckpoint, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(RequestError, match=f"{message}.*update it"):
        GrowthRecord.from_json(on_disk(grown.record) | change)


def test_a_certificate_says_whether_the_function_was_to_stay() -> None:
    assert "changes the function" not in MEASURED.table()
    assert "changes the function, " in replace(MEASURED, preserving=False).table()
