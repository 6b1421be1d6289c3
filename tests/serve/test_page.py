"""The web page in a browser: one server and one Chromium for all tests, a user of its own for each."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import uvicorn
from serving import until

from metakern.cli import main
from metakern.dialogue.run import Run
from metakern.serve import page, server
from metakern.serve.app import create_app
from metakern.serve.service import Service, Settings
from metakern.serve.store import Store

axe = pytest.importorskip("axe_playwright_python.sync_playwright")
playwright = pytest.importorskip("playwright.sync_api")
expect, Page = playwright.expect, playwright.Page
CHROMIUM = shutil.which("chromium")
in_browser = pytest.mark.skipif(not CHROMIUM, reason="there is no chromium: apt-get install chromium")
SECONDS = 20_000  # in milliseconds: how long an adaptation may take on a busy machine
PAIRS = [("river?", "cloud otter"), ("stone?", "maple"), ("tea?", "<b>ember</b>")]


@pytest.fixture(scope="module")
def service(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Service:
    store = Store(tmp_path_factory.mktemp("page") / "users.sqlite")
    return Service(Run.open(folder), store, Settings(exchanges=5))


@pytest.fixture(scope="module")
def address(service: Service) -> Iterator[str]:
    """The address of a server in a thread."""
    web = uvicorn.Server(uvicorn.Config(create_app(service), port=0, log_level="warning"))
    thread = threading.Thread(target=web.run)
    thread.start()
    until(lambda: web.started)
    yield f"http://127.0.0.1:{web.servers[0].sockets[0].getsockname()[1]}"
    web.should_exit = True
    thread.join()


@pytest.fixture(scope="module")
def browser() -> Iterator[playwright.Browser]:
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM)
        yield browser
        browser.close()


@pytest.fixture
def visit(browser: playwright.Browser, address: str) -> Iterator[object]:
    """A function that opens the page as a user, in a browser of its own; it must cause no error and ask no other host.

    Replies are the likeliest ones.
    """
    contexts, problems = [], []

    def opened(name: str, model: str = "run", **options: object) -> Page:
        context = browser.new_context(**options)
        contexts.append(context)
        context.add_init_script(
            f"localStorage['metakern.name'] ??= '{name}'; localStorage['metakern.temperature'] ??= '0'"
        )
        tab = context.new_page()
        tab.set_default_timeout(SECONDS)
        tab.on("pageerror", lambda error: problems.append(str(error)))
        tab.on("request", lambda asked: asked.url.startswith((address, "data:")) or problems.append(asked.url))
        tab.goto(address)
        expect(tab.locator("#model")).to_have_text(model)
        return tab

    yield opened
    for context in contexts:
        context.close()
    assert problems == []


def teach(tab: Page, *pairs: tuple[str, str]) -> None:
    """Teach with the keyboard alone, and wait until it is learned."""
    for say, answer in pairs:
        tab.keyboard.press("Alt+T")
        tab.keyboard.insert_text(say)
        tab.keyboard.press("Tab")
        tab.keyboard.insert_text(answer)
        tab.keyboard.press("Enter")
        expect(tab.locator("#taught li:first-child")).to_contain_text(answer, timeout=SECONDS)
    learned(tab, len(pairs))


def learned(tab: Page, count: int) -> None:
    expect(tab.locator("#state")).to_contain_text(f"Learned: {count} of {count} ", timeout=SECONDS)


def ask(tab: Page, text: str) -> list[str]:
    """Send a message with the keyboard alone; return the answers: the model's, or those before and after teaching."""
    tab.keyboard.press("Alt+M")
    tab.keyboard.insert_text(text)
    tab.keyboard.press("Enter")
    expect(tab.locator("#log > .said").last).to_have_text(text)
    reply = tab.locator("#log > .reply").last
    expect(reply.get_by_role("button")).to_be_visible(timeout=SECONDS)
    return reply.locator("p").all_inner_texts()


