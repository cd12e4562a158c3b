"""Reports as parsed pages."""

from html.parser import HTMLParser

from lora_sr.report.page import write_report

VOID = {'meta', 'link', 'img', 'input', 'circle', 'path'}  # the last two close themselves in SVG


class Page(HTMLParser):
    """A page: its elements, its text, and whether all that is opened is closed."""

    def __init__(self, content: bytes):
        super().__init__()
        self.elements: list[tuple[str, dict]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(content.decode())
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag, tag

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data):
        if self.open and self.open[-1] not in ('style', 'script'):
            self.words.append(data)

    @property
    def text(self):
        return ' '.join(' '.join(self.words).split())

    def of(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


def report_on(folder, output, **changes):
    write_report(folder, output, **changes)
    return Page(output.read_bytes())
