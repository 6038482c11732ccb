import base64
import hashlib
import json
import math
from html.parser import HTMLParser
from itertools import pairwise

import numpy as np
import plotly.graph_objects as go
import pyarrow
import pytest
from synthetic_report import NASTY, RULES, SEEDS, synthetic_report

from lm_trust.compare import page_tables
from lm_trust.compare.figure_parts import ON_DARK, SYMBOLS, rule_styles
from lm_trust.compare.figures import BEST_OF_N, LIMIT, frontier_figure
from lm_trust.compare.frontier import Curve, improvement_table, limit_at
from lm_trust.compare.page import shown_values, write_page
from lm_trust.training.compare_curves import COLOURS

VOID = {"meta", "input", "path", "br", "link", "img"}


class Page(HTMLParser):
    """What a browser's parser finds in a page: elements with their attributes and texts."""

    def __init__(self, text):
        super().__init__()
        self.elements, self._open = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        element = {"tag": tag, **dict(attributes), "text": "", "inside": [one["tag"] for one in self._open]}
        self.elements.append(element)
        if tag not in VOID:
            self._open.append(element)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self._open.pop()

    def handle_endtag(self, tag):
        assert self._open[-1]["tag"] == tag, f"</{tag}> closes <{self._open[-1]['tag']}>"
        self._open.pop()

    def handle_data(self, data):
        for element in self._open:
            element["text"] += data

    def all(self, tag):
        return [element for element in self.elements if element["tag"] == tag]

    @property
    def data(self):
        return json.loads(next(one["text"] for one in self.all("script") if one.get("id") == "data"))

    @property
    def figures(self):
        return {figure["id"]: figure for figure in self.data["figures"]}


