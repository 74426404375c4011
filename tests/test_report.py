"""The report: one page that needs nothing else, in a real browser."""

import re
import shutil
from html.parser import HTMLParser

import chromium
import numpy as np
import pytest
from PIL import Image
from running import newest, read_json, snapshot


@pytest.fixture(scope='module')
def report(tmp_path_factory, warm, gpt2_run, coarse_run, qwen_run):
    """A report on three runs, one of them with an awkward name."""
    folder = tmp_path_factory.mktemp('report')
    awkward = folder / 'out-<b>&"x'
    shutil.copytree(gpt2_run.parent, awkward, symlinks=True)
    before = snapshot(awkward)
    done = warm.run('compare_architectures.py', awkward, coarse_run, qwen_run,
                    '--report', 'r.html', cwd=folder)
    assert done.returncode == 0, done.stderr
    assert snapshot(awkward) == before
    return folder / 'r.html'


class Page(HTMLParser):
    """Its text, marked text, and attributes."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.marked, self.text = [], [], [], ''
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += [(tag, *a) for a in attributes]

    def handle_data(self, data):
        self.text += data
        if self.tags[-1] == 'mark':
            self.marked.append(data)


def test_content(report, gpt2_run):
    page = Page(report.read_text())
    assert page.tags.count('table') >= 4 and page.tags.count('svg') >= 9
    assert 'b' not in page.tags and 'script' not in page.tags
    assert 'out-<b>&"x' in page.text
    # the qwen3 run is the odd one out, the others share a preset
    assert 'qwen3' in page.marked and 'gpt2' not in page.marked
    command = read_json(gpt2_run / 'run.json')['command']
    assert ' '.join(command[:1]) in page.text
    assert command[1] in page.text
    assert "'--report r.html" not in page.text
    assert re.search(r"compare_architectures.py '.*out-<b>&\"x' .*"
                     '--report r.html', page.text)


def test_nothing_is_fetched_from_elsewhere(report):
    page = Page(report.read_text())
    links = [value for _, name, value in page.attributes
             if name in ('src', 'href', 'data', 'action', 'xlink:href')]
    assert links and all(v.startswith(('#', 'data:')) for v in links)
    assert set(re.findall(r'url\((.)', report.read_text())) <= {'#'}
    ids = [value for _, name, value in page.attributes if name == 'id']
    assert len(ids) == len(set(ids)) > 50


@pytest.fixture(scope='module')
def browser(tmp_path_factory):
    if chromium.find() is None:
        pytest.skip(f'none of {", ".join(chromium.NAMES)} is on the PATH')
    browser = chromium.Chromium(tmp_path_factory.mktemp('profile'))
    yield browser
    browser.close()


def test_in_a_browser(report, browser, tmp_path):
    """No request but the page's own, an empty console, no sideways scrolling,
    at desktop and phone width, light and dark."""
    grounds = {}
    for width, dark in (1280, False), (390, False), (390, True), (320, False):
        browser.open(report.as_uri(), width, dark=dark, phone=width < 500)
        assert browser.requests() == [report.as_uri()]
        assert browser.complaints() == []
        assert browser.value('document.documentElement.scrollWidth') <= width
        widths = browser.value(
            "[...document.querySelectorAll('svg')]"
            '.map(svg => svg.getBoundingClientRect().width)')
        assert min(widths) > 0.8 * min(width, 390) * (width < 500) + 200 * (
            width > 500)
        browser.screenshot(tmp_path / 'page.png')
        pixels = np.asarray(Image.open(tmp_path / 'page.png').convert('L'))
        grounds[dark] = float(np.median(pixels))
        assert pixels.std() > 10  # something stands there
    assert grounds[False] > 230 and grounds[True] < 40


def test_the_browser_sees_a_request_and_an_error(browser, tmp_path):
    """What the test above relies on."""
    page = tmp_path / 'bad.html'
    page.write_text('<img src="http://127.0.0.1:9/a.png">'
                    '<script>nowhere()</script>')
    browser.open(page.as_uri(), 800)
    assert 'http://127.0.0.1:9/a.png' in browser.requests()
    assert browser.complaints()


def test_a_report_is_not_written_into_a_run(report, warm, gpt2_run, tmp_path):
    shutil.copytree(gpt2_run.parent, tmp_path / 'out-p', symlinks=True)
    before = snapshot(tmp_path / 'out-p')
    inside = newest(tmp_path / 'out-p') / 'checkpoints' / 'r.html'
    done = warm.run('compare_architectures.py', 'out-p', '--report', inside,
                    '--csv', newest(tmp_path / 'out-p') / 'c.csv',
                    cwd=tmp_path)
    assert done.returncode == 2
    assert 'r.html' in done.stderr and 'c.csv' in done.stderr
    assert snapshot(tmp_path / 'out-p') == before
