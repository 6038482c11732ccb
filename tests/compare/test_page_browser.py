"""The report page in a real browser, where there is one."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
from synthetic_report import synthetic_report

from lm_trust.compare.page import write_page

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium")


class Dom(HTMLParser):
    """A page as the browser left it: the plots with what was drawn in them, the cards, and the texts by id."""

    def __init__(self, text):
        super().__init__()
        self.plots, self.cards, self.pressed, self.words, self._open = {}, [], {}, {}, []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        if tag in ("meta", "input", "br", "hr", "link"):
            return
        self._open.append((tag, given))
        plot = next((one["id"] for _, one in reversed(self._open) if "plot" in (one.get("class") or "").split()), None)
        if plot:
            self.plots.setdefault(plot, []).append(given.get("class") or "")
        if tag == "article":
            self.cards.append(
                {"shown": "hidden" not in given, "rewards": json.loads(given["data-rewards"]), "text": ""}
            )
        if tag == "button" and "data-rule" in given:
            self.pressed.setdefault(given["data-rule"], set()).add(given["aria-pressed"])

    def handle_endtag(self, tag):
        while self._open and self._open.pop()[0] != tag:
            pass

    def handle_data(self, data):
        tags = [tag for tag, _ in self._open]
        if "article" in tags:
            self.cards[-1]["text"] += data
        for _, given in self._open:
            for key in (given.get("id"), given.get("class")):
                self.words[key] = self.words.get(key, "") + data
        if tags and tags[-1] == "title" and "svg" not in tags:
            self.words["title"] = data

    @property
    def drawn(self):
        return {plot for plot, classes in self.plots.items() if any("main-svg" in one.split() for one in classes)}


def browse(path, profile, state=""):
    """(the page as a reader has it, what the browser's console says)."""
    done = subprocess.run(
        [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}",
         "--window-size=1280,900", "--virtual-time-budget=20000", "--enable-logging=stderr", "--v=0", "--dump-dom",
         f"{path.as_uri()}{state}"],
        capture_output=True, text=True, timeout=180, check=True,
    )  # fmt: skip
    return Dom(done.stdout), re.findall(r".*CONSOLE.*", done.stderr)


@pytest.fixture(scope="module")
def language(tmp_path_factory):
    folder = tmp_path_factory.mktemp("browser")
    write_page(*synthetic_report(), folder / "report.html")
    state = "#search=thriller&sort=most&first=ppo_trust&second=trpo&hide=reinforce,ppo_clip&axis=seconds"
    return browse(folder / "report.html", folder / "profile", state)


def test_every_figure_is_drawn_and_nothing_complained_of(language):
    dom, console = language
    assert console == []
    assert len(dom.plots) == 13 and dom.drawn == set(dom.plots)
    assert all(any("trace" in one.split() for one in classes) for classes in dom.plots.values())


def test_texts_did_not_run(language):
    dom, _ = language
    assert dom.words["title"] == "Sentiment, 5 rules · lm-trust compare"


def test_search_shows_what_holds_the_words(language):
    dom, _ = language
    shown = [card for card in dom.cards if card["shown"]]
    assert len(shown) == 5 and all("thriller" in card["text"] for card in shown)
    assert not any("thriller" in card["text"] for card in dom.cards if not card["shown"])
    assert dom.words["count"] == "5 of 30 prompts hold “thriller”"


def test_sorted_by_the_difference_in_reward(language):
    dom, _ = language
    shown = [card for card in dom.cards if card["shown"]]
    differences = [card["rewards"]["ppo_trust"] - card["rewards"]["trpo"] for card in shown]
    assert differences == sorted(differences, reverse=True)
    assert f"ppo_trust less trpo: {'+' if differences[0] > 0 else '−'}" in shown[0]["text"]  # noqa: RUF001


def test_rules_that_the_address_hides(language):
    dom, _ = language
    assert dom.pressed == {
        **{rule: {"true"} for rule in ("trpo", "ppo_trust", "ppo_penalty", "the limit", "best of n")},
        **{rule: {"false"} for rule in ("ppo_clip", "reinforce")},
    }
    assert "seconds of rollout and update" in dom.words["figure-course-reward"]
    assert "completion tokens" not in dom.words["figure-course-reward"]


def test_control(tmp_path):
    write_page(*synthetic_report("control"), tmp_path / "report.html")
    # A link to an earlier page: what this one does not offer is shown as usual.
    state = "#axis=hours&knob.trpo=0.5&knob.ppo_clip=0.0003"
    dom, console = browse(tmp_path / "report.html", tmp_path / "profile", state)
    assert console == []
    assert dom.words["shown-values"] == "Shown: trpo at 0.01, ppo_clip at 0.0003, ppo_trust at 0.006."
    assert len(dom.plots) == 9 and dom.drawn == set(dom.plots) and not dom.cards
    assert "environment steps" in dom.words["figure-course-reward"]
