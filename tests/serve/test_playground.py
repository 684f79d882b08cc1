"""The playground in a real browser, over a live server: asked, compared, blended, by mouse and by key."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

from deltaw.serve.service import open_service
from tests.cli.conftest import write_base
from tests.serve.conftest import SHAPES, config, live

pytestmark = pytest.mark.skipif(not (shutil.which("chromium") and shutil.which("chromedriver")),
                                reason="needs Debian's chromium and chromium-driver")
LENGTH = 12


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1280,900"):
        options.add_argument(argument)
    options.binary_location = str(shutil.which("chromium"))
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
    yield driver
    driver.quit()


@pytest.fixture
def page(browser: Any, server: str) -> Iterator[Any]:
    open_page(browser, server, models=1 + len(SHAPES))
    yield browser
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []


def open_page(browser: Any, url: str, models: int) -> None:
    browser.get(url + "/")
    until(browser, lambda: len(browser.find_elements(By.CSS_SELECTOR, ".model")) == models)
    browser.execute_script(f"document.getElementById('max_tokens').value = {LENGTH}")


@pytest.fixture
def expected(server: str) -> Iterator[Callable[..., str]]:
    """What the server answers to OpenAI's own client."""
    with openai.OpenAI(base_url=f"{server}/v1", api_key="none", max_retries=0) as client:
        def answer(name: str, text: str, **more: Any) -> str:
            made = client.chat.completions.create(model=name, messages=[{"role": "user", "content": text}],
                                                  max_tokens=LENGTH, temperature=0, extra_body=more)
            return made.choices[0].message.content or ""

        yield answer


def until(browser: Any, true: Any) -> None:
    WebDriverWait(browser, 30, poll_frequency=0.05).until(lambda _: true())


def text_of(answer: Any) -> str:
    return str(answer.find_element(By.CSS_SELECTOR, ".text").get_property("textContent"))


def ask(page: Any, text: str) -> list[Any]:
    box = page.find_element(By.ID, "prompt")
    box.clear()
    box.send_keys(text, Keys.CONTROL, Keys.ENTER)
    until(page, lambda: page.find_elements(By.CSS_SELECTOR, ".answer")
          and not page.find_elements(By.CSS_SELECTOR, '[aria-busy="true"]')
          and page.find_element(By.ID, "run").is_enabled())
    return list(page.find_elements(By.CSS_SELECTOR, ".answer"))


def test_answers_stand_side_by_side_and_are_the_servers(page: Any, expected: Callable[..., str]) -> None:
    names = [label.text for label in page.find_elements(By.CSS_SELECTOR, ".model label")]
    assert names == ["tiny", *SHAPES]
    answers = ask(page, "is the sky blue ?")
    assert [one.find_element(By.TAG_NAME, "h2").text for one in answers] == names[:2]
    for one, name in zip(answers, names, strict=False):
        assert text_of(one) == expected(name, "is the sky blue ?")
        assert "tokens" in one.find_element(By.CSS_SELECTOR, ".figures").text


def test_cards_tell_rank_and_targets(page: Any) -> None:
    until(page, lambda: "rank" in page.find_elements(By.CSS_SELECTOR, ".model")[1].text)
    card = page.find_elements(By.CSS_SELECTOR, ".model")[1]
    names, values = ([one.text for one in card.find_elements(By.TAG_NAME, tag)] for tag in ("dt", "dd"))
    facts = dict(zip(names, values, strict=True))
    assert facts["rank"] == str(SHAPES["small"]["r"])
    assert facts["changes"] == ", ".join(SHAPES["small"]["target_modules"])
    assert facts["size"].endswith("KiB")
    assert "saved" in facts


def test_tokens_that_differ_are_marked_and_can_be_unmarked(page: Any) -> None:
    answers = ask(page, "is the grass green ?")
    texts = [[token.get_property("textContent") for token in one.find_elements(By.CSS_SELECTOR, ".token")]
             for one in answers]
    marked = answers[1].find_elements(By.CSS_SELECTOR, ".token.differs")
    assert bool(marked) == (texts[0] != texts[1])
    assert all("%" in token.get_attribute("title") for token in marked)
    page.find_element(By.ID, "colour").click()
    assert answers[1].find_elements(By.CSS_SELECTOR, ".token.differs") == []


