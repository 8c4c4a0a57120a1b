"""The HTML page: whole, self-contained, with the right numbers in it."""
import base64
import io
import math
import re
from html.parser import HTMLParser

import soundfile
import torch

from models.parts import page

VOID = {"meta"}


class Balanced(HTMLParser):
    def __init__(self):
        super().__init__()
        self.open, self.words, self.refs = [], [], []

    def handle_starttag(self, tag, attrs):
        self.refs += [v for k, v in attrs if k in ("src", "href", "srcset", "action", "xlink:href")]
        assert not any(k.startswith("on") for k, _ in attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def read(html):
    parser = Balanced()
    parser.feed(html)
    parser.close()
    assert parser.open == []
    return parser


def test_a_page_is_whole_and_refers_to_nothing_outside():
    wave = torch.sin(torch.arange(800) * 0.1)
    html = page.page("A <title>", page.section("One", page.facts({"hours": 2.71828, "clips": 24}), page.text("plain & simple")),
                     page.grid(page.histogram([1, 2, 2, 3], "length")),
                     page.section("Two", page.table(["id", "sound"], [["x", page.player(wave, 8000)]])))
    found = read(html)
    assert len(found.refs) == 1 and found.refs[0].startswith("data:audio/wav;base64,")
    assert not re.search(r"https?://|url\(|@import|<script|<link", html)
    said = "".join(found.words)
    assert "A <title>" in said and "2.718" in said and "plain & simple" in said and html.startswith("<!doctype html>")
    heard, rate = soundfile.read(io.BytesIO(base64.b64decode(found.refs[0].split(",")[1])))
    assert rate == 8000 and abs(torch.from_numpy(heard).float() - wave).max() < 1e-4


def test_text_of_users_cannot_become_html():
    bad = '<script>alert("x")</script>\0\ud83d'
    html = page.page(bad, page.section(bad, page.text(bad), page.facts({bad: bad}), page.table([bad], [[bad]], bad), page.histogram([1], bad)))
    assert "<script" not in html and '"x"' not in html and "\0" not in html
    html.encode("utf-8")
    read(html)


def test_histograms_count_everything_once():
    values = [0.1 * i for i in range(1000)]
    edges, counts = page.bins(values)
    assert sum(counts) == 1000 and len(edges) == len(counts) + 1 == 25
    inner = counts[1:-1]
    assert max(inner) - min(inner) <= 2
    assert page.bins([5, 5, 5]) == ([5, 5], [3]) and page.bins([]) == ([0.0, 1.0], [0]) and sum(page.bins([1, math.nan, 2])[1]) == 2
    low, high = page.bins([0.0] * 995 + [1e9] * 5)[0][:: len(page.bins([0.0] * 995 + [1e9] * 5)[1])]
    assert (low, high) == (0, 0)  # one wild value does not flatten all the others
    drawn = page.histogram([1, 1, 2], "x")
    assert drawn.count("<rect") == 2 and "height=\"90.0\"" in drawn and "height=\"45.0\"" in drawn


def test_long_tables_are_cut_and_counted_and_empty_ones_say_so():
    html = page.table(["a"], [[i] for i in range(1200)])
    assert html.count("<tr>") == 501 and "and 700 more" in html
    assert "nothing here" in page.table(["a"], [], "nothing here")
    # texts to be read are given some width, short ones and ready pieces are not
    assert 'class="t"' in page.table(["n"], [["short"], ["w " * 30]])
    assert 'class="t"' not in page.table(["n"], [["short"], [page.Piece("<b>" + "w " * 30 + "</b>")]])
    assert 'class="n"' in page.table(["n"], [[1.5]]) and 'class="n"' not in page.table(["n"], [["1.5"]])
