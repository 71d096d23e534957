"""What the files beside a tokenizer say of it: `tokenizer_config.json` and the other files of a Hugging Face folder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from flm_megatron.data.tokenizer.files import TokenizerFiles
from flm_megatron.errors import DamagedError, RequestError
from flm_megatron.json_text import JsonObject

CONFIG = "tokenizer_config.json"
SPECIAL = "special_tokens_map.json"
TEMPLATE = "chat_template.jinja"
GENERATION = "generation_config.json"
MODEL = "config.json"
ROLES = ("bos", "eos", "pad")


@dataclass(frozen=True)
class Neighbours:
    """Names or ids of special tokens (`bos`, `eos`, `pad`), where a file says them; ids at which an answer ends."""

    special: Mapping[str, str | int]
    ends: tuple[int, ...]

    def ids(self, names: Mapping[str, int], where: TokenizerFiles) -> dict[str, int]:
        """Ids of the special tokens that are known, through the ids of `names`.

        Raises:
            RequestError: the token that ends a document is none of these.
        """
        known = set(names.values())
        found = {
            role: number
            for role, token in self.special.items()
            if (number := names.get(token) if isinstance(token, str) else token) in known and number is not None
        }
        if "eos" in self.special and "eos" not in found:
            raise RequestError(
                f"tokenizer {where.path} has no token {self.special['eos']!r}, with which the files beside it say that "
                f"a document ends: set eos_token in {where.place(CONFIG)}"
            )
        return found


def read_neighbours(files: TokenizerFiles) -> Neighbours:
    """What the files beside a tokenizer say. Raises DamagedError for one that is not JSON."""
    sources = [files.json_beside(name) for name in (CONFIG, SPECIAL, GENERATION, MODEL)]
    named = {role: next(_tokens(sources, role), None) for role in ROLES}
    special = {role: token for role, token in named.items() if token is not None}
    return Neighbours(special, _numbers(sources[2].get("eos_token_id")))


def read_template(files: TokenizerFiles) -> str | None:
    """The chat template that lies beside a tokenizer; of several the one called `default`. Raises DamagedError."""
    data = files.beside(TEMPLATE)
    if data is not None:
        try:
            return data.decode()
        except UnicodeDecodeError as error:
            raise DamagedError(f"{files.place(TEMPLATE)} is not UTF-8 text: {error.reason}") from None
    found = files.json_beside(CONFIG).get("chat_template")
    if isinstance(found, list):
        named = [each for each in found if isinstance(each, dict) and each.get("name") == "default"]
        found = named[0].get("template") if named else None
    return found if isinstance(found, str) else None


def _tokens(sources: list[JsonObject], role: str) -> Iterator[str | int]:
    """What the files call a special token, names before ids."""
    for source in sources:
        token = source.get(f"{role}_token")
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str):
            yield token
    for source in sources:
        yield from _numbers(source.get(f"{role}_token_id"))


def _numbers(value: object) -> tuple[int, ...]:
    """The ids in a field that holds one, or a list of them."""
    values = value if isinstance(value, list) else [value]
    return tuple(number for number in values if isinstance(number, int) and not isinstance(number, bool))
