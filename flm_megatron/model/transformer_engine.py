"""Whether Transformer Engine, where a stage asks for it, is installed and can build its layers."""

from __future__ import annotations

from importlib.util import find_spec

from flm_megatron.config.schema import StageConfig
from flm_megatron.errors import RequestError


def require_transformer_engine(stage: StageConfig) -> None:
    """Check that the stage's layers can be built from Transformer Engine's modules, if they are to be.

    Raises:
        RequestError: it is not installed, or has no such positions.
    """
    if not stage.transformer_engine:
        return
    if find_spec("transformer_engine") is None:
        raise RequestError(
            f"stage {stage.name!r} asks for transformer_engine, which is not installed; "
            "install flm_megatron[te] or set transformer_engine to false"
        )
    if stage.model.position == "xpos":
        raise RequestError(
            f"stage {stage.name!r}: transformer_engine has no xpos positions; set transformer_engine to false"
        )
