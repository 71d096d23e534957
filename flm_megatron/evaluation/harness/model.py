"""The language model that lm-evaluation-harness sees. Importing this module needs the package `lm_eval`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM

from flm_megatron.data.conversations.template import ChatTemplate
from flm_megatron.errors import RequestError
from flm_megatron.evaluation.generation.generate import GenerationRequest
from flm_megatron.evaluation.generation.sampling import SamplingSettings
from flm_megatron.evaluation.perplexity.scoring import ScoringRequest
from flm_megatron.evaluation.perplexity.windows import sliding_windows
from flm_megatron.evaluation.session import Session
from flm_megatron.json_text import Json

SAMPLING = ("temperature", "top_k", "top_p", "repetition_penalty")
OTHER_OPTIONS = ("until", "max_gen_toks", "max_new_tokens", "do_sample")


class HarnessModel(TemplateLM):
    """A session as lm-evaluation-harness's model: it runs on rank 0, and the session's processes share the work.

    Contexts longer than `context` tokens lose their beginning; chats are written in `template`.
    """

    def __init__(self, session: Session, context: int, template: ChatTemplate) -> None:
        super().__init__()
        self.session, self.context, self.template = session, context, template

    @property
    def eot_token_id(self) -> int:
        """The end-of-document id, which is also what comes before a text without context."""
        return self.session.tokenizer.eod

    @property
    def tokenizer_name(self) -> str:
        """The tokenizer's fingerprint, under which requests may be cached."""
        return self.session.tokenizer.fingerprint

    def chat_template(self, chat_template: bool | str = False) -> str:
        """The name of the template, for the record of results."""
        return self.template.name if chat_template else ""

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as text; `add_generation_prompt` opens the next answer. Raises RequestError as a template."""
        return self.template.render(chat_history, add_generation_prompt)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **unused: object) -> list[int]:
        """Ids of a text or of a chat; none are added."""
        return self.template.encode(string)

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **unused: object
    ) -> list[tuple[float, bool]]:
        asked = []
        for index, (_, context, continuation) in enumerate(requests):
            room = max(self.context + 1 - len(continuation), 1)
            kept = (context or [self.eot_token_id])[-room:]
            asked.append(ScoringRequest(index, [*kept, *continuation], len(kept)))
        return [(found.log_likelihood, found.greedy) for found in self.session.score(asked)]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of each whole text, over windows that move by half of their length."""
        asked: list[ScoringRequest] = []
        owners: list[int] = []
        for owner, request in enumerate(requests):
            ids = [self.eot_token_id, *self.tok_encode(request.args[0])]
            for window in sliding_windows(len(ids) - 1, self.context, max(1, self.context // 2)):
                part = ids[window.start : window.end + 1]
                asked.append(ScoringRequest(len(asked), part, window.scored - window.start + 1))
                owners.append(owner)
        totals = [0.0] * len(requests)
        for owner, found in zip(owners, self.session.score(asked), strict=True):
            totals[owner] += found.log_likelihood
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """The completion of each context up to one of its stop strings."""
        asked = [self._generation(index, *request.args) for index, request in enumerate(requests)]
        return [completion.text for completion in self.session.generate(asked)]

    def _generation(self, index: int, context: str, options: Mapping[str, Json]) -> GenerationRequest:
        unknown = set(options) - {*SAMPLING, *OTHER_OPTIONS}
        if unknown:
            raise RequestError(
                f"the task asks for generation options {', '.join(sorted(unknown))}, which are not known here: known "
                f"are {', '.join((*OTHER_OPTIONS, *SAMPLING))}"
            )
        new = int(options.get("max_gen_toks", options.get("max_new_tokens", 256)))
        ids = self.tok_encode(context) or [self.eot_token_id]
        sampling = {name: options[name] for name in SAMPLING if name in options}
        if not options.get("do_sample", sampling.get("temperature", 0) > 0):
            sampling["temperature"] = 0.0
        elif "temperature" not in sampling:
            sampling["temperature"] = 1.0
        return GenerationRequest(
            index, ids[-max(self.context - new, 1) :], new, _strings(options.get("until")), SamplingSettings(**sampling)
        )


def _strings(until: str | Sequence[str] | None) -> tuple[str, ...]:
    return (until,) if isinstance(until, str) else tuple(until or ())
