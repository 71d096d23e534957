"""The record of a growth or shrinking in a checkpoint's manifest: the plan, the source, what was measured.

It is under `growth` if the checkpoint's stage grew, under `shrink` if it shrank, and under `earlier_growth` if the run
started from a checkpoint that did either. No torch here: reports read it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import TypeVar

from flm_megatron.checkpoint.manifest import Manifest, RecordedGrowth
from flm_megatron.errors import RequestError
from flm_megatron.growth.change import Change
from flm_megatron.growth.plan import GrowthPlan
from flm_megatron.growth.shrink.plan import ShrinkPlan
from flm_megatron.json_text import JsonObject

R = TypeVar("R", bound="ChangeRecord")


@dataclass(frozen=True)
class Comparison:
    """Before and after in one precision: differences of logits, their standard deviation before, losses in nats."""

    precision: str
    max_difference: float
    rms_difference: float
    logit_std: float
    loss_before: float
    loss_after: float

    @property
    def loss_change(self) -> float:
        """Relative change of the loss."""
        return abs(self.loss_after - self.loss_before) / self.loss_before


@dataclass(frozen=True)
class Certificate:
    """The comparisons of one change of shape on `samples` x `sequence_length` tokens; the last is in the training
    precision."""

    stage: str
    preserving: bool
    samples: int
    sequence_length: int
    comparisons: tuple[Comparison, ...]

    def to_json(self) -> dict[str, object]:
        """Plain data, for a checkpoint's manifest."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: JsonObject) -> Certificate:
        """The certificate from `to_json`'s result.

        Raises:
            RequestError: it has other fields, as those of a later version may.
        """
        try:
            comparisons = tuple(Comparison(**values) for values in data["comparisons"])
            return cls(**{**data, "comparisons": comparisons})
        except (KeyError, TypeError) as error:
            raise _unknown("certificate", error) from None

    def table(self, change: Change = "growth") -> str:
        """The certificate as text."""
        kept = "" if self.preserving else ", which changes the function"
        head = f"{change} into {self.stage}{kept}, {self.samples} x {self.sequence_length} tokens"
        rows = ["           max |d|/std   rms d/std   loss before    loss after   relative change"]
        for c in self.comparisons:
            rows.append(
                f"{c.precision:9s}{c.max_difference / c.logit_std:13.2e}{c.rms_difference / c.logit_std:12.2e}"
                f"{c.loss_before:14.6f}{c.loss_after:14.6f}{c.loss_change:18.2e}"
            )
        return "\n".join([head, *rows])


@dataclass(frozen=True)
class ChangeRecord:
    """One growth or shrinking: its plan; hash, manifest and path of its source; and the version of the program that did
    it.

    `optimizer_step` is Adam's step at the change, `moments` whether it went on with Adam's moments (true where an
    earlier version did not record it), `before` the last change of the source, `extra` the keys of later versions.
    `absent` names keys that an earlier version did not write; they are not written now either.
    """

    plan: GrowthPlan | ShrinkPlan
    source_logical_hash: str | None = None
    source_manifest_sha256: str | None = None
    source_stage: str | None = None
    source_step: int | None = None
    optimizer_step: int = 0
    moments: bool = True
    code_version: str | None = None
    before: ChangeRecord | None = None
    certificate: Certificate | None = None
    extra: Mapping[str, object] = field(default_factory=dict)
    absent: frozenset[str] = frozenset()

    def to_json(self) -> dict[str, object]:
        """Plain data, for a checkpoint's manifest, with the certificate if there is one."""
        plain = {each.name: getattr(self, each.name) for each in fields(self) if each.name not in NESTED}
        certificate = {"certificate": self.certificate.to_json()} if self.certificate else {}
        before = self.before.to_json() if self.before else None
        data = {"plan": self.plan.to_json(), **plain, "before": before}
        return {key: value for key, value in data.items() if key not in self.absent} | certificate | dict(self.extra)

    @staticmethod
    def from_json(data: JsonObject) -> ChangeRecord:
        """The record of a growth or of a shrinking from `to_json`'s result.

        Raises:
            RequestError: its plan or its certificate is not one that this program knows.
        """
        known = {each.name for each in fields(ChangeRecord)} - {"extra", "absent"}
        plain = {key: value for key, value in data.items() if key in known - NESTED}
        before, certificate = data.get("before"), data.get("certificate")
        shrinks = isinstance(data.get("plan"), dict) and data["plan"].get("change") == ShrinkPlan.CHANGE
        try:
            plan = (ShrinkPlan if shrinks else GrowthPlan).from_json(data["plan"])
        except (KeyError, TypeError, ValueError) as error:
            raise _unknown(f"plan of a {'shrinking' if shrinks else 'growth'}", error) from None
        return (ShrinkRecord if shrinks else GrowthRecord)(
            plan,  # type: ignore[arg-type]  # which is of the record's kind
            **plain,
            before=ChangeRecord.from_json(before) if before else None,
            certificate=Certificate.from_json(certificate) if certificate else None,
            extra={key: value for key, value in data.items() if key not in known},
            absent=frozenset(known - data.keys() - {"certificate"}),
        )

    def recorded(self) -> RecordedGrowth:
        """The record as a manifest has it."""
        return RecordedGrowth.model_validate(self.to_json())

    def in_manifest(self) -> Manifest:
        """The record in the manifest of a stage that began with it."""
        raise NotImplementedError

    @property
    def notice(self) -> str | None:
        """One line on what may not have been meant, for whoever made the change."""
        return None

    def certified(self: R, certificate: Certificate | None) -> R:
        """The record with a certificate, if one was made."""
        return replace(self, certificate=certificate) if certificate else self


