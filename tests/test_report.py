"""The report: JSON and Markdown that agree, and reports side by side."""

import copy
import json

import pytest
from test_protocol import JUDGE, make_figure, make_protocol, make_report

from pipeline.evaluation.report import (
    FORCED,
    compare_reports,
    comparison_markdown,
    headline,
    markdown,
    number,
    read_report,
    write_report,
)
from pipeline.stage import UserError


def write(out, report):
    write_report(out, report["protocol"], report["figures"], report["pictures"],
                 report["curves"], report["absent"])  # fmt: skip


def cells(text, first):
    """The cells of the only line of a Markdown table whose first cell is this."""
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {first} |")]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_a_report_reads_back_and_its_markdown_is_of_the_json_alone(tmp_path):
    report = make_report()
    write(tmp_path, report)
    assert read_report(tmp_path) == report == read_report(tmp_path / "report.json")
    assert (tmp_path / "report.md").read_text() == markdown(report)
    assert {path.name for path in tmp_path.iterdir()} == {"report.json", "report.md"}


def test_markdown_has_every_figure_in_its_row_and_column():
    text = markdown(make_report())
    assert "# Features: judge (aaaaaaaa)" in text
    assert cells(text, "images") == [
        "images", "n", "Fréchet distance ↓", "KID ↓", "precision ↑"
    ]  # fmt: skip
    floor = cells(text, "real against real (floor)")
    assert floor[1:] == ["256", "1.45 [0.7781, 2.123]", "-0.01348 ± 0.02006", "-"]
    assert "| samples | 128 against 256 | - | - | 0.832 |" in text
    assert "| samples | 256 | 6.608 [4.862, 8.354] | 0.2918 ± 0.0464 | - |" in text
    assert "| samples: top 10 % | 256 against 512 | - | 0.212 | - |" in text
    samples, reconstructions = cells(text, "figure")[1:]
    assert samples.startswith("samples") and reconstructions.startswith("reconstructions")
    assert cells(text, "PSNR, dB ↑")[1:] == ["-", "26.14"]
    assert cells(text, "level0: codes used")[1:] == ["-", "123,456"]
    label = "CAS, average precision ↑: Smiling, judge (aaaaaaaa)"
    assert cells(text, label)[1:] == ["0.7123", "-"]
    # the curve, the rest
    assert cells(text, "1/n") == ["1/n", "samples", "floor"]
    assert cells(text, "0") == ["0", "5.91 ± 0.4", "0.12 ± 0"]
    assert cells(text, "0.01") == ["0.01", "7.77", "-"]
    assert "![samples](samples.png)" in text and "- LPIPS: no weights" in text
    assert cells(text, "checkpoint.sha256")[1] == "c" * 64


def test_hostile_names_do_not_break_markdown():
    report = make_report(
        protocol=make_protocol(data="a|b\n| c |"), pictures={"near": "near (1).png"}
    )
    assert "| data | a\\|b \\| c \\| |" in markdown(report)
    assert "![near](near%20%281%29.png)" in markdown(report)


def test_numbers_keep_four_digits_and_all_before_the_point():
    assert [number(x) for x in (0.000123456, 12.3456, 9999.4, 123456.7, -54321.0)] == [
        "0.0001235", "12.35", "9999", "123,457", "-54,321"
    ]  # fmt: skip


def test_the_headline_is_kid_for_few_images_and_fid_on_inception_features_alone():
    few = headline(make_report())
    assert (few.name, few.figure["value"], few.floor["value"]) == ("KID", 0.291765, -0.013477)
    many = make_report(protocol=make_protocol(num_images=10_000))
    found = headline(many)
    assert (found.name, found.figure["value"], found.why) == ("Fréchet distance", 6.6078, "")
    inception = make_figure("samples", "frechet", 3.5, features="inception")
    floor = make_figure("floor", "frechet", 0.7, features="inception")
    many["figures"] += [inception, floor]
    found = headline(many)
    assert (found.name, found.figure, found.floor) == ("FID", inception, floor)
    seeds = [make_figure(f"samples:seed{n}", "kid", n / 10) for n in range(3)]
    mean = make_figure("samples", "kid", 0.1, spread=0.1)
    assert headline(make_report(figures=[*seeds, mean])).figure == mean
    assert headline(make_report(figures=seeds)).figure == seeds[0]
    reconstructions = [make_figure("reconstructions", "kid", 0.1)]
    found = headline(make_report(figures=reconstructions))
    assert found.figure == reconstructions[0] and found.floor is None
    assert "real against real: not measured" in markdown(make_report(figures=reconstructions))
    limit = make_figure("samples", "frechet_extrapolated", 3.1, features="inception")
    assert "| FID, n → ∞ ↓ |" in markdown(make_report(figures=[limit]))
    pixels = make_report(figures=[make_figure("reconstructions", "psnr", 26.0, features=None)])
    assert headline(pixels) is None and "No distance between" in markdown(pixels)