def make(report, rows, folder):
    write_page(report, rows, folder / "report.html")
    return Page((folder / "report.html").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def language():
    return synthetic_report()


@pytest.fixture(scope="module")
def page(language, tmp_path_factory):
    return make(*language, tmp_path_factory.mktemp("language"))


@pytest.fixture(scope="module")
def control_page(tmp_path_factory):
    return make(*synthetic_report("control"), tmp_path_factory.mktemp("control"))


def test_figures_of_both_worlds(page, control_page):
    shared = {"frontier", "course-heldout", "course-reward", "course-step-kl", "course-clip-fraction", "bound",
              "predicted", "cost-seconds", "cost-gradients"}  # fmt: skip
    only_language = {"course-reference-kl", "study-step", "study-fresh", "study-improvement"}
    assert set(control_page.figures) == {f"figure-{name}" for name in shared}
    assert set(page.figures) == {f"figure-{name}" for name in shared | only_language}
    for one in (page, control_page):
        places = {element["id"] for element in one.all("div") if element.get("class") == "plot"}
        assert places == set(one.figures)
        for figure in one.data["figures"]:
            go.Figure(data=figure["data"], layout=figure["layout"])  # raises for what plotly does not know


def test_the_page_is_one_file_that_asks_for_nothing(page):
    for element in page.elements:
        for key in ("src", "href", "action", "poster", "srcset"):
            assert element.get(key, "#").startswith("#"), element["tag"]
        assert not [key for key in element if key.startswith("on")], element
    policy = next(one["content"] for one in page.all("meta") if "http-equiv" in one)
    assert policy.startswith("default-src 'none';")


def test_its_policy_names_its_scripts_and_no_others(page):
    policy = next(one["content"] for one in page.all("meta") if "http-equiv" in one)
    scripts = [one["text"] for one in page.all("script") if one.get("type") != "application/json"]
    assert len(scripts) == 2
    for script in scripts:
        assert base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() in policy
    assert policy.count("sha256") == 2 and "unsafe-inline" not in policy.split("style-src")[0]


def test_structure(page):
    assert len(page.all("h1")) == 1
    ids = [element["id"] for element in page.elements if "id" in element]
    assert len(set(ids)) == len(ids)
    assert all(head.get("scope") in ("row", "col", "rowgroup") for head in page.all("th"))
    assert all(element["href"][1:] in ids for element in page.all("a"))
    assert all("label" in control["inside"] for tag in ("input", "select") for control in page.all(tag))
    assert all(button["text"].strip() for button in page.all("button"))
    referred = [element["aria-labelledby"] for element in page.elements if "aria-labelledby" in element]
    assert referred and set(referred) <= set(ids)
    depths = [int(one["tag"][1]) for one in page.elements if one["tag"] in ("h1", "h2", "h3")]
    assert all(after - before <= 1 for before, after in pairwise(depths))


def test_texts_of_models_are_texts(page):
    assert not page.all("img") and len(page.all("script")) == 3
    texts = [one["text"] for one in page.all("p") if "text" in (one.get("class") or "")]
    assert NASTY[0] in texts and NASTY[1] in texts and NASTY[3] in texts
    changed = next(text for text in texts if "reversed" in text)
    assert changed.startswith("\\u202ereversed") and "\\x00" in changed and "\\ud800" in changed
    assert "<b>bold</b> {{ 7 * 7 }} \"quoted\" 'single'" in changed
    assert any("onerror" in one["text"] for one in page.all("dd"))
    assert any("<script>" in one["text"] for one in page.all("pre"))


def test_names_in_figures_are_texts(language, tmp_path):
    report, rows = language
    hostile = "</script><img src=x onerror=alert(1)>&<b>"
    page = make(report | {"reward_label": hostile, "title": hostile}, rows, tmp_path)
    assert not page.all("img") and len(page.all("script")) == 3 and page.all("h1")[0]["text"] == hostile
    shown = page.figures["figure-frontier"]["layout"]["yaxis"]["title"]["text"]
    assert shown == "&lt;/script&gt;&lt;img src=x onerror=alert(1)&gt;&amp;&lt;b&gt;"
    raw = (tmp_path / "report.html").read_text(encoding="utf-8")
    start = raw.index('id="data">') + len('id="data">')
    assert not set("<>&") & set(raw[start : raw.index("</script>", start)])


def test_a_rule_has_one_colour_everywhere(page, control_page):
    styles = rule_styles(RULES)
    for one in (page, control_page):
        for figure in one.data["figures"]:
            for trace in figure["data"]:
                rule = trace.get("meta", {}).get("rule")
                if rule not in styles or trace.get("marker", {}).get("symbol") == "line-ns":
                    continue
                line, marker = trace.get("line", {}), trace.get("marker", {})
                assert styles[rule].colour in (line.get("color"), marker.get("color")), figure["id"]
                if "dash" in line:
                    assert line["dash"] == styles[rule].dash
    buttons = [one for one in page.all("button") if one.get("data-rule") == "ppo_trust"]
    assert len(buttons) == 4 and all(one["aria-pressed"] == "true" for one in buttons)


def test_rules_are_told_apart_without_colour():
    styles = list(rule_styles(f"rule {number}" for number in range(40)).values())
    assert len(set(styles)) == 40
    assert len({(style.dash, style.symbol) for style in styles[:9]}) == 9
    assert all(style.symbol in SYMBOLS for style in styles)


def luminance(colour):
    channels = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [one / 12.92 if one <= 0.04045 else ((one + 0.055) / 1.055) ** 2.4 for one in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("colour", COLOURS)
def test_colours_can_be_seen_on_dark(colour):
    # WCAG 2: graphical objects need 3 to 1.
    assert (luminance(ON_DARK[colour]) + 0.05) / (luminance("#131518") + 0.05) > 4.5
    assert len(set(ON_DARK.values())) == len(ON_DARK)


def test_frontier_with_its_limit(page, language):
    report, _ = language
    traces = page.figures["figure-frontier"]["data"]
    for entry in report["frontier"]:
        area, line = (trace for trace in traces if trace.get("meta", {}).get("rule") == entry["rule"])
        np.testing.assert_allclose(line["x"], entry["kl"], rtol=1e-4)
        np.testing.assert_allclose(line["y"], entry["reward"], rtol=1e-4)
        half = len(area["x"]) // 2
        np.testing.assert_allclose(area["y"][:half], entry["low"], rtol=1e-4)
        np.testing.assert_allclose(area["y"][half:][::-1], entry["high"], rtol=1e-4)
    limit = [trace for trace in traces if trace["meta"]["rule"] == LIMIT]
    assert len(limit) == 2 and len(limit[1]["x"]) == len(report["limit"]["tilted"])
    ends = [point["low"] for point in report["limit"]["tilted"]], [point["high"] for point in report["limit"]["tilted"]]
    np.testing.assert_allclose(limit[0]["y"], [*ends[0], *reversed(ends[1])], rtol=1e-4)
    (stars,) = (trace for trace in traces if trace["meta"]["rule"] == BEST_OF_N)
    point = report["limit"]["best_of_n"][3]
    place = stars["text"].index("best of 8")
    assert stars["y"][place] == pytest.approx(point["reward"], rel=1e-4)
    assert stars["error_y"]["array"][place] == pytest.approx(point["high"] - point["reward"], rel=1e-3)
    assert stars["error_x"]["arrayminus"][place] == pytest.approx(point["kl"] - point["kl_low"], rel=1e-3)


@pytest.mark.parametrize("evaluated, told", [(24, False), (64, True)])
def test_a_limit_of_other_prompts_says_so(evaluated, told):
    report, _ = synthetic_report(prompts=1)
    report["limit"]["evaluated_prompts"] = evaluated
    caption = frontier_figure(report, rule_styles(RULES))["caption"]
    assert ("may lie elsewhere: the rules are evaluated on 64 prompts, and the limit is of 24" in caption) == told


def test_the_clipped_share_is_drawn_of_the_rules_that_clip(page, control_page, tmp_path):
    for one in (page, control_page):
        traces = one.figures["figure-course-clip-fraction"]["data"]
        assert {trace["meta"]["rule"] for trace in traces} == {"ppo_clip", "ppo_trust"}
    report, rows = synthetic_report()
    nothing = rows.set_column(
        rows.column_names.index("clip_fraction"), "clip_fraction", pyarrow.nulls(len(rows), pyarrow.float64())
    )
    assert "figure-course-clip-fraction" not in make(report, nothing, tmp_path).figures


def test_a_control_rule_with_one_value_is_drawn_as_its_mean(tmp_path):
    report, rows = synthetic_report("control")
    report["frontier"] = [entry for entry in report["frontier"] if entry["rule"] != "ppo_penalty"]
    figure = make(report, rows, tmp_path).figures["figure-frontier"]
    cells = [cell for cell in report["cells"] if cell["rule"] == "ppo_penalty"]
    (mean,) = [one for one in figure["data"] if one["meta"]["rule"] == "ppo_penalty" and "error_y" in one]
    rewards = [cell["reward"] for cell in cells]
    assert mean["y"] == [pytest.approx(sum(rewards) / len(rewards), rel=1e-3)]
    assert mean["x"] == [pytest.approx(sum(cell["step_kl"] for cell in cells) / len(cells), rel=1e-3)]
    assert mean["error_y"]["array"] == [pytest.approx(max(rewards) - mean["y"][0], rel=2e-2)]  # three seeds at most
    cells[0]["reward"] = None  # the survivors' mean would flatter it
    figure = make(report, rows, tmp_path).figures["figure-frontier"]
    assert not [one for one in figure["data"] if one["meta"]["rule"] == "ppo_penalty" and "error_y" in one]


def test_what_is_said_of_knob_values_is_of_the_world(page, tmp_path):
    report, rows = synthetic_report("control")
    report["matched"] = [row | {"value": None} for row in synthetic_report()[0]["matched"]]
    control = make(report, rows, tmp_path)
    for one, chosen in ((page, True), (control, False)):
        text = one.all("body")[0]["text"]
        assert ("Every rule by the knob value whose mean is the highest there" in text) is chosen
        assert ("the rule's best knob value of those" in text) is chosen
        assert ("a knob value without all of its seeds counts" in text) is chosen
        assert ("no value is chosen" in text) is not chosen
        assert ("a seed without all of the rule's knob values counts" in text) is not chosen


def test_a_kl_that_nobody_reached_takes_no_room(language, tmp_path):
    report, rows = language
    far = [row | {"kl": 1000.0} for row in report["matched"][:1]]
    figure = make(report | {"matched": report["matched"] + far}, rows, tmp_path).figures["figure-frontier"]
    assert [shape["x0"] for shape in figure["layout"]["shapes"]] == [1.0, 2.0, 4.0]


def test_one_seed_has_no_interval(tmp_path):
    page = make(*synthetic_report(seeds=[0]), tmp_path)
    for name in ("figure-frontier", "figure-course-reward"):
        of_rules = [one for one in page.figures[name]["data"] if one["meta"]["rule"] in RULES]
        assert of_rules and not any("fill" in trace for trace in of_rules)
    text = page.all("body")[0]["text"]
    assert "no difference between rules is supported" in text
    matched = next(one for one in page.all("table") if one.get("aria-labelledby") == "matched-title")
    of_limit = [one["text"] for one in page.all("tr") if one.get("class") == "limit"]
    assert matched["text"].count("[") - sum(text.count("[") for text in of_limit) == 2  # in its head


def test_only_what_the_exact_test_supports_is_bold():
    report = {"improvement": [
        {"kl": 1.0, "rule": "a", "other": "b", "probability": 0.9, "low": 0.6, "high": 1.0, "p_value": 0.03},
        {"kl": 1.0, "rule": "b", "other": "a", "probability": 0.1, "low": 0.0, "high": 0.4, "p_value": 0.05},
        {"kl": 1.0, "rule": "b", "other": "c", "probability": 0.1, "low": 0.0, "high": 0.4, "p_value": 0.03},
        {"kl": 1.0, "rule": "c", "other": "b", "probability": 1.0, "low": None, "high": None, "p_value": 1.0},
        {"kl": 1.0, "rule": "a", "other": "c", "probability": 0.9, "low": 0.6, "high": 1.0, "p_value": 0.2},
    ]}  # fmt: skip
    (matrix,) = page_tables.improvement(report)
    sides = {rule: [side for _, side in row] for rule, row in matrix["rows"]}
    assert matrix["rules"] == ["a", "b", "c"]
    assert sides == {"a": ["", "ahead", ""], "b": ["", "", "behind"], "c": ["", "", ""]}


def test_three_seeds_support_no_order(page):
    # All three of a rule above all three of another: 2 of the 20 orders that chance has.
    bold = {}
    for count in (2, 3, 4, 10):
        kl = np.array([0.0, 1.0])
        curves = [Curve("a", 1.0, seed, kl, kl + seed + 99) for seed in range(count)]
        curves += [Curve("b", 1.0, seed, kl, kl - seed) for seed in range(count)]
        rows = improvement_table(curves, [1.0], seeds=count)
        bold[count] = page_tables.improvement({"improvement": rows})[0]["rows"][0][1][1][1]
    assert bold == {count: "ahead" if 2 / math.comb(2 * count, count) < 0.05 else "" for count in bold}
    assert "supports no claim of which rule is ahead" in page.all("body")[0]["text"]
    assert not [one for one in page.all("strong") if "td" in one["inside"]]


def test_matched_table(language):
    one, two, four = page_tables.matched(language[0])
    assert (one["kl"], two["kl"]) == ("1 nat", "2 nats")
    assert one["rows"][2] == ["ppo_trust", "0.341 [0.311, 0.371]", "0.341 [0.311, 0.371]", "0.015", "3"]
    assert four["rows"][0][:3] == ["trpo", "not reached by 2 of 3 seeds", "–"]  # noqa: RUF001
    assert one["limit"] is not None and four["limit"] is None  # 128 samples cannot show what 4 nats buy
    four = page_tables.matched(language[0] | {"world": "control"})[2]  # there a rule may be beyond a KL
    assert four["rows"][0][1] == "outside the runs of 2 of 3 seeds"


def test_a_rule_without_any_whole_run_stands_in_the_matched_table():
    report, _ = synthetic_report(prompts=1)
    report["matched"] = [row for row in report["matched"] if row["rule"] != "trpo"]
    for group in page_tables.matched(report):
        assert sorted(row[0] for row in group["rows"]) == sorted(RULES)
        assert group["rows"][-1] == ["trpo", "not reached by 3 of 3 seeds", "\u2013", "\u2013", "3"]
    for cell in report["cells"]:
        cell["status"] = "missing" if cell["rule"] == "trpo" and cell["seed"] else cell["status"]
    assert page_tables.matched(report)[0]["rows"][-1][1] == "4 runs not finished"


def test_limit_between_its_points():
    points = [{"kl": kl, "reward": kl**2, "low": kl**2 - 1, "high": None} for kl in (0.5, 1.0, 3.0)]
    limit = {"tilted": points[::-1]}
    assert limit_at(limit, 2.0) == {"reward": pytest.approx(5.0), "low": pytest.approx(4.0), "high": None}
    assert limit_at(limit, 0.5)["reward"] == pytest.approx(0.25)
    assert limit_at(limit, 0.4) is None and limit_at(limit, 3.1) is None and limit_at(None, 1.0) is None


def test_step_kl_beside_the_bound(language, tmp_path):
    report, rows = language
    cells = [dict(cell) for cell in report["cells"]]
    for cell in cells:
        if (cell["rule"], cell["value"]) == ("trpo", 0.03):
            cell["violations"] = 2 / 16
    figure = make(report | {"cells": cells}, rows, tmp_path).figures["figure-bound"]
    labels = figure["layout"]["yaxis"]["ticktext"]
    assert labels[1].startswith("trpo 0.03<br>") and "6 of 48 over" in labels[1]
    assert "0 of 48 over" in labels[0] and "no bound" in labels[2]
    box = next(one for one in figure["data"] if one["type"] == "box" and one["y"] == [1])
    frame = rows.to_pandas()
    kls = frame[(frame.rule == "trpo") & (frame.value == 0.03) & frame.accepted].step_kl
    found = [box[key][0] for key in ("lowerfence", "q1", "median", "q3", "upperfence")]
    np.testing.assert_allclose(found, kls.quantile([0, 0.25, 0.5, 0.75, 1]), rtol=1e-4)
    bounds = [one for one in figure["data"] if one.get("marker", {}).get("symbol") == "line-ns"]
    assert {(one["x"][0], one["y"][0]) for one in bounds} == {(0.01, 0), (0.03, 1), (0.006, 4), (0.015, 5)}


def test_course_is_the_mean_over_seeds(page, language):
    rows = language[1].to_pandas()
    of_rule = rows[(rows.rule == "ppo_clip") & (rows.value == 1e-4)]
    wanted = {"rule": "ppo_clip", "value": "0.0001", "axis": "seconds"}
    traces = [one for one in page.figures["figure-course-step-kl"]["data"] if one["meta"] == wanted]
    area, line = traces
    runs = [of_rule[of_rule.seed == seed] for seed in SEEDS]
    mean = [np.mean([np.interp(place, run.seconds, run.step_kl) for run in runs]) for place in line["x"]]
    np.testing.assert_allclose(line["y"], mean, rtol=1e-3)
    assert line["x"][0] >= max(run.seconds.min() for run in runs) * 0.9999
    assert max(area["x"]) == max(line["x"])


def test_predictions_are_those_of_steps_taken(page, language):
    rows = language[1].to_pandas()
    figure = page.figures["figure-predicted"]
    traces = {one["meta"]["rule"]: one for one in figure["data"] if "meta" in one}
    assert set(traces) == {"trpo", "ppo_trust"}
    taken = rows[(rows.rule == "trpo") & rows.accepted]
    np.testing.assert_allclose(sorted(traces["trpo"]["x"]), sorted(taken.predicted_gain), rtol=1e-4)
    np.testing.assert_allclose(sorted(traces["trpo"]["y"]), sorted(taken.surrogate_gain), rtol=1e-4)


def test_cost_of_an_update(page, language):
    rows = language[1].to_pandas()
    bars = {one["meta"]["rule"]: one for one in page.figures["figure-cost-seconds"]["data"]}
    assert bars["trpo"]["x"][0] == pytest.approx(rows[rows.rule == "trpo"].step_seconds.mean(), rel=1e-4)
    gradients = {one["meta"]["rule"]: one["x"][0] for one in page.figures["figure-cost-gradients"]["data"]}
    assert gradients == pytest.approx(
        {"trpo": 3, "ppo_clip": 4.7, "ppo_trust": 4.7, "ppo_penalty": 4.7, "reinforce": 1}
    )


def test_rewards_of_completions_are_for_sorting(page, language):
    cards = [element for element in page.all("article")]
    entries = language[0]["completions"]
    assert [int(card["data-index"]) for card in cards] == list(range(len(entries)))
    rewards = json.loads(cards[1]["data-rewards"])
    assert rewards == {"reference": entries[1]["reference"]["reward"]} | {
        rule: text["reward"] for rule, text in entries[1]["rules"].items()
    }
    assert "reinforce" not in json.loads(cards[5]["data-rewards"])
    assert "trpo" not in json.loads(cards[6]["data-rewards"])


def test_knob_values_shown_first(language):
    report = language[0]
    assert shown_values(report) == {
        "trpo": "0.03", "ppo_clip": "0.0003", "ppo_trust": "0.015", "ppo_penalty": "0.01", "reinforce": "",
    }  # fmt: skip
    assert shown_values(report | {"matched": []})["trpo"] == "0.01"


@pytest.mark.parametrize("world", ["language", "control"])
@pytest.mark.parametrize("finished", [True, False])
def test_whatever_is_missing(world, finished, tmp_path):
    report, rows = synthetic_report(world)
    nothing = {"frontier": [], "matched": [], "improvement": [], "completions": [], "trajectories": [], "summary": []}
    report |= {"limit": None, "one_update": None, "same_start": None, "versions": {}, "cell_configs": {}, "config": ""}
    if not finished:
        keep = ("rule", "value", "seed", "folder")
        cells = [{key: cell.get(key) for key in (*keep, "status", "error")} for cell in report["cells"]]
        report |= nothing | {"cells": [cell | {"status": "missing"} for cell in cells]}
        rows = rows.slice(0, 0)
    page = make(report, rows, tmp_path)
    assert bool(page.figures) is finished
    assert not page.all("article") or world == "language"
    assert ("Nothing to draw" in page.all("body")[0]["text"]) is not finished


def test_numbers_that_are_not_finite(language, tmp_path):
    report, rows = json.loads(json.dumps(language[0])), language[1].to_pylist()
    report["frontier"][0]["reward"][3] = math.nan
    report["frontier"][0]["low"][5] = None
    report["trajectories"][0]["reward"][1] = None
    report["cells"][0] |= {"reward": math.nan, "step_kl": None, "reward_interval": None}
    report["one_update"]["rows"][0] |= {"fresh_low": None, "fresh_high": None, "improvement": None, "step_kl": math.inf}
    for row in rows[:5]:
        row |= {"step_kl": None, "reward_mean": math.nan, "surrogate_gain": None}
    page = make(report, language[1].from_pylist(rows), tmp_path)
    assert page.figures["figure-frontier"]["data"]
    line = [one for one in page.figures["figure-frontier"]["data"] if one["meta"]["rule"] == "trpo"][-1]
    assert line["y"][3] is None


def test_the_page_appears_whole_or_not_at_all(language, tmp_path):
    path = tmp_path / "folder" / "report.html"
    write_page(*language, path)
    before = path.stat()
    with pytest.raises(KeyError):
        write_page(language[0] | {"frontier": [{"rule": "unheard of"}]}, language[1], path)
    assert path.stat() == before and [one.name for one in path.parent.iterdir()] == ["report.html"]


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.12345, "0.123"), (-0.5, "\u22120.5"), (12345.6, "12,346"), (0.0, "0"), (None, "\u2013"), (math.nan, "\u2013")],
)
def test_numbers_in_words(value, text):
    assert page_tables.number(value) == text


def test_an_estimate_without_an_end_is_a_number():
    assert page_tables.estimate(0.5, 0.4, 0.6) == "0.5 [0.4, 0.6]"
    assert page_tables.estimate(0.5, None, 0.6) == "0.5"
    assert page_tables.estimate(None, 0.4, 0.6) == "\u2013"