@dataclass(frozen=True)
class GrowthRecord(ChangeRecord):
    """One growth."""

    plan: GrowthPlan

    def in_manifest(self) -> Manifest:
        """Under `growth`."""
        return Manifest(growth=self.recorded())


@dataclass(frozen=True)
class ShrinkRecord(ChangeRecord):
    """One shrinking."""

    plan: ShrinkPlan

    def in_manifest(self) -> Manifest:
        """Under `shrink`."""
        return Manifest(shrink=self.recorded())

    @property
    def notice(self) -> str | None:
        """Importance that was measured on other values of the same shape; none where either hash is not known."""
        measured, shrunk = self.plan.importance_of, self.source_logical_hash
        if None in (measured, shrunk) or measured == shrunk:
            return None
        return (
            f"importance was measured on a checkpoint of hash {measured}, not on the one that shrinks ({shrunk}): "
            "measure it again if that was not meant"
        )


NESTED = {"plan", "before", "certificate", "extra", "absent"}


def growth_of(manifest: Manifest) -> GrowthRecord | None:
    """The growth that a checkpoint's stage began with; none if it did not grow. Raises as `ChangeRecord.from_json`."""
    found = ChangeRecord.from_json(manifest.growth.saved) if manifest.growth else None
    return found if isinstance(found, GrowthRecord) else None


def shrinking_of(manifest: Manifest) -> ShrinkRecord | None:
    """The shrinking that a checkpoint's stage began with; none if there was none. Raises as `growth_of`."""
    found = ChangeRecord.from_json(manifest.shrink.saved) if manifest.shrink else None
    return found if isinstance(found, ShrinkRecord) else None


def change_of(manifest: Manifest) -> ChangeRecord | None:
    """The growth or shrinking that a checkpoint's stage began with. Raises as `growth_of`."""
    return growth_of(manifest) or shrinking_of(manifest)


def change_behind(manifest: Manifest) -> ChangeRecord | None:
    """The last growth or shrinking of a checkpoint's history: that of its stage, or of the checkpoint that its run
    started from."""
    change = manifest.growth or manifest.shrink or manifest.earlier_growth
    return ChangeRecord.from_json(change.saved) if change else None


def certificate_of(manifest: Manifest) -> Certificate | None:
    """The certificate of the change of shape at the start of a checkpoint's stage; none if nothing was measured."""
    if manifest.certificate:
        return Certificate.from_json(manifest.certificate)
    change = change_of(manifest)
    return change.certificate if change else None


def _unknown(what: str, error: Exception) -> RequestError:
    reason = " ".join(f"{type(error).__name__}: {error}".split())
    return RequestError(f"the {what} is not one that this program knows ({reason:.200}): update it")
