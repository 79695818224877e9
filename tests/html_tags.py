"""The tags of a page, read as a browser would."""

from __future__ import annotations

from html.parser import HTMLParser


class Tags(HTMLParser):
    """Every tag with its attributes, and the text; a tag that is not closed fails."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(page[page.index("<html") :])
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def expect_self_contained(self) -> None:
        """Fail if the page could load anything, run a script, or style itself elsewhere."""
        assert not {tag for tag, _ in self.tags} & {
            "script", "img", "link", "iframe", "object", "form", "a",
        }  # fmt: skip
        for _, attributes in self.tags:
            assert not {"style", "src", "href"} & attributes.keys()
            assert not any(name.startswith("on") for name in attributes)
        policy = next(a["content"] for _, a in self.tags if "http-equiv" in a)
        start = "default-src 'none'; base-uri 'none'; form-action 'none'; style-src 'sha256-"
        assert policy is not None
        assert policy.startswith(start)
        assert "unsafe" not in policy