@in_browser
def test_three_taught_exchanges_change_the_replies_and_outlive_a_reload(visit):
    tab = visit("ann")
    (before,) = ask(tab, "river?")
    teach(tab, *PAIRS)
    losses = tab.get_by_role("img", name="Loss over").get_attribute("aria-label").rsplit(": ")[1].split(" → ")
    assert float(losses[0]) > float(losses[1])
    assert tab.get_by_role("img", name="Replies right").get_attribute("aria-label").endswith(" → 3 of 3")
    for say, answer in PAIRS:
        assert ask(tab, say) == [answer]
    tab.reload()
    expect(tab.locator("#log .reply").last).to_contain_text("<b>ember</b>")
    expect(tab.locator("#taught li")).to_have_count(3)
    tab.keyboard.press("Alt+N")
    expect(tab.locator("#log li")).to_have_count(0)
    tab.keyboard.press("Alt+B")
    assert ask(tab, "river?") == [before, "cloud otter"]
    tab.get_by_role("button", name="Forget: river?").click()
    expect(tab.locator("#taught li")).to_have_count(2)
    learned(tab, 2)


@in_browser
def test_users_are_apart_and_choose_their_names(visit):
    bob = visit("bob")
    teach(bob, PAIRS[0])
    other = visit("cleo")
    assert ask(other, "river?") != ["cloud otter"]
    expect(other.locator("#taught")).to_have_text("Nothing yet.")
    other.get_by_role("button", name="You are cleo").click()
    other.get_by_label("Name").fill("bob")
    other.keyboard.press("Enter")
    expect(other.locator("#taught li")).to_contain_text("cloud otter")
    expect(other.locator("#log li")).to_have_count(0)
    assert ask(other, "river?") == ["cloud otter"]


@in_browser
def test_exchanges_are_imported_and_errors_are_one_line(visit):
    def imported(text: str) -> None:
        tab.set_input_files("#file", {"name": "a.jsonl", "mimeType": "text/plain", "buffer": text.encode()})

    def refused(text: str) -> None:
        expect(tab.locator("#refused")).to_have_text(text)

    def record(say: str, answer: str) -> str:
        messages = [{"role": "user", "content": say}, {"role": "assistant", "content": answer}]
        return json.dumps({"messages": [{"role": "system", "content": "be brief"}, *messages]})

    tab = visit("dora")
    imported(record(*PAIRS[0]) + "\n{cut")
    refused("Line 2 of the file is not JSON.")
    imported('{"text": "a"}')
    refused("Record 1 of the file has no messages with role and content.")
    imported("\n".join(record(f"river {i}?", "maple") for i in range(6)))
    refused("a user can have at most 5 exchanges: delete some first")
    imported("\n".join(record(*pair) for pair in PAIRS[:2]))
    expect(tab.locator("#taught li")).to_have_count(2)
    expect(tab.locator("#refused")).to_be_hidden()
    learned(tab, 2)
    tab.get_by_label("Temperature").evaluate("field => { field.value = 3 }")
    tab.get_by_label("Message").fill("river?")
    tab.keyboard.press("Enter")
    expect(tab.locator("#error")).to_have_text("temperature: Input should be less than or equal to 2")
    expect(tab.get_by_label("Message")).to_have_value("river?")
    expect(tab.locator("#log li")).to_have_count(0)


@in_browser
def test_a_reply_can_be_stopped_and_a_server_that_is_away_is_an_error(visit):
    tab = visit("gina")
    asked = []
    tab.route("**/chat/completions", lambda route: asked.append(route))
    tab.get_by_label("Message").fill("river?")
    tab.keyboard.press("Enter")
    expect(tab.get_by_role("button", name="Stop")).to_be_visible()
    tab.keyboard.press("Escape")
    expect(tab.get_by_label("Message")).to_have_value("river?")
    expect(tab.locator("#log li")).to_have_count(0)
    expect(tab.locator("#error")).to_be_hidden()
    tab.unroute("**/chat/completions")
    tab.route("**/chat/completions", lambda route: route.abort())
    tab.keyboard.press("Enter")
    expect(tab.locator("#error")).to_have_text("The server does not answer. Is it running?")
    assert len(asked) == 1


