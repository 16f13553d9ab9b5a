"""The HTML page: whole in itself, valid, escaped, the same as the Markdown, and right in a real browser."""

import base64
import itertools
import json
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
from browser import Browser, find_browser

from molkd.pipeline.evaluation.metrics import REPORTED
from molkd.pipeline.evaluation.report import write_report
from molkd.pipeline.evaluation.results import TeacherResult
from molkd.pipeline.evaluation.seeds import SeedStat
from molkd.pipeline.evaluation.tables import format_value

VOID = {"meta", "link", "img", "br", "hr", "input"}
HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>|`*_&amp;$\\foo{$"
LONG = "a-name-without-any-place-to-break-" * 6


class Page(HTMLParser):
    """Reads a page strictly: every tag is closed in its turn."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.elements, self.tables, self.text = [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        names = [name for name, _ in attributes]
        assert len(names) == len(set(names)), (tag, names)
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)
        if ("td" in self.open or "th" in self.open) and data not in ("best", "within the spread of the best"):
            self.tables[-1][-1][-1] += data


@pytest.fixture(scope="module")
def report(tmp_path_factory, run_writer, make_evaluation):
    """Two students, a scan of three weights, evaluations, and names that try to break out of the page."""
    root = tmp_path_factory.mktemp("page")
    made = {"tests": (HOSTILE,), "label": HOSTILE}
    folders = [run_writer(root, f"none{s}", seed=s, energy=50.0 + s, **made) for s in range(2)]
    for weight in (0.1, 1.0, 10.0):
        kd = [{"name": "n2n", "weight": weight}]
        folders.append(run_writer(root, f"n2n-{weight}", kd=kd, energy=49.0, force=39.0 - weight, **made))
    folders.append(run_writer(root, LONG, student=f"schnet-{HOSTILE}", **made))
    for number, folder in enumerate(folders[1:4]):
        make_evaluation(0.02 + 0.01 * number, 0.02, n_systems=30).save(folder / "evaluation" / "hot.npz")
    teacher = TeacherResult(
        f"T {HOSTILE} {LONG}",
        {HOSTILE: {"energy_mae_meV": 20.0, "force_mae_meV_A": 10.0}},
        evaluations={"hot": make_evaluation(0.01, 0.01)},
    )
    return write_report(folders, root / "out", teacher=teacher, command=f"kd report '{HOSTILE}' {LONG}")


@pytest.fixture(scope="module")
def text(report):
    return report.page.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(text):
    return Page(text)


def test_nothing_comes_from_elsewhere(page, text):
    for tag, attributes in page.elements:
        for name in ("src", "href", "srcset", "poster", "action", "data", "background"):
            value = attributes.get(name)
            assert value is None or value.startswith(("data:", "#")), (tag, name, value)
        assert tag not in ("script", "iframe", "object", "embed", "form", "base", "svg")
        assert not [name for name in attributes if name.startswith("on") or name == "style"]
    style = re.search(r"<style>(.*?)</style>", text, re.S)[1]
    assert not re.search(r"url\(|@import|https?:", style)
    policy = next(a["content"] for _, a in page.elements if "Content-Security" in a.get("http-equiv", ""))
    assert "default-src 'none'" in policy
    assert "script" not in policy
    assert "unsafe" not in policy


def test_pictures_are_whole_in_themselves(page, report):
    images = [attributes for tag, attributes in page.elements if tag == "img"]
    assert len(images) == len(report.plots) > 20
    for attributes in images:
        assert len(attributes["alt"]) > 20
        assert int(attributes["width"]) > 100 < int(attributes["height"])
        svg = base64.b64decode(attributes["src"].removeprefix("data:image/svg+xml;base64,")).decode()
        for element in ElementTree.fromstring(svg).iter():
            assert element.tag.rpartition("}")[2] not in ("script", "foreignObject", "metadata")
            for name, value in element.attrib.items():
                if name.rpartition("}")[2] == "href":
                    assert value.startswith(("#", "data:image/png;base64,"))
        assert set(re.findall(r"url\((.)", svg)) <= {"#"}


def test_structure(page):
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    links = [a["href"].removeprefix("#") for tag, a in page.elements if tag == "a"]
    assert set(links) <= set(ids)
    assert len(links) > 6
    headings = [int(tag[1]) for tag, _ in page.elements if re.fullmatch("h[1-6]", tag)]
    assert headings.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(headings))
    assert ("html", {"lang": "en"}) in page.elements
    for tag, attributes in page.elements:
        assert tag != "th" or attributes["scope"] in ("row", "col")
        named = {"aria-labelledby", "aria-label"} & attributes.keys()
        assert tag not in ("nav", "section") or named
    for table in page.tables:
        assert len({len(row) for row in table}) == 1


def test_numbers_are_those_of_the_json(page, report):
    results = json.loads((report.folder / "results.json").read_text())
    signs = {"best": " ★", "near": " ☆"}
    tables = [table for table in page.tables if {"model", "force MAE (meV/Å)"} <= set(table[0])]
    for table, (dataset, rows) in zip(tables, results["tables"].items(), strict=True):
        head, *body = table
        for cells, row in zip(body, rows, strict=True):
            shown = dict(zip(head, cells, strict=True))
            assert shown["model"] == row["name"]
            for key, spec in REPORTED.items():
                if spec.title in shown:
                    expected = format_value(SeedStat(**row["metrics"][key]), decimals=spec.decimals)
                    mark = results["marks"][dataset].get(row["name"], {}).get(key)
                    assert shown[spec.title] == expected + signs.get(mark, "")
    assert sum("★" in cell for table in tables for row in table for cell in row) >= 4


def markdown_tables(text):
    for block in re.findall(r"(?:^\|.*\n)+", text + "\n", re.MULTILINE):
        head, _, *rows = [re.split(r"(?<!\\)\|", line.strip())[1:-1] for line in block.splitlines()]
        yield [[plain(cell) for cell in row] for row in [head, *rows]]


def plain(cell):
    """What Markdown shows of a cell."""
    cell = re.sub(r"^\*\*(.*)\*\*( [★☆])$", r"\1\2", cell.strip())
    if cell.startswith("`"):
        return cell.strip("`").replace("\\|", "|")
    return re.sub(r"\\(.)", r"\1", cell).replace("&amp;", "&")