def test_a_blend_is_asked_for_with_its_weights(page: Any, expected: Callable[..., str]) -> None:
    first, second = list(SHAPES)[:2]
    for _ in range(2):
        page.find_element(By.ID, "blend-add").click()
        page.find_element(By.ID, "blend-with").send_keys(Keys.ARROW_DOWN)
    sliders = page.find_elements(By.CSS_SELECTOR, "#sliders input")
    assert len(sliders) == 2
    sliders[1].send_keys(Keys.ARROW_RIGHT)
    answers = ask(page, "hello world")
    name = answers[-1].find_element(By.TAG_NAME, "h2").text
    assert name == f"1 × {first} + 0.55 × {second}"
    mix = [{"id": first, "scale": 1.0}, {"id": second, "scale": 0.55}]
    assert text_of(answers[-1]) == expected("tiny", "hello world", lora=mix)


def test_every_control_has_a_name_and_can_be_reached_by_key(page: Any) -> None:
    page.find_element(By.TAG_NAME, "body").send_keys(Keys.TAB)
    assert page.switch_to.active_element.text == "Skip to the prompt"
    page.find_element(By.TAG_NAME, "summary").click()
    for field in page.find_elements(By.CSS_SELECTOR, "input, textarea, select, button"):
        assert field.accessible_name, field.get_attribute("outerHTML")


def test_the_page_fits_narrow_screens_and_the_dark(page: Any) -> None:
    light = page.find_element(By.TAG_NAME, "body").value_of_css_property("background-color")
    dark = [{"name": "prefers-color-scheme", "value": "dark"}]
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": dark})
    assert page.find_element(By.TAG_NAME, "body").value_of_css_property("background-color") != light
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    page.set_window_size(400, 800)
    assert page.execute_script("return document.documentElement.scrollWidth <= window.innerWidth")
    page.set_window_size(1280, 900)


def test_adapters_are_filtered_by_name(page: Any) -> None:
    page.find_element(By.ID, "filter").send_keys("WID")
    until(page, lambda: [one.text for one in page.find_elements(By.CSS_SELECTOR, ".model label")] == ["tiny", "wide"])
    page.find_element(By.ID, "filter").send_keys(Keys.BACKSPACE * 3)
    until(page, lambda: len(page.find_elements(By.CSS_SELECTOR, ".model")) == 1 + len(SHAPES))


def test_a_failing_column_says_why_and_leaves_the_others_be(page: Any, expected: Callable[..., str]) -> None:
    page.execute_script("const sent = window.fetch; window.fetch = (path, options) => sent(path, options?.body "
                        "&& JSON.parse(options.body).model === 'small' ? { ...options, body: "
                        "options.body.replace('\"small\"', '\"nobody\"') } : options)")
    first, second = ask(page, "is the sky blue ?")
    assert text_of(first) == expected("tiny", "is the sky blue ?")
    assert "failed" in second.get_attribute("class")
    assert "'nobody' does not exist" in text_of(second)
    page.get_log("browser")  # a 404 stands there too


def test_no_longer_answer_can_be_asked_for_than_the_server_allows(browser: Any, base_folder: Path) -> None:
    with open_service(config(base_folder, max_tokens=20), {}) as service, live(service) as url:
        browser.get(url + "/")
        until(browser, lambda: browser.find_elements(By.CSS_SELECTOR, ".model"))
        field = browser.find_element(By.ID, "max_tokens")
        assert (field.get_property("max"), field.get_property("value")) == ("20", "20")
        answer, = ask(browser, "hello")
        assert "failed" not in answer.get_attribute("class")
        assert text_of(answer)


def test_stop_ends_the_answers_and_frees_the_page(browser: Any, base_folder: Path) -> None:
    with open_service(config(base_folder), {}) as service, live(service) as url:
        open_page(browser, url, models=1)
        service.engine.call(lambda: setattr(service.engine, "step", lambda: None))  # nobody ever writes a token
        browser.find_element(By.ID, "prompt").send_keys("hello", Keys.CONTROL, Keys.ENTER)
        until(browser, lambda: len(service.engine.scheduler._waiting) == 1)
        browser.find_element(By.ID, "stop").click()
        until(browser, lambda: browser.find_element(By.ID, "run").is_enabled())
        until(browser, lambda: service.engine.scheduler.idle)
        assert not browser.find_elements(By.CSS_SELECTOR, '[aria-busy="true"]')


def test_a_base_without_a_chat_template_continues_text(browser: Any, tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", template=None)
    with open_service(config(base), {}) as service, live(service) as url, \
            openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        open_page(browser, url, models=1)
        assert "no chat template" in browser.find_element(By.ID, "base").text
        shown = text_of(ask(browser, "is the sky")[0])
        made = client.completions.create(model="tiny", prompt="is the sky", max_tokens=LENGTH, temperature=0)
        assert shown == made.choices[0].text != ""
        assert browser.find_elements(By.CSS_SELECTOR, ".token")