def test_what_is_incomplete_unknown_or_not_finite_is_refused_and_nothing_written(tmp_path):
    def changed(**changes):
        report = copy.deepcopy(make_report())
        report["figures"][0] |= changes
        return report

    lacking = changed()
    del lacking["figures"][0]["spread"]
    twice = make_report()
    twice["figures"] = [*twice["figures"], twice["figures"][0]]
    hidden = make_report()  # another tag, but the same cell of the same table
    hidden["figures"] = [*hidden["figures"], hidden["figures"][0] | {"tag": "evaluation/other"}]
    curve = copy.deepcopy(make_report())
    curve["curves"]["Fréchet over 1/n"]["series"]["samples"][1][1] = float("inf")
    protocol = make_protocol()
    del protocol["seed"]
    cases = {
        "is nan": changed(value=float("nan")), "unknown: mean": changed(mean=1.0),
        "unknown: spread": lacking, "kid/judge is there twice|frechet/judge is there twice": twice,
        "evaluation/other is there twice": hidden, "has the point 0.01, inf": curve,
        "protocol: .*: seed": make_report(protocol=protocol),
    }  # fmt: skip
    for message, report in cases.items():
        with pytest.raises(ValueError, match=message):
            write(tmp_path, report)
    assert not list(tmp_path.iterdir())


def test_files_that_are_no_reports_are_refused_in_one_line(tmp_path):
    old = {key: make_report()[key] for key in ("protocol", "figures", "pictures")}
    for text in ("", "[]", "{}", json.dumps(old), '{"protocol"'):
        (tmp_path / "report.json").write_text(text)
        with pytest.raises(UserError, match="is no report") as refusal:
            read_report(tmp_path)
        assert "\n" not in str(refusal.value)
    with pytest.raises(UserError, match="absent"):
        read_report(tmp_path / "absent")


def test_reports_of_one_protocol_stand_side_by_side(tmp_path):
    other = make_report(figures=[make_figure("samples", "kid", 0.5), *make_report()["figures"][:2]])
    for name, report in (("a", make_report()), ("b", other)):
        (tmp_path / name).mkdir()
        write(tmp_path / name, report)
    names = [str(tmp_path / name) for name in "ab"]
    comparison = compare_reports([tmp_path / "a", tmp_path / "b" / "report.json"])
    assert list(comparison["reports"]) == names and comparison["differences"] == []
    assert comparison == json.loads(json.dumps(comparison))
    text = comparison_markdown(comparison)
    assert FORCED not in text and cells(text, "PSNR, dB ↑")[1:] == ["26.14", "-"]
    assert "| KID ↓, judge (aaaaaaaa) | 0.2918 ± 0.0464 | 0.5 |" in text
    for paths in ([], [tmp_path / "a"], [tmp_path / "a", tmp_path / "a" / "report.json"]):
        with pytest.raises(UserError, match="at least two reports"):
            compare_reports(paths)


def test_reports_of_different_protocols_are_refused_by_key_unless_forced(tmp_path):
    figures = make_report()["figures"]
    judge = [figure | {"features_sha256": "b" * 64} for figure in figures if figure["features"]]
    reports = {
        "a": make_report(),
        "split": make_report(protocol=make_protocol(split="test")),
        "judge": make_report(protocol=make_protocol(features={"judge": {"sha256": "b" * 64}}),
                             figures=judge),
        "count": make_report(figures=[figures[0] | {"num_images": 99}]),
    }  # fmt: skip
    for name, report in reports.items():
        (tmp_path / name).mkdir()
        write(tmp_path / name, report)
    messages = {
        "split": f"split is valid in {tmp_path}/a, test in {tmp_path}/split",
        "judge": f"features.judge is {JUDGE} in {tmp_path}/a, {'b' * 64} in",
        "count": "evaluation/floor/frechet/judge is of other counts: 256 in",
    }
    for name, message in messages.items():
        paths = [tmp_path / "a", tmp_path / name]
        with pytest.raises(UserError) as refusal:
            compare_reports(paths)
        assert message in str(refusal.value) and "\n" not in str(refusal.value)
        comparison = compare_reports(paths, force=True)
        assert message in comparison["differences"][0]
        text = comparison_markdown(comparison)
        assert f"**{FORCED}**" in text and message in text
    # figures of two judges are never in one row
    rows = compare_reports([tmp_path / "a", tmp_path / "judge"], force=True)["rows"]
    assert all(len(row["figures"]) == 1 for row in rows)