def test_markdown_holds_the_same_tables_and_headings(page, report):
    markdown = (report.folder / "report.md").read_text()
    assert list(markdown_tables(markdown)) == [
        [[" ".join(cell.split()) for cell in row] for row in table] for table in page.tables
    ]
    headings = [t for t, _ in page.elements if re.fullmatch("h[1-6]", t)]
    assert len(re.findall("^#+ ", markdown, re.MULTILINE)) == len(headings) - 1  # that of the contents
    prose = re.sub("```.*?```", "", markdown, flags=re.DOTALL)
    assert "<" not in prose.replace("\\<", "")


def test_names_are_shown_as_they_are(page):
    assert HOSTILE in "".join(page.text)
    assert not [a for t, a in page.elements if t == "script" or a.get("src") == "x"]


needs_browser = pytest.mark.skipif(find_browser() is None, reason="no Chromium is installed")


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with Browser(find_browser(), tmp_path_factory.mktemp("profile")) as running:
        yield running


@needs_browser
@pytest.mark.parametrize(("width", "dark"), [(320, False), (360, True), (768, False), (1280, False)])
def test_a_browser_shows_it_without_error_request_or_sideways_scrolling(browser, report, width, dark):
    url = report.page.resolve().as_uri()
    browser.open(url, width, dark=dark)
    assert browser.complaints() == []
    assert [address for address in browser.requests() if not address.startswith("data:")] == [url]
    assert browser.value("document.title") == "Distillation report"
    assert browser.value("document.documentElement.scrollWidth") <= width
    images = "Promise.all([...document.images].map(i => i.decode().then(() => i.naturalWidth)))"
    widths = browser.value(images)
    assert len(widths) == len(report.plots)
    assert min(widths) > 100
    background = browser.value("getComputedStyle(document.querySelector('td.best')).backgroundColor")
    assert background not in ("rgba(0, 0, 0, 0)", None)  # the style was not refused by the page's own policy


@needs_browser
def test_tables_scroll_in_their_own_box_and_letters_stay_readable(browser, report):
    browser.open(report.page.resolve().as_uri(), 360)
    wide = "[...document.querySelectorAll('.scroll')].filter(e => e.scrollWidth > e.clientWidth).length"
    assert browser.value(wide) > 0
    outside = """[...document.querySelectorAll('main *')]
        .filter(e => !e.closest('.scroll, pre, .unseen, .small'))
        .filter(e => e.getBoundingClientRect().right > innerWidth + 1).map(e => e.outerHTML.slice(0, 80))"""
    assert browser.value(outside) == []
    sizes = "[...document.querySelectorAll('main *')].map(e => parseFloat(getComputedStyle(e).fontSize))"
    assert min(browser.value(sizes)) >= 12
    scale = "[...document.images].map(i => i.getBoundingClientRect().width / +i.getAttribute('width'))"
    assert 10 / 72 * 96 * min(browser.value(scale)) >= 9  # a 10 point letter in a picture, in CSS pixels


@needs_browser
def test_pictures_follow_a_dark_page(browser, report):
    """On a dark page no letter, drawn on a canvas, is dark."""
    darkest_and_brightest = """(async () => {
        const image = document.querySelector('img[alt^=Validation]'); await image.decode();
        const canvas = document.createElement('canvas'); canvas.width = 600; canvas.height = 900;
        const context = canvas.getContext('2d'); context.drawImage(image, 0, 0, 600, 900);
        const data = context.getImageData(0, 0, 600, 900).data; let low = 255, high = 0;
        for (let i = 0; i < data.length; i += 4)
            if (data[i + 3] == 255)
                { const value = Math.max(data[i], data[i + 1], data[i + 2]);
                  low = Math.min(low, value); high = Math.max(high, value); }
        return [low, high]; })()"""
    browser.open(report.page.resolve().as_uri(), 1280)
    assert browser.value(darkest_and_brightest)[0] < 0x40
    browser.open(report.page.resolve().as_uri(), 1280, dark=True)
    darkest, brightest = browser.value(darkest_and_brightest)
    assert darkest >= 0x40
    assert brightest > 0xD0


@needs_browser
def test_the_browser_test_notices_what_it_is_for(browser, tmp_path):
    (tmp_path / "bad.html").write_text(
        "<!DOCTYPE html><title>x</title><script>console.error('no')</script>"
        "<img src='http://127.0.0.1:9/x.png'><div style='width:2000px'>wide</div>"
    )
    browser.open((tmp_path / "bad.html").as_uri(), 360)
    assert browser.complaints()
    assert "http://127.0.0.1:9/x.png" in browser.requests()
    assert browser.value("document.documentElement.scrollWidth") > 360
