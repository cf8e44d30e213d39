"""`dataset.template`: conversations from the columns of a table, templates in files, and templates that cannot be meant."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engines.errors import ConfigError, EngineError
from jobs import infer as command
from pipeline.configuration.compose import compose
from pipeline.dataset.formats import Parsed, RowParser
from tests.support.infer import Infer

ROWS = [{"ticket": "t1", "q": "why?"}, {"ticket": "t2", "q": None}]


def rendered(template: Any, **columns: Any) -> Any:
    return pickle.loads(pickle.dumps(RowParser(template=template))).parse(columns).messages


def refusal(template: Any, **columns: Any) -> str:
    with pytest.raises(EngineError) as caught:
        RowParser(template=template).parse(columns)
    assert caught.value.type == "invalid_input"
    return str(caught.value)


def test_a_template_is_the_user_message_or_several_messages() -> None:
    assert rendered("Q: {{ q }}\n", q="why?") == [{"role": "user", "content": "Q: why?\n"}]
    both = [{"role": "system", "content": "in fr"}, {"role": "user", "content": "why?"}]
    assert rendered({"system": "in {{ lang }}", "user": "{{ q }}"}, lang="fr", q="why?") == both
    turns = [{"role": "system", "content": "in {{ lang }}"}, {"role": "user", "content": "{{ q }}"}]
    assert rendered(turns, lang="fr", q="why?") == both


def test_a_template_sees_columns_by_name_and_as_row() -> None:
    assert rendered("{{ row['a b'] }} {{ x.y[0] }}", **{"a b": 1, "x": {"y": [2]}})[0]["content"] == "1 2"
    assert rendered("{{ x | tojson }}", x={"é": ["<ü>", 2**70]})[0]["content"] == '{"é": ["<ü>", 1180591620717411303424]}'
    assert rendered("{% for m in c %}{{ m }};{% endfor %}", c=["a", "b"])[0]["content"] == "a;b;"
    assert rendered("{{ x if x is defined else 'none' }} {{ n or '' }}", n=None)[0]["content"] == "none "
    assert rendered("<{{ x }}>", x="<b>&")[0]["content"] == "<<b>&>"


def test_with_a_template_only_the_id_and_named_columns_have_a_meaning() -> None:
    row = {
        "id": 3,
        "q": "x",
        "messages": "m",
        "generation": {"seed": 1},
        "model": "m",
        "tools": [{}],
        "system": "s",
        "n": 2,
    }
    assert RowParser(template="{{ q }}").parse(row) == Parsed([{"role": "user", "content": "x"}], "3")
    columns = {"generation": "generation", "max_tokens": "n", "model": "model", "system": "system"}
    parsed = RowParser(template="{{ q }}", columns=columns).parse(row)
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "x"}]
    assert parsed == Parsed(messages, "3", {"seed": 1, "max_tokens": 2}, "m")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "template, reason",
    [
        ("{{ question }}", "the template failed: 'question' is undefined; this row has q, n"),
        ("{{ q.nope }}", "the template failed: 'str object' has no attribute 'nope'"),
        ("{{ ''.__class__ }}", "the template failed: SecurityError: access to attribute '__class__' of 'str' object"),
        ("{{ q.__class__.__mro__ }}", "the template failed: SecurityError: "),
        ("{{ row.clear() }}", "the template failed: SecurityError: "),
        ("{{ 1 / 0 }}", "the template failed: ZeroDivisionError: division by zero"),
        ("{{ q + 1 }}", "the template failed: TypeError: "),
        ("{% for i in range(10**9) %}{% endfor %}", "the template failed: OverflowError: Range too big"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "the template failed: RecursionError"),
        ("{{ '\\ud800' }}", "the template failed: UnicodeEncodeError: "),
        ("{% include 'x' %}", "the template failed: TypeError: no loader for this environment"),
        ("{{ n }}", "the template prints a null; write {{ column or '' }} where a value may be null"),
    ],
)
def test_a_template_that_fails_is_the_rows_failure(template: str, reason: str) -> None:
    assert refusal(template, q="x", n=None).startswith(reason)


# -- files ------------------------------------------------------------------------------------------------------------


def test_a_template_file_is_read_once_and_its_content_is_the_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "user.j2").write_text("Q: {{ q }}\n\n")
    (tmp_path / "system.j2").write_text("Short.")
    template = compose(["engine=echo", "dataset.template=@user.j2"]).dataset.template
    assert template == "Q: {{ q }}\n"  # without the last line feed
    both = compose(["engine=echo", "dataset.template={system: @system.j2, user: @user.j2}"]).dataset.template
    assert both == {"system": "Short.", "user": "Q: {{ q }}\n"}
    assert compose([f"dataset.template=@{tmp_path}/system.j2"]).dataset.template == "Short."
    assert compose(["dataset.template='@{{ q }}, look'"]).dataset.template == "@{{ q }}, look"
    assert rendered("@user.j2", q="why?") == [{"role": "user", "content": "Q: why?\n"}]


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (
            "@promt.j2",
            "dataset.template: cannot read the file promt.j2: No such file or directory (did you mean 'prompt.j2'?)",
        ),
        ("@.", "dataset.template: cannot read the file .: Is a directory"),
        ("@latin.j2", "dataset.template: the file latin.j2 is not UTF-8 text"),
        ("{user: Hi {{ q }}}", "a mapping needs quotes around its texts: {user: 'Hi {{ name }}'}"),
    ],
)
def test_a_template_that_cannot_be_read_is_one_line(
    template: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompt.j2").write_text("{{ q }}")
    (tmp_path / "latin.j2").write_bytes(b"caf\xe9 {{ q }}")
    (tmp_path / "in.jsonl").write_text('{"q": "x"}\n')
    argv = ["engine=echo", "dataset.path=in.jsonl", "output.path=out", "run.dry_run=true", f"dataset.template={template}"]
    assert command.main(argv) == 2
    assert said in capsys.readouterr().err


@pytest.mark.slow
def test_the_content_of_a_template_file_decides_what_is_asked(
    infer: Infer, write_jsonl: Callable[..., Path], tmp_path: Path
) -> None:
    data, first, second = write_jsonl(ROWS[:1] * 1 + [{"ticket": "t3", "q": "how?"}]), tmp_path / "a.j2", tmp_path / "b.j2"
    first.write_text("Q: {{ q }}")
    second.write_text("Q: {{ q }}")
    assert infer(data, f"dataset.template=@{first}").manifest["this_run"]["asked"] == 2
    assert infer(data, f"dataset.template=@{second}").manifest.get("this_run", {}).get("asked", 0) in (0, 2)
    assert "No request was sent: the output is up to date." in infer.printed  # another file with the same content
    second.write_text("Question: {{ q }}")
    assert infer(data, f"dataset.template=@{second}").manifest["this_run"]["asked"] == 2
    assert [row["response"] for row in infer.rows()] == ["Question: why?", "Question: how?"]
    assert json.loads((infer.out / "manifest.json").read_text())["config"]["dataset"]["template"] == "Question: {{ q }}"


# -- templates that ask the same for each row -----------------------------------------------------------------------------


@pytest.mark.parametrize("template", ["prompt.txt", {"system": "Be brief.", "user": "{{ 1 + 1 }}"}])
@pytest.mark.parametrize("dry", ["true", "false"])
def test_a_template_without_a_variable_is_refused_for_several_rows(
    template: Any, dry: str, infer: Infer, write_jsonl: Callable[..., Path]
) -> None:
    given = template if isinstance(template, str) else json.dumps(template)
    with pytest.raises(ConfigError, match=r"has no variable such as .*: dataset\.template=@prompt\.j2"):
        infer(write_jsonl(ROWS), f"dataset.template={given}", f"run.dry_run={dry}")
    assert not (infer.out / "data").exists()


@pytest.mark.parametrize("overrides", [(), ("dataset.limit=1",)])
def test_a_template_without_a_variable_may_ask_for_one_row(
    overrides: tuple[str, ...], infer: Infer, write_jsonl: Callable[..., Path]
) -> None:
    infer(write_jsonl(ROWS[: 2 if overrides else 1]), "dataset.template=Say hi.", *overrides)
    assert [row["response"] for row in infer.rows()] == ["Say hi."]


@pytest.mark.parametrize(
    "template", ["{{ q }}", "{% for x in row %}{{ x }}{% endfor %}", "{% if q %}a{% else %}b{% endif %}"]
)
def test_a_template_with_a_variable_is_not_refused(template: str) -> None:
    parser = RowParser(template=template)
    assert parser._template is not None and parser._template.varies


def test_a_row_whose_template_fails_keeps_its_mapped_id(infer: Infer, write_jsonl: Callable[..., Path]) -> None:
    outcome = infer(write_jsonl(ROWS), "dataset.template={{ q }}", "dataset.columns={id: ticket}")
    assert outcome.exit_status == 3
    assert [(row["id"], row["error"] is None) for row in infer.rows()] == [("t1", True), ("t2", False)]
    assert infer.rows()[1]["error"]["message"].startswith("in.jsonl:2: the template prints a null")
