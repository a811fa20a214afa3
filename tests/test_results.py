"""docs/results.md holds what docs/benchmarks says, and nothing that was typed by hand."""

import json
import re
import shutil
import sys

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

import results
from results import CLOSE, OPEN, NoPage, fix, minutes, pm, render, score, sig

TEMPLATE = (ROOT / "docs/results.template.md").read_text()
PAGE = (ROOT / "docs/results.md").read_text()
STORED = ROOT / "docs/benchmarks"
SMALL = {
    "environment": {"commit": "0123456789"},
    "rows": [
        {"contender": "ours", "k": 5, "mse": 0.00124, "kl": 53.7197, "kl_sd": 0.52542},
        {"contender": "other", "k": 50, "mse": 0.0222, "kl": None, "kl_sd": None, "note": "slow"},
    ],
    "models": {"one": {"fid": {"value": 7.4394, "interval": [6.5411, 8.3377], "spread": None}}},
}


@pytest.fixture
def stored(tmp_path):
    (tmp_path / "small.json").write_text(json.dumps(SMALL))
    return tmp_path


def page_of(body: str, stored) -> str:
    return render('{% set small = load("small") %}\n' + body, stored)


def test_the_page_is_what_template_and_figures_give():
    assert render(TEMPLATE, STORED) == PAGE, "make results writes it anew"


@pytest.mark.parametrize(
    "value, digits, text",
    [
        (46800.45, 3, "46,800"),
        (2474.7495, 3, "2,470"),
        (0.065, 3, "0.0650"),
        (9.999, 3, "10.0"),
        (-538.1, 2, "-540"),
        (1.8067e-16, 2, "1.8e-16"),
        (7.63e-8, 2, "7.6e-8"),
        (9.5367e-6, 1, "1e-5"),
        (0.00012, 2, "0.00012"),
        (0, 3, "0.00"),
        (40538162.05, 3, "40,500,000"),
    ],
)
def test_significant_digits(value, digits, text):
    assert sig(value, digits) == text


@pytest.mark.parametrize(
    "value, decimals, text",
    [(1234.56, 1, "1,234.6"), (20032, -3, "20,000"), (-0.0982, 1, "-0.1"), (-0.001, 2, "0.00")],
)
def test_decimals(value, decimals, text):
    assert fix(value, decimals) == text


@pytest.mark.parametrize(
    "value, error, text",
    [
        (7.8512, 0.2996, "7.85 ± 0.30"),
        (-2383.93, 19.04, "-2,384 ± 19"),
        (7212.7, 250.4, "7,210 ± 250"),
        (0.010306, 0.000245, "0.01031 ± 0.00024"),
        (95.05, 0.996, "95.0 ± 1.0"),
    ],
)
def test_errors_have_two_digits_and_values_as_many_decimals(value, error, text):
    assert pm(value, error) == text


def test_scores_show_their_spread_or_interval():
    assert score({"value": 7.8512, "interval": [7, 8], "spread": 0.2996}) == "7.85 ± 0.30"
    assert score({"value": 7.4394, "interval": [6.5411, 8.3377], "spread": None}) == (
        "7.44 [6.54, 8.34]"
    )
    assert score({"value": 0.4758, "interval": None, "spread": None}) == "0.476"


def test_minutes_carry_their_seconds():
    assert [minutes(s) for s in (739.752, 540, 59.6)] == ["12 min 20 s", "9 min 0 s", "1 min 0 s"]


def test_a_table_has_the_rows_and_columns_asked_for(stored):
    columns = '"contender", "MSE: mse", "k", "KL: kl ± kl_sd", "note"'
    page = page_of(f"{{{{ small.rows | table({columns}) }}}}", stored)
    assert page.split("\n") == [
        "| contender | MSE | k | KL | note |",
        "| --- | --- | --- | --- | --- |",
        "| ours | 0.00124 | 5 | 53.72 ± 0.53 |  |",
        "| other | 0.0222 | 50 |  | slow |",
    ]


def test_named_rows_bring_their_names_and_scores(stored):
    page = page_of('{{ small.models | table("Fréchet: fid") }}', stored)
    assert "|  | Fréchet |\n| --- | --- |\n| one | 7.44 [6.54, 8.34] |" in page


@pytest.mark.parametrize(
    "name, keys",
    [
        ("celeba64", ("rows", -1, "validation/mse")),
        ("sampling-cpu", ("rows", 0, "median_ms")),
        ("vae_celeba64", ("rows", "wae-seed0", "frechet/judge", "value")),
        ("transcribed", ("rows", 0, "mse")),
    ],
)
def test_a_changed_figure_changes_the_page(name, keys, tmp_path):
    shutil.copytree(STORED, tmp_path, dirs_exist_ok=True)
    path = tmp_path / f"{name}.json"
    document = holder = json.loads(path.read_text())
    for key in keys[:-1]:
        holder = holder[key]
    holder[keys[-1]] *= 1.5
    path.write_text(json.dumps(document))
    lines = zip(PAGE.splitlines(), render(TEMPLATE, tmp_path).splitlines(), strict=True)
    assert 1 <= sum(old != new for old, new in lines) <= 2