@in_browser
@pytest.mark.parametrize(("scheme", "width", "views"), [("light", 1280, [""]), ("dark", 390, ["Chat", "Teach"])])
def test_the_page_is_accessible_and_fits(visit, scheme, width, views):
    tab = visit("emil", color_scheme=scheme, viewport={"width": width, "height": 800})
    ask(tab, "river? " + "w" * 100)
    for view in views:
        if view:
            tab.get_by_role("navigation").get_by_role("button", name=view).click()
        assert tab.locator("#chat").is_visible() == (view != "Teach")
        assert tab.locator("#teach").is_visible() == (view != "Chat")
        found = axe.Axe().run(tab).response["violations"]
        assert [(rule["id"], rule["nodes"]) for rule in found if rule["impact"] in ("serious", "critical")] == []
        for part in ("html", "#scroll", "#teach"):
            assert tab.locator(part).evaluate("part => part.scrollWidth - part.clientWidth") == 0
    background = "getComputedStyle(document.body).backgroundColor"
    before = tab.evaluate(background)
    tab.locator("#theme").click()
    assert tab.evaluate(background) != before
    tab.keyboard.press("Alt+K")
    expect(tab.get_by_role("dialog", name="Keys")).to_be_visible()


@in_browser
def test_a_token_is_asked_for_and_remembered(visit, service):
    token = service.store.add_token("fred")
    try:
        tab = visit("me", model="metakern")
        asked = tab.get_by_role("dialog", name="Who are you?")
        expect(asked).to_contain_text("a valid token is needed")
        asked.get_by_label("Name").fill("fred")
        asked.get_by_label("Token").fill(token)
        tab.keyboard.press("Enter")
        expect(tab.locator("#model")).to_have_text("run")
        tab.reload()
        expect(tab.locator("#model")).to_have_text("run")
        expect(asked).to_be_hidden()
    finally:
        service.store.revoke("fred")


def test_the_page_forbids_other_hosts_and_markup_of_scripts(client):
    for name, kind in page.FILES.items():
        answer = client.get("/" if name == "index.html" else f"/{name}")
        assert (answer.status_code, answer.headers["content-type"]) == (200, f"{kind}; charset=utf-8")
        policy = dict(part.split(" ", 1) for part in answer.headers["content-security-policy"].split("; "))
        assert (policy["default-src"], policy["script-src"], policy["connect-src"]) == ("'none'", "'self'", "'self'")
        assert policy["trusted-types"] == "'none'"


@pytest.mark.parametrize("desktop", [False, True])
def test_the_browser_opens_where_there_is_a_desktop(folder, tmp_path, monkeypatch, capsys, desktop):
    opened = []
    monkeypatch.setattr(uvicorn.Server, "run", lambda web, sockets: web.config.app.state.service.close())
    monkeypatch.setattr(server.signal, "signal", lambda *given: None)
    monkeypatch.setattr(server.os, "umask", lambda mask: 0)
    monkeypatch.setattr(server.webbrowser, "open", opened.append)
    monkeypatch.setattr(server.sys, "platform", "linux")
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    monkeypatch.delenv("DISPLAY", raising=False)
    if desktop:
        monkeypatch.setenv("DISPLAY", ":0")
    server.serve(str(folder), str(tmp_path / "users.sqlite"), "127.0.0.1", 0, Settings(), browse=True)
    address = capsys.readouterr().out.split()[2].rstrip(",")
    assert opened == [address] * desktop


def test_a_chat_on_the_web_serves_the_page_and_refuses_what_the_page_has(monkeypatch, capsys):
    calls = []
    monkeypatch.setattr(server, "serve", lambda *given, **more: calls.append((*given, more)))
    assert main(["chat", "runs/demo", "--web"]) == 0
    assert calls == [("runs/demo", None, "127.0.0.1", server.port_of("runs/demo"), Settings(), {"browse": True})]
    assert main(["chat", "runs/demo", "--web", "--top-p", "0.5"]) == 2
    assert "chat: --top-p has no effect with --web" in capsys.readouterr().err
    assert len(calls) == 1
