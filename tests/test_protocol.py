"""Which reports may stand side by side, and whether a figure came out the same twice."""

import copy

import pytest

from pipeline.evaluation import protocol as protocols
from pipeline.evaluation.protocol import (
    MAY_DIFFER,
    MUST_AGREE,
    PROTOCOL_KEYS,
    Difference,
    compare_figures,
    differences,
)

JUDGE, INCEPTION = "a" * 64, "6726825d" + "0" * 56


def make_protocol(**changes):
    """A protocol with every key."""
    values = {key: f"some {key}" for key in sorted(PROTOCOL_KEYS)}
    values |= {"num_images": 256, "image_size": 64, "source": "faces", "split": "valid"}
    values |= {"date": "2026-11-21T23:01:58Z", "commit": "72b65f6e4151"}
    values["features"] = {"judge": {"sha256": JUDGE, "path": "runs/judge"}}
    values["sets"] = {"floor": {"numbers_sha256": "12"}, "reference": "valid split"}
    values["checkpoint"] = {"path": "runs/demo/vqvae", "sha256": "c" * 64}
    return values | changes


def make_figure(images, metric, value, features="judge", **changes):
    figure = {
        "tag": f"evaluation/{images}/{metric}/{features}", "images": images, "metric": metric,
        "features": features, "features_sha256": JUDGE if features else None, "value": value,
        "interval": None, "spread": None, "num_images": 256, "num_reference": 256,
    }  # fmt: skip
    return figure | changes


def make_report(**changes):
    """A report with one of everything."""
    report = {
        "protocol": make_protocol(),
        "figures": [
            make_figure("floor", "frechet", 1.4503, interval=[0.7781, 2.1225]),
            make_figure("floor", "kid", -0.013477, spread=0.020056),
            make_figure("samples", "frechet", 6.6078, interval=[4.8616, 8.3539]),
            make_figure("samples", "kid", 0.291765, spread=0.046396),
            make_figure("samples", "precision", 0.83203, num_images=128),
            make_figure("samples:top 10 %", "kid", 0.212, num_reference=512),
            make_figure("samples", "cas_average_precision/Smiling", 0.7123),
            make_figure("reconstructions", "psnr", 26.1395, features=None),
            make_figure("reconstructions", "level0/codes_used", 123456, features=None),
        ],
        "curves": {
            "Fréchet over 1/n": {
                "x": "1/n", "y": "Fréchet distance", "note": "The limit is at 0.",
                "series": {
                    "samples": [[0, 5.91, 0.4], [0.01, 7.77, None]], "floor": [[0, 0.12, 0]],
                },
            }
        },
        "pictures": {"samples": "samples.png"},
        "absent": ["LPIPS: no weights; give --lpips_weights PATH"],
    }  # fmt: skip
    return report | changes


def test_each_key_decides_something_or_nothing():
    assert not MUST_AGREE.keys() & MAY_DIFFER.keys()
    assert differences(make_protocol(), make_protocol()) == []


@pytest.mark.parametrize("key", sorted(PROTOCOL_KEYS - {"features", "sets"}))
def test_a_changed_key_is_named_where_it_decides_something(key):
    found = differences(make_protocol(), make_protocol(**{key: "other"}))
    if key in MUST_AGREE:
        assert found == [Difference(key, make_protocol()[key], "other")]
    else:
        assert found == []


def test_nested_keys_are_named_with_dots_and_missing_ones_are_differences():
    sets = {"floor": {"numbers_sha256": "13"}}
    assert differences(make_protocol(), make_protocol(sets=sets)) == [
        Difference("sets.floor.numbers_sha256", "12", "13"),
        Difference("sets.reference", "valid split", None),
    ]


def test_features_must_have_the_same_weights_where_both_reports_have_them():
    ours = make_protocol()
    moved = make_protocol(features={"judge": {"sha256": JUDGE, "path": "elsewhere"}})
    assert differences(ours, moved) == []
    more = make_protocol(features={"judge": {"sha256": JUDGE}, "inception": {"sha256": INCEPTION}})
    assert differences(ours, more) == [] == differences(more, ours)
    other = make_protocol(features={"judge": {"sha256": "b" * 64}})
    assert differences(ours, other) == [Difference("features.judge", JUDGE, "b" * 64)]
    inception = make_protocol(features={"inception": {"sha256": INCEPTION}})
    assert differences(ours, inception) == [
        Difference("features.judge", JUDGE, None), Difference("features.inception", None, INCEPTION)
    ]  # fmt: skip


@pytest.mark.parametrize("key", protocols.OPTIONAL)
@pytest.mark.parametrize("nothing", [None, 0])
def test_what_one_report_has_not_measured_is_no_difference(key, nothing):
    assert differences(make_protocol(**{key: nothing}), make_protocol()) == []
    assert differences(make_protocol(), make_protocol(**{key: nothing})) == []


def test_unknown_and_missing_keys_are_refused_by_name():
    lacking = make_protocol()
    del lacking["recipe"]
    for protocol, key in ((lacking, "recipe"), (make_protocol(filter="box"), "filter")):
        with pytest.raises(ValueError, match=f"missing or unknown: {key}$"):
            protocols.check(protocol)
        with pytest.raises(ValueError, match=key):
            differences(make_protocol(), protocol)


def changed(number, **changes):
    report = copy.deepcopy(make_report())
    report["figures"][number] |= changes
    return report


def verdicts(old, new, tolerance=1e-6):
    return [row.same for row in compare_figures(old, new, tolerance)]


def test_figures_are_the_same_within_the_tolerance_alone():
    old = make_report()
    rows = compare_figures(old, changed(0, value=1.4503 * (1 + 1e-7)), 1e-6)
    assert [row.tag for row in rows] == [figure["tag"] for figure in old["figures"]]
    assert all(row.same for row in rows) and rows[0].new != rows[0].old == 1.4503
    different = [
        changed(0, value=1.4503 * (1 + 1e-5)), changed(0, value=-1.4503),
        changed(0, interval=[0.7781, 2.2]), changed(0, interval=None),
        changed(0, interval=None, spread=0.7),
        changed(0, features_sha256="b" * 64), changed(0, num_reference=255),
    ]  # fmt: skip
    for new in different:
        assert verdicts(old, new) == [False] + [True] * (len(rows) - 1)
    assert not any(verdicts(old, changed(1, spread=0.03))[1:2])
    assert verdicts(old, different[0], tolerance=1e-4)[0]


def test_a_figure_that_one_report_lacks_is_not_the_same():
    old, extra = make_report(), make_figure("blurred", "kid", 0.0)
    new = make_report(figures=[*old["figures"][1:], extra])
    rows = compare_figures(old, new, 1e-6)
    assert (rows[0].old, rows[0].new, rows[0].same) == (1.4503, None, False)
    assert rows[-1] == (extra["tag"], None, 0.0, False)
    assert all(row.same for row in rows[1:-1])