@pytest.mark.parametrize(
    "body, named",
    [
        ('{{ load("tiny").rows }}', ["line 2", "tiny.json", "docs/benchmarks"]),
        ("{{ small.rows[0].mae | sig }}", ["line 2", "small.json", "'mae'", "'mse'"]),
        ('{{ row(small.rows, contender="nobody").mse | sig }}', ["small.json", "0 rows", "nobody"]),
        ("{{ row([], k=5).mse | sig }}", ["line 2"]),
        ("{{ row(small.rows).mse | sig }}", ["small.json", "2 rows"]),
        ('{{ small.rows | table("contender", "mae") }}', ["small.json", "'mae'"]),
        ("{{ smal.rows }}", ["line 2", "'smal' is undefined"]),
        ("{{ small.rows[1].kl | sig }}", ["line 2"]),
        ("{% for r in small.rows %}", ["line 2", "endfor"]),
    ],
)
def test_what_is_missing_is_named(body, named, stored):
    with pytest.raises(NoPage) as error:
        page_of(body, stored)
    assert all(part in str(error.value) for part in named), error.value


@pytest.mark.parametrize(
    "body",
    [
        "| a | b |\n|---|---|\n| ours | 12 |",
        "| a | b |\n|---|---|\n| ours | {{ small.rows[0].k }} | about 3 |",
        "| a | b |\n|---|---|\n{% for r in small.rows %}\n| ours | {{ r.k }}.5 |\n{% endfor %}",
        "| a\\|b | c |\n|---|---|\n| p\\|q 1 | 2 |",
        "It took 1.5 s.",
        "One ` alone.\n\nIt took 1.5 s, and `x`.",
        "The error is 3e-8, or 2E+5.",
        "- reached 0.00124 `after` {{ small.rows[0].k }} images",
        "{{ 0.00124 }}",
        "{{ 0.00124 | sig(2) }}",
        '{{ "1.5" }}',
        "{% macro speed() %}1.5 {{ small.rows[0].k }}{% endmacro %}{{ speed() }}",
    ],
)
def test_typed_figures_are_refused(body, stored):
    with pytest.raises(NoPage, match="typed by hand"):
        page_of(body, stored)


@pytest.mark.parametrize(
    "body",
    [
        "| 64 px, 0.5 | at 16 |\n|---|---|\n| variance 0.135 | {{ small.rows[0].k }} |",
        "Batch 64 of 2,000 images, learning rate `3e-4`,\n`--model.variance\n0.135`.",
        "```\npython x.py --rate 0.5\n| a | 1 |\n| b | 2 |\n```",
        "[vae 64](https://example.org/v1.5)",
        "commit {{ small.environment.commit[:7] }}, {{ (100 * small.rows[0].mse) | sig(2) }} %",
        "{% macro speed(r) %}{{ r.mse | sig }}{% endmacro %}{{ speed(small.rows[0]) }}",
    ],
)
def test_settings_code_headings_and_labels_are_left_alone(body, stored):
    page_of(body, stored)


def test_any_figure_in_a_table_of_the_page_would_be_noticed(monkeypatch):
    pages = []
    with monkeypatch.context() as patch:
        patch.setattr(results, "refuse_typed", pages.append)
        render(TEMPLATE, STORED)
    page, tried = pages[0], 0
    for figure in re.finditer(f"{OPEN}([^{CLOSE}]*){CLOSE}", page):
        *_, line_before, line = ["", "", *page[: figure.start()].split("\n")]
        cells = len(re.findall(r"(?<!\\)\|", line))
        in_table = "\n" in figure[1] or (line_before.startswith("|") and cells > 1)
        if in_table and re.search(r"\d", figure[1]):
            tried += 1
            with pytest.raises(NoPage, match="typed by hand"):
                results.refuse_typed(page[: figure.start()] + figure[1] + page[figure.end() :])
    assert tried > 300


def test_check_fails_where_the_page_is_not_the_templates(tmp_path, monkeypatch, capsys):
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks/small.json").write_text(json.dumps(SMALL))
    (tmp_path / "results.template.md").write_text('MSE {{ load("small").rows[0].mse | sig }}\n')
    monkeypatch.setattr(results, "DOCS", tmp_path)
    page = tmp_path / "results.md"
    page.write_text("MSE 0.00123\n")

    monkeypatch.setattr(sys, "argv", ["results.py", "--check"])
    with pytest.raises(SystemExit, match="make results"):
        results.main()
    assert "+MSE 0.00124" in capsys.readouterr().out
    assert page.read_text() == "MSE 0.00123\n"

    monkeypatch.setattr(sys, "argv", ["results.py"])
    results.main()
    assert page.read_text() == "MSE 0.00124\n"
    monkeypatch.setattr(sys, "argv", ["results.py", "--check"])
    results.main()


def test_a_faulty_template_leaves_the_page_alone(tmp_path, monkeypatch):
    (tmp_path / "results.template.md").write_text("It took 1.5 s.\n")
    (tmp_path / "results.md").write_text("as it was")
    monkeypatch.setattr(results, "DOCS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["results.py"])
    with pytest.raises(SystemExit, match=r"results\.template\.md: typed by hand: It took"):
        results.main()
    assert (tmp_path / "results.md").read_text() == "as it was"


@pytest.mark.parametrize("path", sorted(STORED.glob("*.json")), ids=lambda path: path.name)
def test_stored_files_name_no_path_of_a_machine(path):
    assert not re.findall(r'["= ]/\w.*', path.read_text())
