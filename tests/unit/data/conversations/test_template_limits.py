"""Chat templates that would never end or fill the memory: one line, soon, and nothing is left running."""

from __future__ import annotations

import gc
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest

from flm_megatron.data.conversations.template import TELE_FLM_TEMPLATE, ChatTemplate
from flm_megatron.data.tokenizer import Tokenizer
from flm_megatron.errors import RequestError
from tests.support.chat_cases import conversation, tokenizer

LOOPS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
DOUBLING = "{% set n = namespace(s='x') %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}{{ n.s }}"
MACRO = "{% macro m(d) %}{% if d %}{{ m(d - 1) }}{{ m(d - 1) }}{% endif %}{% endmacro %}{{ m(60) }}"
TAKES_TOO_MUCH = "takes more than 1 s of computing or 1 GiB|needs more than 1 GiB|writes .* characters|too (deeply|big)"
ENDLESS = {
    "loops in loops": LOOPS,
    "a loop of a billion": "{% for i in range(10**9) %}{% endfor %}",
    "text times a number": "{% set n = messages | length %}{{ 'x' * (10**10 * n) }}",
    "text times a number, folded while it is compiled": "{{ 'x' * 10**10 }}",
    "text doubled": DOUBLING,
    "a width by percent": "{% set n = messages | length %}{{ '%' ~ (9 * 10**9 * n) ~ 'd' }}{{ ('%9000000000d') % n }}",
    "a width by a method": "{% set n = messages | length %}{{ 'x'.ljust(10**10 * n) }}",
    "a width by a filter": "{% set n = messages | length %}{{ 'x' | center(10**10 * n) }}",
    "a power": "{% set n = messages | length %}{{ (10 ** (10 ** 9 * n)) % 7 }}",
    "a macro that calls itself twice": MACRO,
    "a macro that calls itself": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "much output": "{% for i in range(9999) %}{{ 'x' * 9999 }}{% endfor %}",
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.mark.parametrize("case", ENDLESS)
def test_a_template_without_end_is_one_clear_line(case: str, model: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "chat.jinja"
    path.write_text(ENDLESS[case])
    began = resource.getrusage(resource.RUSAGE_CHILDREN)
    with pytest.raises(RequestError, match=TAKES_TOO_MUCH) as refused:
        ChatTemplate(str(path), model).pieces(conversation(0)["messages"], "file line 7")
    gc.collect()
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert str(path) in str(refused.value)
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 500
    assert ended.ru_utime + ended.ru_stime - began.ru_utime - began.ru_stime < 3


def test_the_template_of_a_file_writes_as_ours_does(model: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "same.jinja").write_text(TELE_FLM_TEMPLATE)
    ours, same = ChatTemplate("tele-flm", model), ChatTemplate(str(tmp_path / "same.jinja"), model)
    for number in range(20):
        messages = conversation(number)["messages"]
        assert same.pieces(messages, "here") == ours.pieces(messages, "here")
        assert same.render(messages, True) == ours.render(messages, True)


def test_after_one_that_takes_too_long_the_next_is_rendered(model: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "t.jinja").write_text(
        "{% if messages[0].content == 'loop' %}" + LOOPS + "{% endif %}" + TELE_FLM_TEMPLATE
    )
    template = ChatTemplate(str(tmp_path / "t.jinja"), model)
    with pytest.raises(RequestError, match=r"here: template .*t\.jinja cannot write it: it takes more than 1 s"):
        template.render([{"role": "user", "content": "loop"}], True, "here")
    assert template.render([{"role": "user", "content": "go"}], True) == "<_user>go<_bot>"


def test_the_process_ends_with_the_template(model: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "t.jinja").write_text(TELE_FLM_TEMPLATE)
    template = ChatTemplate(str(tmp_path / "t.jinja"), model)
    assert template._process is not None
    process = template._process._process
    assert process.poll() is None
    del template
    gc.collect()
    assert process.poll() == 0


def test_the_process_ends_when_its_parent_is_killed(tmp_path: Path) -> None:
    code = (
        "import os, signal\nfrom flm_megatron.data.conversations.template_process import TemplateProcess\n"
        "p = TemplateProcess('x')\nprint(p._process.pid, flush=True)\nos.kill(os.getpid(), signal.SIGKILL)\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    pid = int(run.stdout)
    for _ in range(100):
        stat = Path(f"/proc/{pid}/stat")
        if not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.05)
    pytest.fail("the rendering process is still there")


def test_a_file_that_is_too_large_is_no_template(model: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "t.jinja").write_text("x" * 2_000_000)
    with pytest.raises(RequestError, match="is no chat template"):
        ChatTemplate(str(tmp_path / "t.jinja"), model)
